"""A run's JSONL -> one picture with a panel per metric.

    python -m scripts.plot_grpo_metrics                                    # the newest RL run -> runs/rl_d4_metrics.svg
    python -m scripts.plot_grpo_metrics --run=rl_d8 --metrics="reward,kl,eval/accuracy" --output=curves.png
"""
import io
import math
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nanochat.common import base_dir, write_atomic
from nanochat.configurator import parse
from nanochat.run_logger import read_log

METRICS = ("rl/acc,eval/accuracy,reward,kl,rl/kl_letter_mean,rl/letter_margin_mean,entropy,grad_norm,train/loss,clip_ratio/low_mean,clip_ratio/high_mean,"
           "completions/mean_length,frac_reward_zero_std,sampling/logp_difference/max,tokens_per_s/generate")
COLUMNS, INK, LINE = 3, "#1c2733", "#1f5fa8"


@dataclass(frozen=True)
class Config:
    """Draw the metrics of an RL run, one panel each."""
    run: str = ""            # name of a log in runs/ of the base directory, such as rl_d8, or a path ("" = the newest rl_*.jsonl)
    metrics: str = METRICS   # which metrics, commas between them; those that the run never logged are left out
    output: str = ""         # file to write, .svg or .png ("" = NAME_metrics.svg beside the log)


def main(config):
    path = find_log(config.run)
    wanted = [name.strip() for name in config.metrics.split(",") if name.strip()]
    found = series(path, wanted)
    if not found:
        raise ValueError(f"{path} holds none of the {len(wanted)} metrics {', '.join(wanted)}: name some that it has, --metrics=reward,kl")
    output = Path(config.output) if config.output else path.with_name(f"{path.stem}_metrics.svg")
    write_atomic(output, draw(found, path.stem, output.suffix.lstrip(".") or "svg"))
    print(f"{len(found)} metrics of {path.name} in {output}")


def find_log(run):
    """A name or a path -> the log's path; "" is the newest of an RL run."""
    if run:
        path = Path(run) if run.endswith(".jsonl") else base_dir() / "runs" / f"{run}.jsonl"
        if not path.is_file():
            raise ValueError(f"there is no log {path}: {', '.join(sorted(other.stem for other in path.parent.glob('*.jsonl'))) or 'nothing'} is there")
        return path
    logs = sorted((base_dir() / "runs").glob("rl_*.jsonl"), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise ValueError(f"{base_dir() / 'runs'} holds 0 logs of RL runs: train by python -m scripts.chat_grpo, or name a log by --run")
    return logs[-1]


def series(path, names):
    """{metric: (steps, values)} of those that were logged. Step 0 and values of 0 are values; a step logged again counts as it was last."""
    found = {name: {} for name in names}
    for record in read_log(path):
        for name in found:
            if "step" in record and isinstance(record.get(name), (int, float)):
                found[name][record["step"]] = record[name]
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in found.items() if values}


def draw(found, title, file_format):
    """-> the picture's bytes."""
    rows = math.ceil(len(found) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.4 * rows + 0.5), layout="constrained")
    figure.suptitle(title, color=INK)
    for place, (name, (steps, values)) in enumerate(found.items()):
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        axes.plot(steps, values, color=LINE, linewidth=1.2, marker="o" if len(steps) < 30 else None, markersize=2.5)
        axes.set_title(name, fontsize=9, color=INK)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    main(parse(Config))
