"""CORE of a base checkpoint, ours or a Hugging Face one, each task beside what answers that do not read would score.

    python -m scripts.base_eval -g d8
    python -m scripts.base_eval --hf-path=models/gpt2 --max-per-task=200
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- -g d20

Writes <base_dir>/base_eval/{name}.json, a .csv, and every item as {name}_items.jsonl. An interrupted evaluation goes on where it was.
Bits per byte are scripts.base_loss's.
"""
import csv
import hashlib
import io
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nanochat.checkpoint_manager import load_model
from nanochat.common import base_dir, print0, write_atomic
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import parse
from nanochat.core_bundle import find_bundle, load_bundle
from nanochat.core_eval import choose_items, core_score, evaluate_task, task_numbers
from nanochat.hf_model import HFScorer, folder_fingerprint, load_hf
from nanochat.likelihood import GPTScorer
from nanochat.report import add_section
from nanochat.statistics import Z, mcnemar, percent, verdict, wilson_interval
from tasks.common import load_jsonl

BATCH_TOKENS = {"cuda": 65536}                          # of one pass; on other devices what stays near the caches


@dataclass(frozen=True)
class Config:
    """CORE of a base checkpoint: 22 few-shot tasks scored by likelihood, centred so that guessing scores 0."""
    source: str = "base"              # [-i] stage of the checkpoint: base, mid, sft or rl
    model_tag: str | None = None      # [-g] folder of the checkpoint (None = the one saved last)
    step: int | None = None           # [-s] step of the checkpoint (None = the newest)
    hf_path: str | None = None        # evaluate this Hugging Face folder (or name on the Hub) instead
    hf_bos: bool | None = None        # a BOS token in front of each prompt (None = as its tokenizer does; always for a NanoChat)
    tasks: str | None = None          # [-a] labels of core.yaml, "|" between them (None = all)
    max_per_task: int = -1            # [-x] items per task, drawn by the seed (-1 = all)
    bundle: str | None = None         # folder, zip, URL or hub:NAME of the tasks (None = eval_bundle in the base directory, fetched if missing)
    bundle_sha256: str = ""           # of the zip, checked if given
    example_delimiter: str | None = None  # between the examples of a prompt (None = as core.yaml says, else a line break)
    seed: int = 1234                  # of the examples shown and of the items drawn
    dtype: str = ""                   # [-d] float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    device_type: str = ""             # cuda, mps or cpu ("" = the best there is)
    batch_tokens: int = -1            # tokens in one pass (-1 = 65536 on a GPU, 4096 elsewhere); does not change what is measured


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    if config.max_per_task == 0 or config.batch_tokens == 0:
        raise ValueError(f"max_per_task={config.max_per_task} and batch_tokens={config.batch_tokens}: neither may be 0; -1 is all, or the default")
    tasks = load_tasks(config, compute)
    scorer, model = load_scorer(config, compute)
    batch_tokens = config.batch_tokens if config.batch_tokens > 0 else BATCH_TOKENS.get(compute.device.type, 4096)
    keys = {task.label: item_key(task, model, scorer, config, compute) for task in tasks}
    log = ItemLog(base_dir() / "base_eval" / model["name"], keys, compute)

    started, numbers, all_records = time.time(), {}, []
    total = sum(len(choose_items(task, config.max_per_task, config.seed)) for task in tasks)
    with Progress(disable=not (compute.is_master and Console().is_terminal)) as progress:
        bar = progress.add_task(model["name"], total=total)
        for task in tasks:
            begun, known = time.time(), log.known[task.label]

            def keep(record):
                log.keep(record)
                progress.advance(bar, compute.world_size)

            records = evaluate_task(task, scorer, compute, config.max_per_task, config.seed, batch_tokens, known, keep)
            numbers[task.label] = judge(task, records)
            all_records += records
            progress.update(bar, completed=len(all_records))
            print0(f"{task.label}: {percent(numbers[task.label]['accuracy'])} of {len(records)} items in {time.time() - begun:.1f} s")
    log.close(all_records)

    core = core_verdict(core_score(numbers, is_whole=config.max_per_task < 0), numbers)
    summary = {**model, "core": core, "tasks": numbers, "settings": asdict(config), "dtype": str(compute.dtype).removeprefix("torch."),
               "bundle": {task.label: task.digest for task in tasks}, "seconds": time.time() - started, "time": time.time()}
    if compute.is_master:
        folder = base_dir() / "base_eval"
        write_atomic(folder / f"{model['name']}.json", json.dumps(summary, indent=1, ensure_ascii=False))
        write_atomic(folder / f"{model['name']}.csv", as_csv(summary))
        show(summary)
        add_section("base_eval", markdown(summary), {core["name"]: core["value"], "ci_low": core["ci_low"], "ci_high": core["ci_high"],
                                                     **{label: one["accuracy"] for label, one in numbers.items()}})
    compute.barrier()
    compute_cleanup()
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated

def load_tasks(config, compute):
    if compute.is_master:
        find_bundle(config.bundle, config.bundle_sha256)  # one rank fetches
    compute.barrier()
    labels = None if config.tasks is None else [label.strip() for label in config.tasks.split("|")]
    tasks = load_bundle(find_bundle(config.bundle, config.bundle_sha256), labels)
    return tasks if config.example_delimiter is None else [replace(task, example_delimiter=config.example_delimiter) for task in tasks]


def load_scorer(config, compute):
    """-> (scorer, what the model is called: its name among the results, and what its scores depend on)."""
    if config.hf_path:
        model, tokenizer = load_hf(config.hf_path, compute)
        scorer, name = HFScorer(model, tokenizer, config.hf_bos), Path(config.hf_path).name or Path(config.hf_path).resolve().name
        return scorer, {"name": f"hf_{name}", "stage": "hf", "model_tag": name, "step": None, "weights": folder_fingerprint(config.hf_path)}
    model, tokenizer, meta = load_model(config.source, compute, "eval", config.model_tag, config.step)
    weights = next(digest for name, digest in meta["files"].items() if name.startswith("model_"))
    return GPTScorer(model, tokenizer), {"name": f"{config.source}_{meta['model_tag']}_{meta['step']:06d}", "stage": config.source,
                                         "model_tag": meta["model_tag"], "step": meta["step"], "weights": f"{weights} {meta['tokenizer']}"}


def item_key(task, model, scorer, config, compute):
    """All that an item's record depends on, as a short text."""
    parts = {"weights": model["weights"], "bos": [scorer.bos, scorer.start], "dtype": str(compute.dtype), "seed": config.seed,
             "task": [getattr(task, name) for name in ("label", "kind", "num_fewshot", "digest", "continuation_delimiter", "example_delimiter", "prompt_string")]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class ItemLog:
    """{path}_items.jsonl, one item a line, and beside it, while an evaluation runs, each rank's file of the items so far.

    A line counts as known if it bears its task's key, whichever rank wrote it."""

    def __init__(self, path, keys, compute):
        self.path, self.keys, self.compute = path, keys, compute
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known = {label: {} for label in keys}
        for file in (self.final, *sorted(self.partials())):
            for record in load_jsonl(file, skipped=Counter()) if file.is_file() else ():  # a line that a kill has torn is skipped
                label = record.get("task")
                if record.pop("key", None) == keys.get(label, ""):
                    self.known[label][record["index"]] = record
        for part in compute.gather_objects(self.known):  # all have read before any writes, and all know the same, whatever disk they see
            for label, records in part.items():
                self.known[label] |= records
        self.file = open(path.with_name(f"{path.name}_items.rank{compute.rank}.partial"), "a", encoding="utf-8")

    @property
    def final(self):
        return self.path.with_name(f"{self.path.name}_items.jsonl")

    def partials(self):
        return self.path.parent.glob(f"{self.path.name}_items.rank*.partial")

    def line(self, record):
        return json.dumps({**record, "key": self.keys[record["task"]]}, ensure_ascii=False)

    def keep(self, record):
        self.file.write(f"\n{self.line(record)}\n")     # the first line break parts it from a torn line
        self.file.flush()

    def close(self, records):
        """All records into the final file; the ranks' files are no longer needed."""
        self.file.close()
        self.compute.barrier()
        if self.compute.is_master:
            write_atomic(self.final, "".join(self.line(record) + "\n" for record in records))
            for file in self.partials():
                file.unlink()
        self.compute.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# What it means

def judge(task, records):
    """core_eval's numbers of a task with their interval and a verdict in words."""
    numbers = task_numbers(task, records)
    numbers["ci_low"], numbers["ci_high"] = wilson_interval(sum(record["correct"] for record in records), len(records))
    said = verdict({**numbers, "random_accuracy": numbers["random_baseline"]})
    if numbers["blind"] is not None:
        p = numbers["p_against_blind"] = mcnemar([record["blind"] == record["gold"] for record in records], [record["correct"] for record in records])
        more = "more" if numbers["accuracy"] > numbers["blind"] else "less"
        said += f"; without its context {percent(numbers['blind'])}, " + (
            f"so reading it scores {more} beyond noise (p = {p:.2g})" if p <= 0.05 else f"which reading it does not change beyond noise (p = {p:.2g})")
    return {**numbers, "verdict": said}


def core_verdict(core, numbers):
    """The mean with a 95 % interval from the tasks' own errors, and whether it is above what not reading scores."""
    variance = 0.0
    for one in numbers.values():
        share, n = (one["accuracy"] * one["n"] + 2) / (one["n"] + 4), one["n"] + 4  # Agresti and Coull: 0 of 10 is no certainty
        variance += share * (1 - share) / n / (1 - one["random_baseline"]) ** 2
    half = Z * math.sqrt(variance) / len(numbers)
    low, high = core["value"] - half, core["value"] + half
    words = "above" if low > core["blind"] else "below" if high < core["blind"] else "not to be told from"
    said = (f"{core['name']} {core['value']:.4f} [{low:.4f}, {high:.4f}] is {words} {core['blind']:.4f}, "
            "the mean of the best answers that do not read (guessing, one constant answer, the choices without context)")
    return {**core, "ci_low": low, "ci_high": high, "verdict": said}


# ---------------------------------------------------------------------------------------------------------------------
# Shown

COLUMNS = ("task", "n", "accuracy", "95 % interval", "guessing", "constant", "no context", "cropped", "centred")


def row(label, one):
    return (label, str(one["n"]), percent(one["accuracy"]), f"{100 * one['ci_low']:.1f} – {100 * one['ci_high']:.1f}", percent(one["random_baseline"]),
            f"{percent(one['best_constant']['share'])} ({one['best_constant']['letter']})", "-" if one["blind"] is None else percent(one["blind"]),
            percent(one["cropped"]), f"{one['centred']:+.4f}")


def remarks(summary):
    """What a reader of the table must know."""
    lines, tasks = [], summary["tasks"]
    for label, one in tasks.items():
        if one["too_long"]:
            lines.append(f"{label}: {percent(one['too_long'])} of the items do not fit the model's context even without examples and count as wrong")
        if one.get("by_choices") is not None and abs(one["by_choices"] - one["random_baseline"]) > 0.02:
            lines.append(f"{label}: eval_meta_data.csv says guessing scores {percent(one['random_baseline'])}, its number of choices says {percent(one['by_choices'])}")
    cropped = [label for label, one in tasks.items() if one["cropped"] > 0]
    if cropped:
        lines.append(f"{len(cropped)} tasks have prompts longer than the model reads, whose beginning was dropped: {', '.join(cropped)}")
    return lines


def show(summary):
    table = Table(title=f"{summary['name']}, {summary['dtype']}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=column == "task")
    for label, one in summary["tasks"].items():
        table.add_row(*row(label, one))
    Console(width=None if Console().is_terminal else 160).print(table)
    for label, one in summary["tasks"].items():
        print0(f"{label}: {one['verdict']}")
    print0(*remarks(summary), summary["core"]["verdict"], sep="\n")


def as_csv(summary):
    """Task, accuracy and centred score first, as the field writes them; then what they are to be read with; the mean in the last line."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["Task", "Accuracy", "Centered", "CI low", "CI high", "Random baseline", "Best constant", "Context-blind", "Cropped", "N"])
    for label, one in summary["tasks"].items():
        values = [one[name] for name in ("accuracy", "centred", "ci_low", "ci_high", "random_baseline")]
        values += [one["best_constant"]["share"], one["blind"], one["cropped"]]
        lines.writerow([label, *("" if value is None else f"{value:.6f}" for value in values), one["n"]])
    core = summary["core"]
    lines.writerow(["CORE" if core["is_core"] else core["name"], "", f"{core['value']:.6f}", f"{core['ci_low']:.6f}", f"{core['ci_high']:.6f}"])
    return text.getvalue()


def markdown(summary):
    lines = [f"`{summary['name']}`: {summary['core']['verdict']}.", "", "| " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    for label, one in summary["tasks"].items():
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row(label, one)) + " |")
    lines += ["", *(f"- {label}: {one['verdict']}." for label, one in summary["tasks"].items()), *(f"- {line}." for line in remarks(summary))]
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse(Config))
