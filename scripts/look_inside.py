"""Look into a checkpoint while it answers problems: where its heads look, and at which layer the answer's letter appears.

    python -m scripts.look_inside -i rl -g d4 --task AQUA --num-problems 64
    python -m scripts.look_inside -i sft --pictures 3 7      # heatmaps of the problems at these places
    python -m scripts.look_inside -i rl --forced             # the letter read right after the question, without any reasoning

Writes pictures, numbers, and (with the optional package treescope) arrays and the module tree as HTML into
<base_dir>/interpretability/{stage}_{model_tag}_{task}/, and a section of the report. The model answers as it would unwatched.
"""
import json
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec

from rich.console import Console
from rich.table import Table

from nanochat.checkpoint_manager import load_model
from nanochat.common import base_dir, print0, write_atomic
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import config_dict, parse
from nanochat.engine import Engine, Request
from nanochat.interpretability.attention_metrics import flatten, measure_attention
from nanochat.interpretability.logit_lens import LENS_HEAD, lens_metrics, lens_rows_of_table, lens_verdict, logit_lens
from nanochat.interpretability.plots import plot_heads, plot_lens, save_attention_pictures, write_attention_page, write_treescope
from nanochat.report import add_section, markdown_table
from nanochat.rl.letter_metrics import decision_point
from tasks.common import get_task
from tasks.evaluation import answer_tokens


@dataclass(frozen=True)
class Config:
    """Attention, logit lens, and the module tree of a chat checkpoint on problems of a task."""
    source: str = "rl"                  # [-i] stage of the checkpoint: base, mid, sft or rl
    model_tag: str | None = None        # [-g] folder of the checkpoint (None = the one saved last)
    step: int | None = None             # [-s] step of the checkpoint (None = the newest)
    task: str = "AQUA"                  # [-a] multiple-choice task
    split: str = "validation"           # split of the task
    data_dir: str | None = None         # folder of the task's splits (None = where the task looks by itself)
    num_problems: int = 64              # [-x] problems, from the first on
    max_new_tokens: int = 256           # [-m] longest completion
    forced: bool = False                # let the model write nothing: read the letter behind "Answer:" right after the question
    pictures: tuple[int, ...] = (0,)    # places of the problems whose attention is drawn
    layers: tuple[int, ...] | None = None  # layers to draw and to measure, -1 = the last (None = all)
    treescope: bool = True              # also HTML to click through, where the package treescope is installed
    device_batch_size: int = 8          # sequences per forward pass
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    dtype: str = "float32"              # [-d] float32 or bfloat16


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    task = get_task(config.task, split=config.split, stop=config.num_problems, **({"data_dir": config.data_dir} if config.data_dir else {}))
    conversations = list(task)
    wrong = [place for place in config.pictures if not 0 <= place < len(conversations)]
    if not conversations or wrong:
        raise ValueError(f"pictures {wrong} are not among the {len(conversations)} problems of {task.name} {config.split}: give 0 to {len(conversations) - 1}, "
                         "or more by --num-problems")
    if "letters" not in conversations[0]:
        raise ValueError(f"{task.name} has no letters to look for: this needs a multiple-choice task, such as AQUA, ALGEBRA, ARC-Easy or MMLU")
    model, tokenizer, meta = load_model(config.source, compute, "eval", config.model_tag, config.step)
    layers = list(config.layers) if config.layers else None
    folder = base_dir() / "interpretability" / f"{config.source}_{meta['model_tag']}_{task.name}{'_forced' if config.forced else ''}"
    what = f"{config.source} {meta['model_tag']} at step {meta['step']} on {len(conversations)} problems of {task.name} {config.split}"

    # The model answers; where does it decide on a letter?
    sequences, prompt_lengths, points = answers(model, tokenizer, conversations, config)
    usual = Counter(tuple(conversation["letters"]) for conversation in conversations).most_common(1)[0][0]
    watched = [place for place, point in enumerate(points) if point is not None and tuple(conversations[place]["letters"]) == usual]
    sections, metrics = [f"Looking into {what}{', forced to answer at once' if config.forced else ''}."], {}

    # Logit lens
    if watched:
        letter_ids = answer_tokens(tokenizer, list(usual))[1]
        lens = logit_lens(model, [sequences[i] for i in watched], [points[i] for i in watched], list(usual), [letter_ids[letter] for letter in usual],
                          [conversations[i]["answer_letter"] for i in watched], config.device_batch_size)
        metrics |= lens_metrics(lens)
        plot_lens(lens, folder / "lens.png")
        rows = lens_rows_of_table(lens)
        show(f"logit lens at {len(watched)} decision points", LENS_HEAD, rows)
        print0(f"{lens_verdict(lens)}.")
        sections += ["\n".join(markdown_table(LENS_HEAD, rows)), f"{lens_verdict(lens)}."]
    if len(watched) < len(conversations):
        left_out = (f"{len(conversations) - len(watched)} of {len(conversations)} problems have no decision point (no line \"Answer:\" within {config.max_new_tokens} tokens, "
                    f"or other letters than {''.join(usual)}) and are left out of the lens" + ("" if watched else "; --forced reads the letter without the model's words"))
        print0(left_out)
        sections.append(f"{left_out}.")

    # Attention
    table = measure_attention(model, tokenizer, sequences, prompt_lengths, layers, config.device_batch_size)
    chosen = [layer % model.config.n_layer for layer in layers] if layers else list(range(model.config.n_layer))
    metrics |= flatten(table, chosen)
    plot_heads(table, folder / "heads.png", chosen)
    names = [name for name in table if not name.startswith("uniform_")]
    rows = [(f"layer {layer}", *(f"{table[name][place].mean():.3f}" for name in names)) for place, layer in enumerate(chosen)]
    rows.append(("a head that looks everywhere alike", *(f"{table[f'uniform_{name}'].mean():.3f}" if f"uniform_{name}" in table else "" for name in names)))
    show("attention of the completion's tokens, mean over heads", ("", *names), rows)
    sections.append("\n".join(markdown_table(("mean over heads", *names), rows)))

    # Pictures of single problems
    with_html = config.treescope and find_spec("treescope") is not None
    if config.treescope and not with_html:
        print0("treescope is not installed, so there are pictures but no HTML to click through: pip install treescope (the extra `interpretability`)")
    for place in config.pictures:
        of_problem = folder / f"problem_{place:04d}"
        save_attention_pictures(model, tokenizer, sequences[place], prompt_lengths[place], of_problem, layers)
        if with_html:
            write_attention_page(model, tokenizer, sequences[place], prompt_lengths[place], of_problem / "attention.html", layers)
    if with_html:
        write_treescope(model, folder / "model.html")
    write_atomic(folder / "look.json", json.dumps({"what": what, "config": config_dict(config), "metrics": metrics}, indent=1))
    add_section(f"look_inside_{config.source}", "\n\n".join([*sections, f"Pictures: `{folder}`"]), metrics)
    print0(f"{folder}: {len([path for path in folder.rglob('*') if path.suffix in ('.png', '.html')])} pictures and pages")
    compute_cleanup()
    return metrics


def answers(model, tokenizer, conversations, config):
    """-> sequences (prompt and greedy completion), lengths of the prompts, and in each the position that predicts the letter, or None."""
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    if config.forced:
        forced = tokenizer.encode("Answer:")
        answered = [conversation["answer_letter"] for conversation in conversations]
        sequences = [prompt + tokenizer.encode(f"Answer: {letter}") for prompt, letter in zip(prompts, answered)]
        return sequences, list(map(len, prompts)), [len(prompt) + len(forced) - 1 for prompt in prompts]
    completions = Engine(model, tokenizer).generate([Request(prompt, max_new_tokens=config.max_new_tokens, temperature=0) for prompt in prompts])
    sequences, points = [], []
    for prompt, (completion,) in zip(prompts, completions):
        point = decision_point(tokenizer, completion.tokens, completion.mask)
        sequences.append(prompt + completion.tokens)
        points.append(None if point is None else len(prompt) - 1 + point)
    return sequences, list(map(len, prompts)), points


def show(title, columns, rows):
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 140).print(table)


if __name__ == "__main__":
    main(parse(Config))
