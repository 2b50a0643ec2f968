"""Does the reasoning matter? Accuracy after the model's own rationale, parts of it, none, and another problem's; agreement under permuted options.

    python -m scripts.reasoning_eval -i rl -a AQUA --split=test
    torchrun --standalone --nproc_per_node=8 -m scripts.reasoning_eval -- -i rl -a "AQUA|ARC-Easy"

Writes <base_dir>/reasoning/{stage}_{model_tag}_{task}_{split}.json, every answer beside it as JSONL, and a section of the report.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanochat.checkpoint_manager import load_model
from nanochat.common import base_dir, print0, write_atomic
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import config_dict, parse
from nanochat.engine import Engine
from nanochat.report import add_section, markdown_table
from tasks.common import get_task
from tasks.reasoning_controls import HEAD, answer_under_controls, summarize_controls, table_rows, verdict


@dataclass(frozen=True)
class Config:
    """Does a chat checkpoint's reasoning carry its answers?"""
    source: str = "rl"                  # [-i] stage of the checkpoint: mid, sft or rl
    task_name: str = "AQUA"             # [-a] multiple-choice tasks, "|" between them
    model_tag: str | None = None        # [-g] folder of the checkpoint (None = the one saved last)
    step: int | None = None             # [-s] step of the checkpoint (None = the newest)
    split: str = "validation"           # split of the tasks
    data_dir: str | None = None         # folder of the task's splits (None = where the task looks by itself)
    max_problems: int = -1              # [-x] problems per task (-1 = all)
    max_new_tokens: int = 256           # [-m] longest completion
    batch_size: int = 64                # [-b] rows per rank in flight; does not change what is measured
    orders: bool = True                 # also every cyclic order of the options, and the options without the question
    seed: int = 42                      # decides whose rationale "another's" is
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                     # [-d] float32 or bfloat16 ("" = bfloat16 where the hardware has it)


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    tasks = [get_task(name.strip(), split=config.split, **({"data_dir": config.data_dir} if config.data_dir else {})) for name in config.task_name.split("|")]
    for task in tasks:
        if "letters" not in task[0]:
            raise ValueError(f"{task.name} has no letters to force: this needs a multiple-choice task, such as AQUA, ALGEBRA, ARC-Easy or MMLU")
    model, tokenizer, meta = load_model(config.source, compute, "eval", config.model_tag, config.step)
    engine = Engine(model, tokenizer, max_rows=config.batch_size)

    summaries = []
    for task in tasks:
        began = time.time()
        records = answer_under_controls(task, engine, tokenizer, compute, config.max_new_tokens, config.seed, config.orders, config.batch_size, config.max_problems)
        metrics = summarize_controls(records, task.random_accuracy)
        summary = {"stage": config.source, "model_tag": meta["model_tag"], "step": meta["step"], "task": task.name, "split": config.split, "n": len(records),
                   "metrics": metrics, "verdict": verdict(metrics), "time": time.time(), "seconds": time.time() - began, "config": config_dict(config)}
        summaries.append(summary)
        if compute.is_master:
            path = base_dir() / "reasoning" / f"{config.source}_{meta['model_tag']}_{task.name}_{config.split}"
            write_atomic(Path(f"{path}_answers.jsonl"), "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            write_atomic(Path(f"{path}.json"), json.dumps(summary, indent=1, ensure_ascii=False))
            show(summary)
            print0(f"{path}.json and its answers written after {summary['seconds']:.0f} s")
    if compute.is_master:
        add_section(f"reasoning_{config.source}", "\n\n".join(map(markdown, summaries)), {
            f"{summary['task']} {summary['split']}, {name}": found["accuracy"] for summary in summaries for name, found in summary["metrics"]["conditions"].items()})
    compute_cleanup()
    return summaries


def heading(summary):
    return f"{summary['stage']} {summary['model_tag']} at step {summary['step']} on {summary['n']} problems of {summary['task']} {summary['split']}"


def remarks(summary):
    """The verdict, and what the table's numbers rest on."""
    metrics = summary["metrics"]
    lines = [f"{sentence}." for sentence in summary["verdict"]]
    if metrics["without_rationale"]:
        lines.append(f"For {metrics['without_rationale']} of {metrics['n']} problems the model wrote no rationale; there all of its own conditions are `none`.")
    return lines


def show(summary):
    table = Table(title=heading(summary))
    for column in HEAD:
        table.add_column(column, justify="left" if column == HEAD[0] else "right")
    for row in table_rows(summary["metrics"]):
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 140).print(table)
    print0(*remarks(summary), sep="\n")


def markdown(summary):
    return "\n".join([f"Does the reasoning matter? {heading(summary)}, greedy, letters read after a forced \"Answer:\".", "",
                      *markdown_table(HEAD, table_rows(summary["metrics"])), "", *(f"- {line}" for line in remarks(summary))])


if __name__ == "__main__":
    main(parse(Config))
