"""The report of a run: each stage adds a section, evaluations and logs add tables and curves; the sum is report.md and report.html,
with the answers to read beside them in answers.html.

    python -m nanochat.report reset                # forget the sections of earlier runs; logs and evaluations stay
    python -m nanochat.report generate             # write report.md, report.html, answers.html under base_dir()/report
    python -m nanochat.report summarize [RUN]      # the table of results in the terminal; RUN is a run's name or a model tag

What is missing is said in words. This file collects and writes text; `report_page` draws.
"""
import ctypes
import importlib.util
import json
import math
import platform
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from nanochat.common import base_dir, write_atomic
from nanochat.configurator import parse
from nanochat.run_logger import read_log
from nanochat.statistics import wilson_interval

SECTION_ORDER = ("tok_train", "tok_eval", "base", "base_loss", "base_eval", "mid", "sft", "rl")
STAGES = ("base", "mid", "sft", "rl")
COMMANDS = ("reset", "generate", "summarize")
COLUMNS = ("stage", "model", "task", "n", "accuracy", "95 % interval", "best constant", "random", "no reasoning", "unreadable", "tokens", "vs blind")
LEGEND = ("Blind answers are the better of the best constant letter and the task's random accuracy; a score is above them only if its whole "
          "interval is. No reasoning: the letter is read off before any reasoning. Unreadable: completions without an answer in the one form that counts. "
          "Tokens: the mean length of a completion.")


@dataclass(frozen=True)
class Config:
    """Collect what the stages left behind into one report."""
    run: str = ""               # only this run or model tag ("" = everything)
    copy_to: str = ""           # also copy report.md and report.html into this folder
    cost_per_hour: float = -1.0 # price of the machine, for the cost of the training time (-1 = not known)


def main(command, config):
    if command == "reset":
        reset()
        return
    report = collect(config)
    if command == "summarize":
        print(summary(report))
        return
    from nanochat.report_page import answers_page, html_page  # matplotlib: a second that the stages need not spend
    folder = report_dir()
    for row in report["evals"]:
        row["answers"] = read_answers(row, report["missing"])
    write_atomic(folder / "report.md", markdown_page(report))
    write_atomic(folder / "report.html", html_page(report))
    write_atomic(folder / "answers.html", answers_page(report))
    print(f"{folder / 'report.md'}, report.html and answers.html written")
    if config.copy_to:
        target = Path(config.copy_to)
        target.mkdir(parents=True, exist_ok=True)
        for name in ("report.md", "report.html", "answers.html"):
            shutil.copyfile(folder / name, target / name)
        print(f"copied to {target}")


def report_dir():
    folder = base_dir() / "report"
    folder.mkdir(exist_ok=True)
    return folder


def add_section(name, markdown, data=None):
    """Store a stage's section; a stage that runs again replaces its own. `data` is a JSON-able dict of its numbers."""
    if not name or "/" in name:
        raise ValueError(f"section name {name!r} must be a file name: use letters, digits, - and _")
    section = {"name": name, "markdown": markdown, "data": data or {}, "time": time.time()}
    write_atomic(report_dir() / f"{name}.json", json.dumps(section, indent=1, ensure_ascii=False, default=str))


def reset():
    """Remove sections and finished reports. Logs, evaluations and checkpoints are not ours to remove."""
    removed = [path for path in report_dir().iterdir() if path.suffix in (".json", ".md", ".html")]
    for path in removed:
        path.unlink()
    print(f"{report_dir()}: {len(removed)} files removed")


# -- collecting -------------------------------------------------------------------------------------------------------

def collect(config):
    """Everything on disk -> {"facts", "sections", "runs", "evals", "missing"}; unreadable files are named in "missing"."""
    missing = []
    sections = sorted(filter(None, (read_section(path, missing) for path in sorted(report_dir().glob("*.json")))), key=section_place)
    runs = sorted((run for path in sorted((base_dir() / "runs").glob("*.jsonl")) if (run := read_run(path, missing))), key=stage_place)
    evals = newest_of_each([read_eval(path, missing) for path in sorted((base_dir() / "eval").glob("*.json"))])
    if config.run:
        mine = [run for run in runs if config.run in (run["model_tag"], run["config"].get("run"))]
        tags = {run["model_tag"] for run in mine} | {config.run}
        chosen = [row for row in evals if row["model_tag"] in tags or row.get("run") == config.run]
        if mine or chosen:
            runs, evals = mine, chosen
        else:
            missing.append(f"No run and no model is called {config.run}; this is everything there is.")
    missing += [f"No log of stage {stage}." for stage in STAGES if not any(run["stage"] == stage for run in runs)]
    if not evals:
        missing.append("No evaluation: `python -m scripts.chat_eval` writes one.")
    if not sections:
        missing.append("No stage has added a section.")
    return {"facts": facts(runs, sections, config.cost_per_hour), "sections": sections, "runs": runs, "evals": evals, "missing": missing}


def read_json(path, missing):
    """A JSON object, or None and a line in `missing`: one torn file must not cost the whole report."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        missing.append(f"{path.name} cannot be read ({type(error).__name__}).")
        return None
    if not isinstance(value, dict):
        missing.append(f"{path.name} holds no JSON object.")
        return None
    return value


def read_section(path, missing):
    section = read_json(path, missing)
    if section is None:
        return None
    section = {"name": path.stem, "markdown": "", "time": 0.0, **section}
    return {**section, "data": section["data"] if isinstance(section.get("data"), dict) else {}}


def read_run(path, missing):
    """A log -> {"stage", "model_tag", "config", "records"}; its name tells what a lost header cannot."""
    records = read_log(path)
    headers = [record for record in records if "config" in record]
    if not headers:
        missing.append(f"{path.name} has no header line.")
    stage, _, tag = path.stem.partition("_")
    header = headers[-1] if headers else {}
    return {"stage": header.get("stage") or stage, "model_tag": header.get("model_tag") or tag, "config": header.get("config") or {},
            "records": [record for record in records if "step" in record]}


def read_eval(path, missing):
    """An evaluation's summary, with every key the report asks for; what it lacks is None."""
    row = read_json(path, missing)
    if row is None:
        return None
    metrics = row.get("metrics") if isinstance(row.get("metrics"), dict) else {}
    row = {"stage": "?", "model_tag": "?", "step": None, "task": path.stem, "split": None, "n": None, "settings": {}, "samples": [], **row}
    row["file"] = path.stem
    row["metrics"] = {name: metrics.get(name) for name in ("accuracy", "ci_low", "ci_high", "best_constant", "random_accuracy", "no_reasoning",
                                                            "parse_failures", "letters_pred", "letters_gold", "mean_tokens")} | metrics
    row["time"] = row.get("time") or path.stat().st_mtime
    metrics = row["metrics"]
    if is_number(metrics["accuracy"]) and 0 <= metrics["accuracy"] <= 1 and not is_number(metrics["ci_low"]) and is_number(row["n"]) and row["n"] > 0:
        metrics["ci_low"], metrics["ci_high"] = wilson_interval(metrics["accuracy"] * row["n"], row["n"])
    return row


def read_answers(row, missing):
    """The answers behind an evaluation, one record per problem; a file that does not hold what its summary counts is named and left out."""
    path = base_dir() / "eval" / f"{row['file']}_answers.jsonl"
    answers = [answer for answer in (read_log(path) if path.is_file() else ()) if is_answer(answer)]
    if len(answers) != row["n"]:
        missing.append(f"{path.name} holds {len(answers)} answers, its summary counts {row['n']}: it is not shown.")
        return []
    return answers


def is_answer(record):
    completions = record.get("completions")
    return isinstance(completions, list) and bool(completions) and isinstance(completions[0], dict) and is_number(completions[0].get("tokens"))


def newest_of_each(rows):
    """One row per stage, model, task and split: the newest. A repeated evaluation is not a second result."""
    newest = {}
    for row in sorted(filter(None, rows), key=lambda row: row["time"]):
        newest[(row["stage"], row["model_tag"], row["task"], row["split"])] = row
    return sorted(newest.values(), key=lambda row: (str(row["task"]), stage_place(row), str(row["model_tag"])))


def section_place(section):
    name = section["name"]
    return SECTION_ORDER.index(name) if name in SECTION_ORDER else len(SECTION_ORDER), section["time"]


def stage_place(row):
    return STAGES.index(row["stage"]) if row["stage"] in STAGES else len(STAGES)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def series(run, name):
    """A metric of a run -> (steps, values); a step logged twice counts once, what is not a finite number not at all."""
    values = {record["step"]: record[name] for record in run["records"] if is_number(record.get(name))}
    return list(values), list(values.values())


def texts(run):
    """What a run showed: [(step, name, text or list of dicts)]."""
    return [(record["step"], name, text) for record in run["records"] if isinstance(record.get("text"), dict)
            for name, text in record["text"].items()]


# -- facts ------------------------------------------------------------------------------------------------------------

def facts(runs, sections, cost_per_hour):
    """[(name, value as text)] of machine, code and time. Time is what the stages spent training, not what the wall clock says."""
    seconds = {section["name"]: section["data"]["seconds"] for section in sections if is_number(section["data"].get("seconds"))}
    hours = sum(seconds.values()) / 3600
    rows = [("Written", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())), ("Code", git_state()), ("GPU", gpu_names()),
            ("CPU", f"{cpu_name()}, {psutil.cpu_count(logical=True)} cores"), ("Memory", f"{psutil.virtual_memory().total / 2**30:.0f} GiB"),
            ("Software", f"Python {platform.python_version()}, {torch_version()}")]
    if seconds:
        rows.append(("Training time", f"{duration(sum(seconds.values()))} (" + ", ".join(f"{name} {duration(value)}" for name, value in seconds.items()) + ")"))
    if seconds and cost_per_hour >= 0:
        rows.append(("Cost", f"${hours * cost_per_hour:,.2f} for the training time at ${cost_per_hour:g} an hour"))
    return rows


def git_state():
    def git(*arguments):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True).stdout.strip()
    try:
        commit, branch, changes = git("rev-parse", "--short=12", "HEAD"), git("rev-parse", "--abbrev-ref", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "no git repository"
    return f"commit {commit} on {branch}" + (f", with uncommitted changes in {len(changes.splitlines())} files" if changes else "")


def cpu_name():
    """The processor's name as the kernel lists it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())


def torch_version():
    """torch's version, and CUDA's where there is a GPU, out of the file that holds both: importing torch takes two seconds."""
    found = runpy.run_path(str(Path(importlib.util.find_spec("torch").origin).with_name("version.py")))
    return f"torch {found['__version__']}" + (f", CUDA {found['cuda']}" if gpu_names() != "none" else "")


def gpu_names():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "none"
    import torch  # here: where there is no driver there is no GPU to ask it about
    if not torch.cuda.is_available():
        return "none"
    names = [f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)" for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


# -- the table --------------------------------------------------------------------------------------------------------

def result_row(row):
    """An evaluation -> its texts in the order of COLUMNS; "-" where nothing was measured."""
    metrics, n = row["metrics"], row["n"]
    constant = metrics["best_constant"] if isinstance(metrics["best_constant"], dict) else {"share": metrics["best_constant"]}
    no_reasoning = metrics["no_reasoning"].get("accuracy") if isinstance(metrics["no_reasoning"], dict) else metrics["no_reasoning"]
    failures = metrics["parse_failures"]
    if is_number(failures):
        failures = percent(failures / n if isinstance(failures, int) and n else failures)
    interval = [metrics["ci_low"], metrics["ci_high"]]
    return (str(row["stage"]), str(row["model_tag"]) + (f"@{row['step']}" if row["step"] is not None else ""),
            str(row["task"]) + (f" {row['split']}" if row["split"] else ""), str(n) if n is not None else "-", percent(metrics["accuracy"]),
            f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}" if all(map(is_number, interval)) else "-",
            percent(constant.get("share")) + (f" ({constant['letter']})" if constant.get("letter") else ""),
            percent(metrics["random_accuracy"]), percent(no_reasoning), failures or "-",
            f"{metrics['mean_tokens']:.0f}" if is_number(metrics["mean_tokens"]) else "-", verdict(row))


def baseline(metrics):
    """The highest score that takes no reading of the question, or None."""
    constant = metrics["best_constant"].get("share") if isinstance(metrics["best_constant"], dict) else metrics["best_constant"]
    known = [value for value in (constant, metrics["random_accuracy"]) if is_number(value)]
    return max(known) if known else None


def verdict(row):
    """Whether the interval lies above what blind answers score: a difference inside the interval is not a result."""
    metrics, blind = row["metrics"], baseline(row["metrics"])
    if not blind or not is_number(metrics["ci_low"]):  # where blind answers score nothing, beating them says nothing
        return "-"
    return "above" if metrics["ci_low"] > blind else "below" if metrics["ci_high"] < blind else "no better"


def percent(value):
    return f"{100 * value:.1f} %" if is_number(value) else "-"


def summary(report):
    """The report for a terminal: the table, and what is missing."""
    rows = [result_row(row) for row in report["evals"]]
    lines = aligned([COLUMNS, *rows]) if rows else []
    losses = [(run["stage"], run["model_tag"], *last_value(run, "train/loss"), *last_value(run, "val/bpb")) for run in report["runs"]]
    if losses:
        lines += [""] * bool(lines) + aligned([("stage", "model", "step", "train/loss", "step", "val/bpb"), *losses])
    return "\n".join(lines + [""] * bool(lines) + report["missing"])


def last_value(run, name):
    steps, values = series(run, name)
    return (str(steps[-1]), f"{values[-1]:.4f}") if steps else ("-", "-")


def aligned(rows):
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


# -- markdown ---------------------------------------------------------------------------------------------------------

def markdown_page(report):
    lines = ["# Report", "", *[f"- **{name}**: {value}" for name, value in report["facts"]], "", "## Results", ""]
    if report["evals"]:
        lines += markdown_table(COLUMNS, [result_row(row) for row in report["evals"]])
        lines += ["", LEGEND]
    curves = [(run["stage"], run["model_tag"], name, sparkline(series(run, name)[1]), *[f"{series(run, name)[1][place]:.4g}" for place in (0, -1)])
              for run in report["runs"] for name in ("train/loss", "val/bpb", "rl/mean_reward", "rl/acc") if series(run, name)[0]]
    if curves:
        lines += ["", "## Curves", "", *markdown_table(("stage", "model", "metric", "course", "first", "last"), curves)]
    for section in report["sections"]:
        lines += ["", f"## {section['name']}", "", str(section["markdown"]).strip()]
    if report["missing"]:
        lines += ["", "## Not in this report", "", *[f"- {line}" for line in report["missing"]]]
    return "\n".join(lines) + "\n"


def markdown_table(columns, rows):
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


def sparkline(values, width=24):
    """Numbers -> a row of eighth blocks; each stands for the mean of its share of them."""
    parts = [values[len(values) * i // width:len(values) * (i + 1) // width] for i in range(width)] if len(values) > width else [[v] for v in values]
    means = [sum(part) / len(part) for part in parts]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / span))] for mean in means)


def command_line(words):
    """`reset|generate|summarize [RUN] [flags]` -> (command, Config)."""
    words = words[1:] if words[:1] == ["--"] else words
    usage = f"usage: python -m nanochat.report {'|'.join(COMMANDS)} [RUN] [--copy-to DIR] [--cost-per-hour PRICE]"
    if words in (["--help"], ["-h"]):
        print(usage)
        raise SystemExit(0)
    if not words or words[0] not in COMMANDS:
        raise SystemExit(usage)
    command, *flags = words
    if flags and not flags[0].startswith("-"):
        flags[0] = f"--run={flags[0]}"
    return command, parse(Config, flags)


if __name__ == "__main__":
    main(*command_line(sys.argv[1:]))
