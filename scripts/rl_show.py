"""What an RL run sampled at a step, how two steps differ, and what an update did to the words it was made from.

    python -m scripts.rl_show 40                       # the groups that were logged at step 40
    python -m scripts.rl_show 40 80                    # the difference of two steps
    python -m scripts.rl_show 40 --explain             # tokens coloured by advantage x change of log-probability, here and as HTML
    python -m scripts.rl_show --run=rl_d8              # the newest step of one run

Reads <base_dir>/runs/<run>.jsonl, in which the RL scripts write rollouts every --rollouts-every steps. Explaining compares two checkpoints:
the newest one saved before the step (or the model the run started from) and the oldest one saved after it; keep them by --keep-last=-1.
"""
import sys
from dataclasses import dataclass

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from nanochat.checkpoint_manager import FOLDERS, load_model, saved_steps, stage_dir
from nanochat.common import base_dir, write_atomic
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import parse
from nanochat.interpretability.rollout_log import has_signal, read_rollouts
from nanochat.interpretability.update_explained import explain_update, full_colour, summarize_update, update_page, update_text
from nanochat.run_logger import visible


@dataclass(frozen=True)
class Config:
    """Show rollouts of an RL run. The step, and a second one to compare with, may stand in front without a flag's name."""
    step: int | None = None      # step to show (None = the newest with rollouts)
    other: int | None = None     # second step: show the difference
    run: str = ""                # name of a log in runs/ of the base directory, such as rl_d8 ("" = the newest that holds rollouts)
    group: int = -1              # which of the step's logged groups, from 0 (-1 = all)
    explain: bool = False        # colour the tokens by advantage x change of log-probability between two checkpoints
    before: int | None = None    # step of the checkpoint before the update (None = the newest up to the shown step; -1 = where the run started)
    after: int | None = None     # step of the checkpoint after it (None = the oldest beyond the shown step)
    html: str = ""               # file of the explanation ("" = runs/RUN_explained/step_NNNNNN.html in the base directory)
    device_type: str = ""        # cuda, mps or cpu ("" = the best there is)
    device_batch_size: int = 16  # rows per forward pass while explaining


def main(config):
    path = find_run(config.run)
    header, steps, metrics = read_rollouts(path)
    console = Console(width=None if Console().is_terminal else 140)
    step = choose_step(config.step, steps, path)
    if config.other is not None:
        show_difference(console, path.stem, steps, metrics, step, choose_step(config.other, steps, path))
        return
    groups = chosen_groups(steps[step], config.group, step)
    if config.explain:
        temperature = metrics.get(step, {}).get("rl/temperature") or header["config"].get("temperature", 1.0)
        return explain(config, console, path, header, step, groups, temperature)
    console.print(Text(f"{path.stem}, step {step}: {len(groups)} of {len(steps[step])} logged groups; steps with rollouts: {', '.join(map(str, steps))}"))
    for number, group in enumerate(groups):
        console.print(Group(*group_view(group, number)))


# ---------------------------------------------------------------------------------------------------------------------
# Found

def find_run(name):
    """A run's name -> its log. Without a name the newest log that holds rollouts."""
    folder = base_dir() / "runs"
    logs = sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime, reverse=True)
    if name:
        found = [path for path in logs if path.stem == name.removesuffix(".jsonl")]
    else:
        found = [path for path in logs if '"rollouts"' in path.read_text(encoding="utf-8", errors="replace")]
    if not found:
        raise ValueError(f"{folder} holds {len(logs)} logs ({', '.join(path.stem for path in logs) or 'none'}), "
                         + (f"and none is called {name!r}: name one of them by --run" if name else "none of them with rollouts: train with "
                            "`python -m scripts.chat_rl --rollouts-every=20`"))
    return found[0]


def choose_step(step, steps, path):
    if not steps:
        raise ValueError(f"{path} holds rollouts of 0 steps: train with --rollouts-every set, or name another log by --run")
    if step is None:
        return max(steps)
    if step not in steps:
        near = min(steps, key=lambda one: abs(one - step))
        raise ValueError(f"{path.name} holds no rollouts of step {step}, only of {', '.join(map(str, steps))}: try {near}")
    return step


def chosen_groups(groups, number, step):
    if not -1 <= number < len(groups):
        raise ValueError(f"group {number} was not logged: step {step} has {len(groups)}, so give 0 to {len(groups) - 1}, or -1 for all")
    return groups if number == -1 else [groups[number]]


# ---------------------------------------------------------------------------------------------------------------------
# One step

def group_view(group, number):
    """The question, and a table with one row per rollout."""
    yield Text(heading(group, number), style="bold")
    yield Text(visible(group[0].question) if group[0].question else "(this log holds no question: it was written by an older chat_rl)", style="dim")
    table = Table(show_lines=True)
    for name in ("#", "completion", "letter", *group[0].rewards, "advantage", "finish", "tokens"):
        table.add_column(name, justify="left" if name in ("completion", "finish") else "right", ratio=1 if name == "completion" else None)
    for place, rollout in enumerate(group):
        is_right = rollout.letter is not None and rollout.letter == rollout.answer
        table.add_row(str(place), Text(visible(rollout.completion)), Text(rollout.letter or "none", style="green" if is_right else "" if rollout.letter else "dim"),
                      *(f"{value:g}" for value in rollout.rewards.values()), Text(f"{rollout.advantage:+.3f}", style=sign_style(rollout.advantage)),
                      rollout.finish, str(len(rollout.tokens) or "-"))
    yield table


def heading(group, number):
    answer = f", right answer {group[0].answer}" if group[0].answer else ""
    return f"\nGroup {number}{answer}{'' if has_signal(group) else ': all right or all wrong, so it gave no gradient'}"


def sign_style(value):
    return "green" if value > 0 else "red" if value < 0 else "dim"


# ---------------------------------------------------------------------------------------------------------------------
# Two steps

def show_difference(console, name, steps, metrics, first, second):
    """The metrics of both steps with their difference, and the completions side by side: of the same question where both logged one."""
    console.print(Text(f"{name}: step {first} and step {second}", style="bold"))
    table = Table()
    for column in ("metric", f"step {first}", f"step {second}", "difference"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for key, old, new in metric_pairs(metrics.get(first, {}), metrics.get(second, {})):
        table.add_row(key, f"{old:.5g}", f"{new:.5g}", Text(f"{new - old:+.4g}", style=sign_style(new - old)))
    console.print(table)
    pairs, is_same = matched_groups(steps[first], steps[second])
    if not is_same:
        console.print(Text("No question was logged at both steps; these are their first groups."))
    for old, new in pairs:
        for step, group in ((first, old), (second, new)):
            if not is_same or step == first:
                console.print(Text(f"\nstep {step}: {visible(group[0].question or '(no question logged)')}", style="dim"))
        beside = Table(show_lines=True, expand=True)
        for step, group in ((first, old), (second, new)):
            right = sum(rollout.rewards.get("correct", 0) > 0 for rollout in group)
            beside.add_column(f"step {step}: {right} of {len(group)} right", ratio=1)
        for row in range(max(len(old), len(new))):
            beside.add_row(*(cell(group[row]) if row < len(group) else "" for group in (old, new)))
        console.print(beside)


def metric_pairs(old, new):
    """The metrics that are numbers at both steps, in the order of the log."""
    def is_number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return [(key, value, new[key]) for key, value in old.items() if is_number(value) and is_number(new.get(key))]


def matched_groups(first, second):
    """-> ([(group, group)], whether they ask the same)."""
    by_question = {group[0].question or tuple(group[0].prompt): group for group in second}
    same = [(group, by_question[key]) for group in first if (key := group[0].question or tuple(group[0].prompt)) and key in by_question]
    return (same, True) if same else ([(first[0], second[0])], False)


def cell(rollout):
    return Text(f"[{rollout.letter or 'none'}, reward {rollout.reward:g}, advantage {rollout.advantage:+.3f}, {rollout.finish}]\n{visible(rollout.completion)}")


# ---------------------------------------------------------------------------------------------------------------------
# An update, explained

def explain(config, console, path, header, step, groups, temperature):
    """Score the step's completions under the checkpoints around it; print the tokens coloured, and write the same as HTML."""
    if not all(rollout.prompt and rollout.tokens for group in groups for rollout in group):
        raise ValueError(f"step {step} of {path.name} holds no token ids (0 'rollout_tokens'): it was written by an older chat_rl, and text encoded again "
                         "need not give the ids that were sampled; run the RL stage again")
    compute = compute_init(config.device_type, "float32")  # a change of log-probability is small beside bfloat16's rounding
    before, after = checkpoints_around(config, header, step)
    models, tokenizer = [], None
    for stage, tag, saved in (before, after):
        model, tokenizer, _ = load_model(stage, compute, "eval", tag, saved)
        models.append(model)
    explained = [explain_update(*models, tokenizer, group, temperature, config.device_batch_size) for group in groups]
    flat = [[one for part in parts for one in part] for parts in (groups, explained)]
    total = summarize_update(*flat)
    facts = [("before", place(before)), ("after", place(after)), *summary_lines(total, sampler_difference(*flat))]
    html = config.html or base_dir() / "runs" / f"{path.stem}_explained" / f"step_{step:06d}.html"
    write_atomic(html, update_page(f"{path.stem}: what the update around step {step} did", facts, list(zip(groups, explained))))
    console.print(Text(f"{path.stem}, step {step}, explained", style="bold"))
    for name, value in facts:
        console.print(Text(f"{name}: {value}"))
    full = full_colour(flat[1])
    for number, (group, changes) in enumerate(zip(groups, explained)):
        console.print(Text(heading(group, number), style="bold"))
        console.print(Text(visible(group[0].question or ""), style="dim"))
        for rollout, one in zip(group, changes):
            console.print(Text(f"\nletter {rollout.letter or 'none'}, reward {rollout.reward:g}, advantage {rollout.advantage:+.3f}, summed value "
                               f"{sum(change.value for change in one):+.4f}", style=sign_style(rollout.advantage)))
            console.print(update_text(one, full))
    console.print(Text(f"\n{html} written"), soft_wrap=True)
    compute_cleanup()
    return total


def checkpoints_around(config, header, step):
    """-> two (stage, model tag, step): the newest checkpoint up to the shown step, or the one the run started from; the oldest beyond it."""
    stage, tag, run = header.get("stage"), header.get("model_tag"), header["config"]
    saved = saved_steps(stage_dir(stage, tag)) if stage in FOLDERS else []
    start = run.get("source"), run.get("model_tag"), run.get("step")
    earlier, later = [one for one in saved if one <= step], [one for one in saved if one > step]
    for name, asked in (("before", config.before), ("after", config.after)):
        if asked is not None and asked not in saved and not (name == "before" and asked == -1):
            raise ValueError(f"--{name}={asked} is not one of the {len(saved)} checkpoints of {stage} {tag} ({', '.join(map(str, saved)) or 'none'}): "
                             "name one of those, or leave it out")
    if config.after is None and not later:
        raise ValueError(f"{stage} {tag} has no checkpoint after step {step}, only {saved}: name an earlier step, or --after")
    before = start if config.before == -1 or config.before is None and not earlier else (stage, tag, config.before if config.before is not None else earlier[-1])
    return before, (stage, tag, config.after if config.after is not None else later[0])


def place(checkpoint):
    stage, tag, step = checkpoint
    return f"{stage} {tag}, step {step}"


def sampler_difference(rollouts, explained):
    """The largest |log p before - log p when it was sampled|; None where the log has none."""
    return max((abs(change.before - logged) for rollout, changes in zip(rollouts, explained) for change, logged in zip(changes, rollout.logprobs)
                if change.before is not None), default=None)


def summary_lines(total, difference):
    sampled = [] if difference is None else [("log p before, beside the sampler's", f"differ by at most {difference:.2g}" + (
        ": `before` is the model that sampled" if difference < 1e-3 else ": other updates, or bfloat16, lie between"))]
    if not total["tokens"]:
        return [("signal", "none: every advantage of these groups is 0, so they taught nothing; what changed was taught by others"), *sampled]

    def said(value):
        return "-" if value is None else f"{value:+.4f}"

    return [("mean of advantage x change", f"{total['gain']:+.5f} over {total['tokens']} tokens (positive: the update did what the advantages asked)"),
            ("tokens that went the way they should", f"{100 * total['aligned']:.1f} %"),
            ("mean change of log p", f"{said(total['up'])} in rollouts better than their group, {said(total['down'])} in worse ones"), *sampled]


def command_line(words):
    """`[STEP [OTHER]] [flags]` -> Config."""
    words = words[1:] if words[:1] == ["--"] else words
    count = next((i for i, word in enumerate(words) if not word.isdecimal()), len(words))
    if count > 2:
        raise SystemExit(f"usage: python -m scripts.rl_show [STEP [OTHER]] [flags]; {count} steps were given, and two can be compared")
    return parse(Config, [f"--{name}={word}" for name, word in zip(("step", "other"), words[:count])] + words[count:])


if __name__ == "__main__":
    main(command_line(sys.argv[1:]))
