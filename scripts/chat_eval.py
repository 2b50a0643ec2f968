"""Accuracy of a chat checkpoint on any registered task, beside what answers without understanding would score.

    python -m scripts.chat_eval -i rl -a AQUA
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft -a "AQUA|GSM8K" -n 16 -t 1.0
    python -m scripts.chat_eval --compare sft_d8_AQUA rl_d8_AQUA          # is B better than A, or is it noise?

Writes <base_dir>/eval/{stage}_{model_tag}_{task}.json and every answer beside it. An interrupted evaluation goes on where it was.
"""
import hashlib
import json
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nanochat.common import base_dir, print0, write_atomic
from nanochat.configurator import parse
from nanochat.report import add_section
from nanochat.statistics import Z, centred, percent, verdict
from tasks.answers import Answers, compare_answers, find_answers
from tasks.evaluation_sets import CHATCORE, RUNS_CODE, check_judgement, default_split, load_evaluation
from tasks.metrics import GROUPS, summarize

COLLAPSED = 0.8                                         # share of one letter from which a model no longer chooses
MAX_SAMPLES = 8                                         # problems with answers that the summary holds for the report


@dataclass(frozen=True)
class Config:
    """Accuracy of a chat checkpoint on registered tasks, with intervals, baselines and a verdict in words."""
    source: str = "sft"                 # [-i] stage of the checkpoint: base, mid, sft or rl
    task_name: str | None = None        # [-a] tasks, "|" between them (None = the 7 of ChatCORE)
    dtype: str = ""                     # [-d] float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    temperature: float = 0.0            # [-t] of sampling; 0 = always the likeliest token
    max_new_tokens: int = 512           # [-m] longest completion
    num_samples: int = 1                # [-n] completions per problem; more of them give pass@k and maj@k
    top_k: int = 50                     # [-k] sample among this many likeliest tokens (0 = all)
    batch_size: int = 64                # [-b] rows per rank in flight; does not change what is measured
    model_tag: str | None = None        # [-g] folder of the checkpoint (None = the one saved last)
    step: int | None = None             # [-s] step of the checkpoint (None = the newest)
    max_problems: int = -1              # [-x] problems per task (-1 = all)
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    split: str | None = None            # split of the tasks (None = validation for AQUA and ALGEBRA, test for the others)
    mode: str = ""                      # generative or categorical ("" = multiple choice both ways, scored as each task says)
    seed: int = 42                      # of every draw
    data_dir: str | None = None         # folder of local data: the task's own, or one with aqua/, arc/, mmlu/, gsm8k/, ... in it
    controls: bool = False              # multiple choice: also without the question, and in every cyclic order of the options
    control_problems: int = -1          # with --controls: so for the first so many problems (-1 = all): they cost five answers each
    allow_weak_sandbox: bool = False    # run the model's code with limits only where there is no bubblewrap: it can read your files
    compare: tuple[str, str] | None = None  # two evaluations, as files or as names under <base_dir>/eval: is the second better?


def main(config):
    if config.compare:
        return show_comparison(compare_answers(*map(find_answers, config.compare)))
    # here and not above: comparing answers needs no model, and torch takes two seconds to import
    from nanochat.checkpoint_manager import FOLDERS, load_model
    from nanochat.compute import compute_cleanup, compute_init
    from nanochat.engine import Engine
    from tasks.evaluation import Settings, evaluate
    compute = compute_init(config.device_type, config.dtype)
    settings = Settings(config.mode or "both", config.temperature, config.top_k or None, config.num_samples, config.max_new_tokens, config.seed,
                        controls=config.controls, control_problems=config.control_problems)
    tasks = load_tasks(config)
    if config.source not in FOLDERS:
        raise ValueError(f"there is no stage {config.source!r}: choose one of {', '.join(FOLDERS)}")
    model, tokenizer, meta = load_model(config.source, compute, "eval", config.model_tag, config.step)
    engine = Engine(model, tokenizer, max_rows=config.batch_size)
    if config.source == "base":
        print0("a base model has never seen the conversation format: its answers are noise, and only the letters read without reasoning mean something")

    summaries = []
    for task in tasks:
        started, name = time.time(), f"{config.source}_{meta['model_tag']}_{task.name}"
        if task.split != default_split(task.name):
            name += f"_{task.split}"                    # two splits are two results
        answers = Answers(base_dir() / "eval" / name, checkpoint_key(meta, task, settings), compute)
        if answers.known:
            print0(f"{task.name} {task.split}: {len(answers.known)} of {len(task)} problems are known from an earlier evaluation, wholly or in part")
        with Bar(f"{task.name} {task.split}", compute) as bar:
            records = evaluate(task, engine, tokenizer, compute, settings, answers.known, answers.keep, config.batch_size, progress=bar.update)
        answers.close(records)
        metrics = summarize(records, task.random_accuracy)
        summary = {"stage": config.source, "model_tag": meta["model_tag"], "step": meta["step"], "task": task.name, "split": task.split,
                   "n": len(records), "metrics": metrics, "verdict": verdict(metrics), "time": time.time(), "seconds": time.time() - started,
                   "settings": {**asdict(settings), "mode": config.mode or task.eval_type}, "samples": samples(records)}
        if compute.is_master:
            write_atomic(base_dir() / "eval" / f"{name}.json", json.dumps(summary, indent=1, ensure_ascii=False))
        print0(f"{task.name} {task.split}: {len(records)} problems in {summary['seconds']:.0f} s")
        summaries.append(summary)

    if compute.is_master:
        chatcore = mean_centred(summaries, is_whole=config.max_problems < 0)
        show(summaries, chatcore)
        add_section(f"chat_eval_{config.source}", markdown(summaries, chatcore), {"chatcore": chatcore["value"], **{
            f"{summary['task']} {summary['split']}": summary["metrics"]["accuracy"] for summary in summaries}})
    compute_cleanup()
    return summaries


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated

def load_tasks(config):
    """The tasks by name. One that was asked for by name must be there; of the default seven, those without data are named and left out."""
    names = [name.strip() for name in config.task_name.split("|")] if config.task_name else CHATCORE
    tasks = []
    for name in names:
        extra = {"allow_weak": config.allow_weak_sandbox} if name in RUNS_CODE else {}
        try:
            task = load_evaluation(name, config.split or default_split(name), config.data_dir, stop=config.max_problems, **extra)
            check_judgement(task)
            tasks.append(task)
        except (ValueError, OSError, RuntimeError) as error:  # no such file, no network, no sandbox
            if config.task_name:
                raise
            print0(f"{name} is left out: {error}")
    if not tasks:
        raise ValueError(f"there is no data for any of the {len(names)} tasks {', '.join(names)}: give --data-dir, or name a task by -a")
    return tasks


def checkpoint_key(meta, task, settings):
    """What an answer depends on, as a short text: the weights, the settings, the way of answering."""
    parts = {"files": {file: digest for file, digest in meta["files"].items() if file.startswith("model_")}, "tokenizer": meta["tokenizer"],
             "settings": asdict(settings), "mode": settings.mode or task.eval_type, "task": task.name, "split": task.split}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Shown

class Bar:
    """How far rank 0's share of a task has come: a moving bar in a terminal, a line for every tenth in a log."""

    def __init__(self, title, compute):
        self.title, self.is_shown, self.said = title, compute.is_master, {}
        self.is_live = self.is_shown and Console().is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, disable=not self.is_live)
        self.tasks = {}

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *exception):
        self.progress.stop()

    def update(self, what, done, total):
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(f"{self.title}: {what}", total=total)
        self.progress.update(self.tasks[what], completed=done)
        tenth = 10 * done // total
        if self.is_shown and not self.is_live and tenth > self.said.get(what, 0):
            self.said[what] = tenth
            print0(f"{self.title}: {done} of {total} {what}")


def show_comparison(result):
    print0(f"A {result['a']}: {percent(result['accuracy_a'])}\nB {result['b']}: {percent(result['accuracy_b'])}")
    if result["n"] < max(result["problems_a"], result["problems_b"]):
        print0(f"only the {result['n']} problems in both are compared; A has {result['problems_a']}, B has {result['problems_b']}")
    print0(f"A is better on {result['only_a']} problems, B on {result['only_b']}\n{result['verdict']}")
    add_section(f"compare_{result['a']}_{result['b']}", f"A is `{result['a']}`, B is `{result['b']}`: {result['verdict']}.", result)
    return result


def samples(records):
    """The first problems in the form that the report shows."""
    shown = []
    for record in records[:MAX_SAMPLES]:
        read = record.get("no_reasoning")
        said = record["completions"][0] if "completions" in record else {"text": f"Answer: {read['answer']}", **read}
        shown.append({"question": record["prompt"], "completion": said["text"], "gold": record["gold"], "predicted": said["answer"],
                      "correct": said.get("correct", said["answer"] == record["gold"])})
    return shown


def mean_centred(summaries, is_whole):
    """ChatCORE: the mean of (accuracy - random) / (1 - random). Over other than its seven whole tasks it bears another name."""
    values = [centred(summary["metrics"]["accuracy"], summary["metrics"]["random_accuracy"]) for summary in summaries]
    complete = is_whole and sorted(summary["task"] for summary in summaries) == sorted(CHATCORE)
    return {"name": "ChatCORE" if complete else f"mean of {len(values)} centred accuracies (ChatCORE needs all of its {len(CHATCORE)} tasks)",
            "value": sum(values) / len(values)}


COLUMNS = ("task", "n", "accuracy", "95 % interval", "best constant", "random", "no reasoning", "unreadable", "tokens", "pass@k", "maj@k")


def row(summary):
    metrics, constant = summary["metrics"], summary["metrics"]["best_constant"]
    largest = [next(reversed(metrics.get(name, {}).items()), None) for name in ("pass@k", "maj@k")]

    def known(value):
        return "-" if value is None else percent(value)

    return (f"{summary['task']} {summary['split']}", str(summary["n"]), percent(metrics["accuracy"]),
            f"{100 * metrics['ci_low']:.1f} – {100 * metrics['ci_high']:.1f}", f"{constant['letter']} {percent(constant['share'])}" if constant else "-",
            percent(metrics["random_accuracy"]), known(metrics["no_reasoning"]), known(metrics["parse_failures"]),
            "-" if metrics["mean_tokens"] is None else f"{metrics['mean_tokens']:.0f}", *(f"{k[0]}: {percent(k[1])}" if k else "-" for k in largest))


def details(summary):
    """Lines about letters, controls, samples and groups, for the tasks that have them."""
    metrics, lines = summary["metrics"], []
    if "too_long" in metrics:
        lines.append(f"{metrics['too_long']} of {summary['n']} prompts do not fit the model's context and count as wrong")
    if "letters_pred" in metrics:
        lines.append("letters given " + " ".join(f"{letter}:{count}" for letter, count in metrics["letters_pred"].items())
                     + ", right " + " ".join(f"{letter}:{count}" for letter, count in metrics["letters_gold"].items()))
        letter, count = max(metrics["letters_pred"].items(), key=lambda item: item[1])
        share = count / sum(metrics["letters_pred"].values())
        if letter != "none" and share > COLLAPSED:
            lines.append(f"the answer is {letter} in {percent(share)} of cases, whatever the question: the model has collapsed to one letter")
    if "confusion" in metrics:
        lines.append("right letter: letters given  " + "; ".join(f"{right}: " + " ".join(f"{given}:{count}" for given, count in row.items())
                                                                 for right, row in metrics["confusion"].items()))
    for name, words in (("generative", "written answers score"), ("categorical", 'the likeliest letter after "Answer:", without reasoning, scores')):
        if name in metrics:
            lines.append(f"{words} {said(metrics[name])}")
    if "tool_use" in metrics:
        lines.append(f"the calculator answered in {percent(metrics['tool_use'])} of the completions")
    if "after_reasoning" in metrics:
        lines.append(f"letter read after its own reasoning {percent(metrics['after_reasoning'])}, before it {percent(metrics['no_reasoning'])}")
    if "question_blind" in metrics:
        lines.append(f"on {metrics['controlled']} problems, options without the question {said(metrics['question_blind'])}; "
                     f"by shift of the options {', '.join(map(percent, metrics['shift_accuracy']))}; "
                     f"two orders choose the same option in {percent(metrics['shift_agreement'])} of cases")
    for name in ("pass@k", "maj@k"):
        if name in metrics:
            lines.append(f"{name} " + ", ".join(f"{k}: {percent(value)} ± {100 * Z * metrics[f'{name}_error'][k]:.1f}" for k, value in metrics[name].items()))
    for name in GROUPS:
        groups = metrics.get(f"by_{name}", {})
        if groups:
            lines.append(f"by {name} " + "; ".join(f"{key}: {said(group)} of {group['n']}" for key, group in groups.items()))
    return lines


def said(accuracy):
    return f"{percent(accuracy['accuracy'])} [{percent(accuracy['ci_low'])}, {percent(accuracy['ci_high'])}]"


def show(summaries, chatcore):
    table = Table(title=f"{summaries[0]['stage']} {summaries[0]['model_tag']} at step {summaries[0]['step']}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "task" else "right")
    for summary in summaries:
        table.add_row(*row(summary))
    Console(width=None if Console().is_terminal else 160).print(table)
    for summary in summaries:
        print0(f"{summary['task']}: {summary['verdict']}", *details(summary), sep="\n    ")
    print0(f"{chatcore['name']}: {chatcore['value']:.4f}")


def markdown(summaries, chatcore):
    lines = [f"Step {summaries[0]['step']} of `{summaries[0]['model_tag']}`, {summaries[0]['settings']['num_samples']} answers per problem at temperature "
             f"{summaries[0]['settings']['temperature']}, at most {summaries[0]['settings']['max_new_tokens']} tokens.", ""]
    for summary in summaries:
        lines += [f"- **{summary['task']} {summary['split']}**: {summary['verdict']}."] + [f"  - {line}" for line in details(summary)]
    return "\n".join([*lines, "", f"{chatcore['name']}: {chatcore['value']:.4f}"])


if __name__ == "__main__":
    main(parse(Config))
