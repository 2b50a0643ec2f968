"""Does a training mixture hold evaluation questions? Its rows are compared with every evaluation split that can be loaded.

    python -m scripts.contamination --recipe=offline                       # the SFT mixture of the embedded default
    python -m scripts.contamination --stage=mid --recipe=default --eval-data-dir=data
    python -m scripts.contamination --stage=base && torchrun ... -m scripts.base_train

Writes <base_dir>/contamination/{stage}_{recipe}.json and a section of the report. Exit status 1 if a question was found by one of
--fail-on, 0 if none was; a mixture that cannot be read is an error. tasks/contamination.py says what is compared.
"""
import json
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nanochat.common import base_dir, print0, write_atomic
from nanochat.configurator import config_dict, parse
from nanochat.data_recipes import MID, SFT, chat_recipe, recipe
from nanochat.dataset import iter_documents, list_shards
from nanochat.report import add_section
from tasks.common import get_task
from tasks.contamination import MEASURES, HeldOut, training_texts
from tasks.evaluation_sets import HELD_OUT, load_evaluation

SAY_EVERY = 50_000                                      # rows between lines of progress


@dataclass(frozen=True)
class Config:
    """Look for evaluation questions in a training mixture."""
    stage: str = "sft"                  # base (documents), mid, sft (recipes), or rl (the train split of --task)
    recipe: str = "default"             # [-r] mixture from nanochat/data_recipes.py
    task: str = "AQUA"                  # the task that RL trains on
    against: str | None = None          # [-a] evaluation tasks, "|" between them (None = all that can be loaded)
    eval_data_dir: str | None = None    # folder of local evaluation data: aqua/, arc/, mmlu/, ... in it (None = as the tasks find it)
    fail_on: tuple[str, ...] = ("exact", "normalised")  # measures by which one question found makes the exit status 1
    max_rows: int = -1                  # training rows or documents to look at (-1 = all)
    # What the recipes' {placeholders} stand for, with the defaults of scripts.chat_sft and scripts.mid_train
    data_dir: str | None = None         # folder of the AQuA splits to train on (None = NANOCHAT_AQUA_DIR, AQUA_DATA_DIR, the base directory, the Hub)
    aqua_train_examples: int = -1       # rows of AQuA's train split (-1 = all)
    ot_dataset: str = "open-thoughts/OpenThoughts3-1.2M"  # OpenThoughts on the Hub
    ot_path: str | None = None          # OpenThoughts as a local JSON-lines file instead
    ot_split: str = "train"             # split of OpenThoughts
    ot_stop: int | None = None          # rows of OpenThoughts (None = the recipe's)
    gsm8k_stop: int = -1                # rows of GSM8K
    rs_cot_path: str | None = None      # what scripts.rs_generate wrote (None = rs_cot.jsonl in the base directory)
    rs_cot_stop: int = 100_000          # rows of it
    dolci_path: str | None = None       # what scripts.prepare_dolci_think wrote (None = dolci_think_800k.jsonl in the base directory)
    dolci_stop: int = 500_000           # rows of Dolci-Think
    dolci_streaming: bool = False       # dolci_hf: read no more of the data set than dolci_stop rows
    dolci_stream_cache: str | None = None  # the file that keeps them (None = dolci_stream/ in the base directory)
    chat_ratio: float = 0.30            # share of conversation in the whole mixture
    chat_ot_answer_ratio: float = 0.10  # r1_rs_sft: share of OpenThoughts without traces in that conversation
    chat_ot_trace_ratio: float = 0.05   # r1_rs_sft: share of OpenThoughts with traces


def main(config):
    unknown = [measure for measure in config.fail_on if measure not in MEASURES]
    if unknown or config.stage not in ("base", "mid", "sft", "rl"):
        raise ValueError(f"stage={config.stage!r} must be base, mid, sft or rl, and fail_on={config.fail_on} may hold {', '.join(MEASURES)}: mend what differs")
    name = {"base": "base", "rl": f"rl_{config.task}"}.get(config.stage, f"{config.stage}_{config.recipe}")
    entries = training_entries(config)                  # before the evaluation data: a wrong recipe is told at once
    splits, left_out = evaluation_questions(config)
    held_out = HeldOut(splits)
    print0(f"{sum(held_out.sizes.values()):,} questions of {len(splits)} evaluation splits are looked for in {name}")

    # The rows stream by; the index of the questions is all that is held in memory
    started, sources = time.time(), {}
    for source, questions, text in training_rows(config, entries):
        if held_out.seen == config.max_rows:
            break
        held_out.see(questions, text)
        sources[source] = sources.get(source, 0) + 1
        if held_out.seen % SAY_EVERY == 0:
            print0(f"{held_out.seen:,} rows in {time.time() - started:.0f} s")
    if not held_out.seen:
        raise ValueError(f"{name} has 0 training rows to look at: check --max-rows={config.max_rows} and the data")

    found = held_out.report()
    failed = {split: sum(facts[measure] for measure in config.fail_on) for split, facts in found.items() if any(facts[measure] for measure in config.fail_on)}
    report = {"name": name, "stage": config.stage, "recipe": config.recipe, "rows": held_out.seen, "sources": sources, "seconds": round(time.time() - started, 1),
              "fail_on": list(config.fail_on), "contaminated": bool(failed), "splits": found, "left_out": left_out}
    report["verdict"] = verdict(report, failed)
    write_atomic(base_dir() / "contamination" / f"{name}.json", json.dumps(report, indent=1, ensure_ascii=False))
    add_section(f"contamination_{name}", markdown(report), {"contaminated": report["contaminated"], "rows": report["rows"]})
    show(report)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The two sides

def evaluation_questions(config):
    """-> ({"AQUA validation": questions, ...}, {what could not be loaded: why})."""
    splits, left_out = {}, {}
    for name in config.against.split("|") if config.against else HELD_OUT:
        for split in HELD_OUT.get(name, ("test",)):
            try:
                task = load_evaluation(name, split, config.eval_data_dir)
            except (ValueError, OSError, RuntimeError) as error:
                left_out[f"{name} {split}"] = str(error).partition(":")[0][:200]
                continue
            splits[f"{name} {split}"] = [task.question(conversation) for conversation in task]
    if not splits:
        raise ValueError(f"none of the {len(left_out)} evaluation splits can be loaded ({left_out}): give --eval-data-dir, or go online")
    return splits, left_out


def training_entries(config):
    """The mixture as (task name, arguments) with its tasks built; for base the shards."""
    if config.stage == "base":
        return list_shards("train", config.data_dir)
    if config.stage == "rl":
        entries = [(config.task, {"split": "train"}, 1)]
        return build(entries, config)
    values = {**config_dict(config), "base_dir": base_dir(), "rs_cot_path": config.rs_cot_path or base_dir() / "rs_cot.jsonl",
              "dolci_path": config.dolci_path or base_dir() / "dolci_think_800k.jsonl"}
    tasks = build(recipe(MID if config.stage == "mid" else SFT, config.recipe, **values), config)
    if config.stage == "sft":
        tasks += build(chat_recipe(config.recipe, sum(len(task) * epochs for task, epochs in tasks), **values), config)
    return tasks


def build(entries, config):
    extra = {"data_dir": config.data_dir} if config.data_dir else {}
    return [(get_task(name, **{**arguments, **(extra if name == "AQUA" else {})}), epochs) for name, arguments, epochs in entries]


def training_rows(config, entries):
    """(source, what the row asks, all its text) of each training row, one at a time; a row repeated over epochs counts once."""
    if config.stage == "base":
        yield from (("documents", [], text) for text in iter_documents(entries))
        return
    for task, _ in entries:
        for conversation in task:
            yield task.name, *training_texts(task, conversation)


# ---------------------------------------------------------------------------------------------------------------------
# Shown

def verdict(report, failed):
    rows = f"{report['rows']:,} training rows of {report['name']}"
    if failed:
        worst = ", ".join(f"{split} ({count})" for split, count in failed.items())
        return f"CONTAMINATED: {rows} hold evaluation questions of {worst} by {' or '.join(report['fail_on'])} comparison; leave them out of the training data"
    return f"clean: none of the questions is in the {rows} by {' or '.join(report['fail_on'])} comparison; the looser measures are for reading"


def table_rows(report):
    for split, facts in report["splits"].items():
        yield split, f"{facts['questions']:,}", *(f"{facts[name]:,}" + (f" ({facts['train_rows'][name]:,} rows)" if facts[name] else "") for name in MEASURES)


def show(report):
    table = Table(title=f"Evaluation questions found in {report['name']}")
    for column in ("split", "questions", *MEASURES):
        table.add_column(column, justify="left" if column == "split" else "right")
    for row in table_rows(report):
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 160).print(table)
    for split, reason in report["left_out"].items():
        print0(f"{split} is left out: {reason}")
    print0(report["verdict"])


def markdown(report):
    lines = [f"{report['verdict']}.", "", "| split | questions | " + " | ".join(MEASURES) + " |", "| --- | ---: |" + " ---: |" * len(MEASURES)]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(report)]
    for split, facts in report["splits"].items():
        for measure in report["fail_on"]:
            lines += [f"- {split}, {measure}: {' '.join(pair['held_out'].split())[:200]!r}" for pair in facts["examples"].get(measure, [])[:2]]
    return "\n".join([*lines, "", *(f"- {split} was left out: {reason}" for split, reason in report["left_out"].items())])


if __name__ == "__main__":
    sys.exit(1 if main(parse(Config))["contaminated"] else 0)
