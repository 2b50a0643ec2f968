"""Accuracy of a chat checkpoint on any registered task, beside what answers without understanding would score.

    python -m scripts.chat_eval -i rl -a AQUA
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft -a "AQUA|GSM8K" -n 16 -t 1.0
    python -m scripts.chat_eval --compare sft_d8_AQUA rl_d8_AQUA          # is B better than A, or is it noise?

Writes <base_dir>/eval/{stage}_{model_tag}_{task}.json and every answer beside it. An interrupted evaluation goes on where it was.
"""
import hashlib
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanochat.checkpoint_manager import FOLDERS, load_model
from nanochat.common import base_dir, compute_cleanup, compute_init, print0, write_atomic
from nanochat.configurator import parse
from nanochat.engine import Engine
from nanochat.report import add_section
from tasks.common import get_task, load_jsonl, message_text
from tasks.evaluation import Settings, evaluate
from tasks.metrics import score, summarize
from tasks.statistics import centred, compare, percent, verdict

CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "AQUA")
DEFAULT_SPLITS = {"AQUA": "validation", "ALGEBRA": "validation"}  # their test split is for the final number only; others: test
DATA_FOLDERS = ("aqua", "arc", "mmlu", "gsm8k", "humaneval")  # what a task's name begins with, and its folder under --data-dir
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
    mode: str = ""                      # generative or categorical ("" = as each task says)
    seed: int = 42                      # of every draw
    data_dir: str | None = None         # folder of local data: the task's own, or one with aqua/, arc/, mmlu/, gsm8k/, humaneval/ in it
    controls: bool = False              # multiple choice: also without the question, and in every cyclic order of the options
    compare: tuple[str, str] | None = None  # two evaluations, as files or as names under <base_dir>/eval: is the second better?


def main(config):
    if config.compare:
        return compare_files(*map(find_answers, config.compare))
    compute = compute_init(config.device_type, config.dtype)
    settings = Settings(config.mode, config.temperature, config.top_k or None, config.num_samples, config.max_new_tokens, config.seed,
                        controls=config.controls)
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
        if task.split != DEFAULT_SPLITS.get(task.name, "test"):
            name += f"_{task.split}"                    # two splits are two results
        answers = Answers(base_dir() / "eval" / name, checkpoint_key(meta, task, settings), compute)
        records = evaluate(task, engine, tokenizer, compute, settings, answers.known, answers.keep, config.batch_size)
        answers.close(records)
        metrics = summarize(records, task.random_accuracy)
        summary = {"stage": config.source, "model_tag": meta["model_tag"], "step": meta["step"], "task": task.name, "split": task.split,
                   "n": len(records), "metrics": metrics, "verdict": verdict(metrics), "time": time.time(), "seconds": time.time() - started,
                   "settings": {**asdict(settings), "mode": settings.mode or task.eval_type}, "samples": samples(records)}
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
        split = config.split or DEFAULT_SPLITS.get(name.upper(), "test")
        try:
            tasks.append(load_task(name, split, config))
        except (ValueError, OSError, RuntimeError) as error:  # no such file, no network, no sandbox
            if config.task_name:
                raise
            print0(f"{name} is left out: {error}")
    if not tasks:
        raise ValueError(f"there is no data for any of the {len(names)} tasks {', '.join(names)}: give --data-dir, or name a task by -a")
    return tasks


def load_task(name, split, config):
    arguments = {"split": split, "stop": config.max_problems}
    folder = name.lower().partition("-")[0]
    if config.data_dir and folder in DATA_FOLDERS:      # the others make their problems themselves
        own = Path(config.data_dir).expanduser() / folder
        arguments["data_dir"] = own if own.is_dir() else config.data_dir
    task = get_task(name, **arguments)
    task.split = split
    if len(task) == 0:
        raise ValueError(f"{name} {split} has 0 problems: check --max-problems={config.max_problems}")
    reference = message_text(task[0]["messages"][-1])   # before hours of writing: can this task be judged here at all?
    if not task.is_correct(task[0], reference) or task.is_correct(task[0], ""):
        raise ValueError(f"{name} {split} does not accept its own reference answer to problem 0, or accepts an empty one "
                         f"({reference[-80:]!r}): mend its data")
    return task


def checkpoint_key(meta, task, settings):
    """What an answer depends on, as a short text: the weights, the settings, the way of answering."""
    parts = {"files": {file: digest for file, digest in meta["files"].items() if file.startswith("model_")}, "tokenizer": meta["tokenizer"],
             "settings": asdict(settings), "mode": settings.mode or task.eval_type, "task": task.name, "split": task.split}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Answers on disk

class Answers:
    """{path}_answers.jsonl, one problem a line, and beside it, while an evaluation runs, each rank's file of the answers so far.

    A line counts as known if it bears this evaluation's key, whichever rank wrote it; of two about one problem the later counts."""

    def __init__(self, path, key, compute):
        self.path, self.key, self.compute = path, key, compute
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known = {}
        for file in (self.final, *sorted(self.partials())):
            for record in read_lines(file):
                if record.pop("key", None) == key:
                    self.known[record["index"]] = {**self.known.get(record["index"], {}), **record}
        compute.barrier()                               # all have read before any writes
        self.file = open(path.with_name(f"{path.name}_answers.rank{compute.rank}.partial"), "a", encoding="utf-8")

    @property
    def final(self):
        return self.path.with_name(f"{self.path.name}_answers.jsonl")

    def partials(self):
        return self.path.parent.glob(f"{self.path.name}_answers.rank*.partial")

    def keep(self, record):
        # the newline stands first as well: a line torn by a kill must not swallow the next one
        self.file.write(f"\n{json.dumps({**record, 'key': self.key}, ensure_ascii=False)}\n")
        self.file.flush()

    def close(self, records):
        """All records into the final file; the ranks' files are no longer needed."""
        self.file.close()
        self.compute.barrier()
        if self.compute.is_master:
            write_atomic(self.final, "".join(json.dumps({**record, "key": self.key}, ensure_ascii=False) + "\n" for record in records))
            for file in self.partials():
                file.unlink()
        self.compute.barrier()


def read_lines(path):
    """The records of an answers file, without lines that a kill has torn."""
    if not path.is_file():
        return
    yield from (record for record in load_jsonl(path, skipped=Counter()) if isinstance(record.get("index"), int))


def find_answers(name):
    """A file, or the name of an evaluation (sft_d8_AQUA) -> the path of its answers."""
    for path in (Path(name).expanduser(), base_dir() / "eval" / name):
        stem = path.name.removesuffix("_answers.jsonl").removesuffix(".json")
        answers = path.with_name(f"{stem}_answers.jsonl")
        if answers.is_file():
            return answers
    there = sorted(path.name.removesuffix("_answers.jsonl") for path in (base_dir() / "eval").glob("*_answers.jsonl"))
    raise ValueError(f"{name} is neither a file of answers nor one of the {len(there)} evaluations under {base_dir() / 'eval'}: "
                     f"{', '.join(there) or 'run chat_eval first'}")


def compare_files(path_a, path_b):
    """Two evaluations of the same problems -> the paired tests, printed in words."""
    runs = [{(record["index"], record["prompt"]): record for record in read_lines(path)} for path in (path_a, path_b)]
    shared = sorted(runs[0].keys() & runs[1].keys())
    if not shared:
        raise ValueError(f"{path_a.name} ({len(runs[0])} problems) and {path_b.name} ({len(runs[1])} problems) have 0 problems in common: "
                         "compare evaluations of the same task, split and order")
    result = compare([score(runs[0][key]) for key in shared], [score(runs[1][key]) for key in shared])
    print0(f"A {path_a.name}: {percent(result['accuracy_a'])}\nB {path_b.name}: {percent(result['accuracy_b'])}")
    if len(shared) < max(map(len, runs)):
        print0(f"only the {len(shared)} problems in both are compared; A has {len(runs[0])}, B has {len(runs[1])}")
    print0(f"A is better on {result['only_a']} problems, B on {result['only_b']}\n{result['verdict']}")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Shown

def samples(records):
    """The first problems in the form that the report shows."""
    shown = []
    for record in records[:MAX_SAMPLES]:
        read = record.get("no_reasoning", {})
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
    """Lines about letters and controls, for the tasks that have them."""
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
    if "after_reasoning" in metrics:
        lines.append(f"letter read after its own reasoning {percent(metrics['after_reasoning'])}, before it {percent(metrics['no_reasoning'])}")
    if "question_blind" in metrics:
        blind = metrics["question_blind"]
        lines.append(f"options without the question {percent(blind['accuracy'])} [{percent(blind['ci_low'])}, {percent(blind['ci_high'])}]; "
                     f"by shift of the options {', '.join(map(percent, metrics['shift_accuracy']))}; "
                     f"two orders choose the same option in {percent(metrics['shift_agreement'])} of cases")
    return lines


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
