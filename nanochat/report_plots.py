"""The report's plots, as inline SVG: what every stage logged, what every evaluation found, and what RL did to its policy.

Each function takes what `report.collect` found and gives HTML, or "" where there is nothing to draw.
"""
import io
import logging
import math
import re
from html import escape as escape_html

import matplotlib
from matplotlib.figure import Figure

from nanochat.report import is_number, percent, series
from nanochat.run_logger import visible
from nanochat.statistics import wilson_interval

INK, MUTED, FAINT, RULE = "#1c2733", "#5f6c7b", "#a9b4c0", "#e4e8ed"
STAGE_COLORS = {"base": "#7a8797", "mid": "#2b8a83", "sft": "#2f6db5", "rl": "#cf5b36"}
LINE_STYLES = ("-", "--", "-.", ":")
LETTER_COLORS = ("#2f6db5", "#2b8a83", "#d9a13b", "#cf5b36", "#8a63b8", "#7a8797", "#b04a78", "#4b5866")


def escape(text):
    return escape_html(visible(text))


def color(stage):
    return STAGE_COLORS.get(stage, "#8a63b8")


def figure(width, height, columns=1, rows=1):
    """A figure of `width` x `height` inches with axes in the page's style -> (figure, list of axes, row by row)."""
    result = Figure(figsize=(width, height), layout="constrained")
    result.get_layout_engine().set(wspace=0.07, hspace=0.1)
    axes = list(result.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color("#cfd6de")
        ax.tick_params(colors=MUTED, labelsize=8.5, length=0, pad=5)
        ax.grid(axis="y", color=RULE, linewidth=0.8)
        ax.set_axisbelow(True)
    return result, axes


def svg(drawing, name, words):
    """A figure -> inline SVG, byte for byte the same every time, with ids that cannot meet those of another figure."""
    buffer = io.StringIO()
    # text stays text: searchable, sharp, and in the page's own font
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg"):])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)


def plot(drawing, name, heading, caption):
    return f'<div class="card"><figure><h3>{escape(heading)}</h3>{svg(drawing, name, heading)}<figcaption>{escape(caption)}</figcaption></figure></div>'


def accuracy_plot(evals):
    """Every accuracy with its interval, beside what blind answers score."""
    rows = [row for row in evals if is_number(row["metrics"]["accuracy"])]
    if not rows:
        return ""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    places = [index + 0.7 * tasks.index(row["task"]) for index, row in enumerate(rows)]  # a gap between tasks
    drawing, (ax,) = figure(10, 0.7 + 0.32 * places[-1] + 0.3)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=RULE, linewidth=0.8)
    for place, row in zip(places, rows):
        metrics = row["metrics"]
        low, high = (metrics[end] if is_number(metrics[end]) else metrics["accuracy"] for end in ("ci_low", "ci_high"))
        ax.plot([low, high], [place, place], color=color(row["stage"]), linewidth=5.5, alpha=0.28, solid_capstyle="round")
        ax.plot(metrics["accuracy"], place, "o", color=color(row["stage"]), markersize=7)
        constant = metrics["best_constant"].get("share") if isinstance(metrics["best_constant"], dict) else metrics["best_constant"]
        for value, style in ((constant, "-"), (metrics["random_accuracy"], ":")):
            if is_number(value) and value > 0:
                ax.plot([value, value], [place - 0.36, place + 0.36], style, color=INK, linewidth=1.3)
        ax.annotate(percent(metrics["accuracy"]), (max(high, constant if is_number(constant) else 0.0), place), (12, 0),
                    textcoords="offset points", va="center", fontsize=8.5, color=INK)
    ax.set_yticks(places, [f"{row['task']} · {row['stage']}" for row in rows])
    ax.tick_params(axis="y", labelcolor=INK, labelsize=9)
    ax.set_ylim(places[-1] + 0.6, -0.6)
    ax.set_xlim(0, min(1.08, 1.12 * ax.get_xlim()[1]))
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return plot(drawing, "accuracy", "Accuracy with its 95 % interval",
                "The full stroke is the best constant letter, the dotted one random choice. An interval that crosses the stroke has shown nothing yet.")


def curves(runs):
    """Loss, bits per byte, reward and lengths, as far as they were logged."""
    parts = []
    trained = [run for run in runs if run["stage"] != "rl" and series(run, "train/loss")[0]]
    if trained:
        parts.append(panels(trained, "loss", "Training loss", "Nats per target token over optimizer steps; the thin line is every step, the thick one a running mean.",
                            lambda ax, run: draw_smoothed(ax, *series(run, "train/loss"), color(run["stage"]))))
    measured = [run for run in runs if len(series(run, "val/bpb")[0]) > 1]
    if measured:
        parts.append(panels(measured, "bpb", "Bits per byte on held-out text", "Over optimizer steps. Each stage has validation data of its own: compare within a panel, not across.",
                            lambda ax, run: ax.plot(*series(run, "val/bpb"), "o-", color=color(run["stage"]), markersize=3.5, linewidth=1.8)))
    parts += [reward_plot(run) for run in runs if series(run, "rl/mean_reward")[0]]
    return "<h2>Curves</h2>" + "".join(parts) if parts else "<h2>Curves</h2><p class=\"lead\">No stage has logged a loss.</p>"


def panels(runs, name, heading, caption, draw):
    """One panel per run, four in a row."""
    parts = []
    for start in range(0, len(runs), 4):
        row = runs[start:start + 4]
        drawing, axes = figure(10, 2.7, max(2, min(4, len(runs))))
        for ax, run in zip(axes, row):
            draw(ax, run)
            ax.set_title(f"{run['stage']} {run['model_tag']}", fontsize=9.5, color=INK, loc="left", pad=8)
            finish_steps(ax)
        for ax in axes[len(row):]:
            ax.set_visible(False)
        parts.append(plot(drawing, f"{name}-{start}", heading, caption))
    return "".join(parts)


def finish_steps(ax):
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    ax.margins(x=0.02)


def draw_smoothed(ax, steps, values, line_color):
    shown = range(0, len(steps), math.ceil(len(steps) / 1500))  # enough for any screen
    ax.plot([steps[i] for i in shown], [values[i] for i in shown], color=line_color, linewidth=0.7, alpha=0.3)
    means = running_mean(values)
    ax.plot([steps[i] for i in shown], [means[i] for i in shown], color=line_color, linewidth=1.9)
    low, high = min(values), max(values)
    early = sorted(values)[int(0.995 * (len(values) - 1))]  # a first step far above all others must not flatten the rest
    ax.set_ylim(low - 0.06 * (early - low or 1), min(high, early) + 0.1 * (early - low or 1))


def running_mean(values):
    """The mean of each value's neighbourhood, a twentieth of the run wide: centred, so that it lags behind no slope."""
    reach, sums, means = max(1, len(values) // 40), [0.0], []
    for value in values:
        sums.append(sums[-1] + value)
    for place in range(len(values)):
        before = min(reach, place)
        after = min(before, len(values) - 1 - place)
        means.append((sums[place + after + 1] - sums[place - before]) / (before + after + 1))
    return means


def reward_plot(run):
    """What RL does to the reward, the share of right answers and the length of the completions."""
    drawing, (left, right) = figure(10, 2.9, 2)
    draw_smoothed(left, *series(run, "rl/mean_reward"), color("rl"))
    left.set_title("reward" + (", and share of right answers (grey)" if series(run, "rl/acc")[0] else ""), fontsize=9.5, color=INK, loc="left", pad=8)
    low, high = left.get_ylim()
    if series(run, "rl/acc")[0]:
        steps, values = series(run, "rl/acc")
        left.plot(steps, running_mean(values), color=MUTED, linewidth=1.5)
        low, high = min(low, *values), max(high, *values)
    left.set_ylim(max(0.0, low - 0.03), high + 0.03)
    steps, means = series(run, "completions/mean_length")
    shortest, longest = (series(run, f"completions/{end}_length") for end in ("min", "max"))
    if steps:
        if shortest[0] == longest[0] == steps:
            right.fill_between(steps, shortest[1], longest[1], color=color("rl"), alpha=0.13, linewidth=0)
        right.plot(steps, means, color=color("rl"), linewidth=1.9)
        right.set_ylim(bottom=0)
        right.set_title("tokens per completion: mean, shortest to longest", fontsize=9.5, color=INK, loc="left", pad=8)
    else:
        right.set_visible(False)
    for ax in (left, right):
        finish_steps(ax)
    return plot(drawing, f"reward-{run['model_tag']}", f"Reinforcement learning of {run['model_tag']}",
                "Over optimizer steps. The reward is the sum of its parts, a right answer being worth 1.")


def letters_plot(evals):
    """What is answered beside what is right: a policy that collapsed to one letter shows at a glance."""
    rows = [row for row in evals if isinstance(row["metrics"]["letters_pred"], dict) and isinstance(row["metrics"]["letters_gold"], dict)
            and sum(value for value in row["metrics"]["letters_gold"].values() if is_number(value))][-8:]
    parts = []
    for start in range(0, len(rows), 4):
        chosen = rows[start:start + 4]
        drawing, axes = figure(10, 2.5, 4 if len(rows) > 1 else 2)
        for ax, row in zip(axes, chosen):
            gold, predicted = row["metrics"]["letters_gold"], row["metrics"]["letters_pred"]
            letters = sorted(set(gold) | {letter for letter in predicted if letter and letter not in ("none", "null", "None")})
            unread = sum(value for letter, value in predicted.items() if letter not in letters and is_number(value))
            for offset, counts, fill in ((-0.2, gold, "#d3dae2"), (0.2, predicted, color(row["stage"]))):
                total = sum(value for value in counts.values() if is_number(value)) or 1
                ax.bar([place + offset for place in range(len(letters))], [counts.get(letter, 0) / total for letter in letters], 0.38, color=fill)
            if unread:
                ax.bar(len(letters), unread / sum(value for value in predicted.values() if is_number(value)), 0.38, color=color(row["stage"]), alpha=0.45)
            names = letters + (["none"] if unread else [])
            ax.set_xticks(range(len(names)), names)
            ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
            ax.set_title(f"{row['task']} · {row['stage']}", fontsize=9.5, color=INK, loc="left", pad=8)
        top = max(ax.get_ylim()[1] for ax in axes[:len(chosen)])
        for place, ax in enumerate(axes):
            ax.set_ylim(0, top)
            ax.tick_params(axis="y", labelleft=place == 0)
            ax.set_visible(place < len(chosen))
        parts.append(plot(drawing, f"letters-{start}", "Letters answered (coloured) and right (grey)", "“none” are completions without a readable answer."))
    return "<h2>Letters</h2>" + "".join(parts) if parts else ""


# -- reinforcement learning: what became of the policy --------------------------------------------------------------------

def telemetry(runs):
    """Held-out accuracy, KL to the reference, letter margin, entropy, the letters chosen and the groups that taught nothing, for every RL run."""
    runs = [run for run in runs if series(run, "rl/kl_sequence_mean")[0] or series(run, "frac_reward_zero_std")[0]]
    return "<h2>What RL does to the policy</h2>" + "".join(telemetry_plot(run) for run in runs) if runs else ""


def telemetry_plot(run):
    at_k = max({name for record in run["records"] for name in record if name.startswith("eval/pass@")}, key=lambda name: int(name.partition("@")[2]), default=None)
    panels = [("accuracy on held-out problems" + (f", {at_k[5:]} dashed" if at_k else ""), ("eval/accuracy", at_k) if at_k else ("eval/accuracy",)),
              ("KL to the start, nats: sequence (full), letter (dashed)", ("rl/kl_sequence_mean", "rl/kl_letter_mean")),
              ("letter margin, logits", ("rl/letter_margin_mean",)), ("entropy, nats per token", ("entropy",)),
              ("share of groups that teach nothing", ("frac_reward_zero_std",))]
    panels = [(words, names) for words, names in panels if any(series(run, name)[0] for name in names)]
    letters = sorted({name.rpartition("/")[2] for record in run["records"] for name in record if name.startswith("rl/letter_pred_counts/")} - {"none"})
    count = len(panels) + bool(letters)
    drawing, axes = figure(10, 2.6 * -(-count // 3), 3, -(-count // 3))
    for ax, (words, names) in zip(axes, panels):
        for name, style in zip(names, ("-", "--")):
            steps, values = series(run, name)
            if steps:
                ax.plot(steps, running_mean(values) if len(values) > 60 else values, style, color=color("rl"), linewidth=1.8, marker="o" if len(values) == 1 else None, markersize=3.5)
        if names[0] == "eval/accuracy" and series(run, "eval/ci_low")[0] == series(run, "eval/accuracy")[0] == series(run, "eval/ci_high")[0]:
            ax.fill_between(series(run, "eval/accuracy")[0], series(run, "eval/ci_low")[1], series(run, "eval/ci_high")[1], color=color("rl"), alpha=0.13, linewidth=0)
        ax.set_ylim(bottom=0)
        ax.set_title(words, fontsize=9, color=INK, loc="left", pad=8)
        finish_steps(ax)
    if letters:
        draw_letter_shares(axes[len(panels)], run, letters)
    for ax in axes[count:]:
        ax.set_visible(False)
    return plot(drawing, f"telemetry-{run['model_tag']}", f"{run['model_tag']} over optimizer steps",
                "KL is exact over the vocabulary, summed over a completion; letter KL and margin are taken at the token behind “Answer:”. "
                "Both KLs are 0 at step 0, when the policy is its reference. The band around the accuracy is its 95 % interval.")


def draw_letter_shares(ax, run, letters):
    """The share of each letter among the answers, one band above the other: a collapse to one letter fills the panel."""
    counts = {letter: dict(zip(*series(run, f"rl/letter_pred_counts/{letter}"))) for letter in letters}
    steps = sorted(set.intersection(*(set(of) for of in counts.values())))
    totals = [sum(counts[letter][step] for letter in letters) or 1 for step in steps]
    shares = [running_mean([counts[letter][step] / total for step, total in zip(steps, totals)]) for letter in letters]
    ax.stackplot(steps, shares, colors=LETTER_COLORS[:len(letters)], alpha=0.75, linewidth=0)
    floor = 0.0
    for letter, share in zip(letters, shares):
        ax.annotate(letter, (steps[-1], floor + share[-1] / 2), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)
        floor += share[-1]
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ax.set_title("letters answered", fontsize=9, color=INK, loc="left", pad=8)
    finish_steps(ax)


# -- where the answers are right ------------------------------------------------------------------------------------------

def by_level(evals):
    """Accuracy with its interval over the level of the problem, one line per stage."""
    rows = [row for row in evals if isinstance(row["metrics"].get("by_level"), dict) and len(row["metrics"]["by_level"]) > 1]
    return panel_per_task(rows, "level", "Accuracy by level", "With 95 % intervals; the dotted line is random choice. A level is the length of the problem's solution.",
                          lambda row: [(name, part["accuracy"], part["ci_low"], part["ci_high"]) for name, part in row["metrics"]["by_level"].items()])


def by_length(evals):
    """Accuracy with its interval over the length of the answer: fifths of each evaluation's answers, by tokens."""
    rows = [row for row in evals if len({answer_of(answer)["tokens"] for answer in row.get("answers", ())}) > 4]
    return panel_per_task(rows, "length", "Accuracy by length of the answer", "Fifths of the answers, the middle of each in tokens, with 95 % intervals; the dotted "
                          "line is random choice. Long answers are often those of hard problems.", fifths)


def answer_of(record):
    return record["completions"][0]


def fifths(row):
    answers = sorted((answer_of(answer) for answer in row["answers"]), key=lambda answer: answer["tokens"])
    points = []
    for place in range(5):
        part = answers[place * len(answers) // 5:(place + 1) * len(answers) // 5]
        if part:
            share = sum(bool(answer["correct"]) for answer in part) / len(part)
            points.append((part[len(part) // 2]["tokens"], share, *wilson_interval(share * len(part), len(part))))
    return points


def panel_per_task(rows, name, heading, caption, points_of):
    """One panel per task, one line per model and stage; `points_of(row)` gives (x, accuracy, low, high), x a number or a name."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    parts = []
    for start in range(0, len(tasks), 2):
        drawing, axes = figure(10, 3.0, min(2, len(tasks)))
        for ax, task in zip(axes, tasks[start:start + 2]):
            chosen = [row for row in rows if row["task"] == task][-6:]
            for index, row in enumerate(chosen):
                points = points_of(row)
                places = [x if is_number(x) else place for place, (x, *_) in enumerate(points)]
                shift = 0.06 * (index - (len(chosen) - 1) / 2) if not is_number(points[0][0]) else 0.0
                places = [place + shift for place in places]
                ax.vlines(places, [low for _, _, low, _ in points], [high for *_, high in points], color=color(row["stage"]), alpha=0.3, linewidth=3)
                ax.plot(places, [accuracy for _, accuracy, _, _ in points], LINE_STYLES[index % 4], marker="o", color=color(row["stage"]), markersize=3.5,
                        linewidth=1.5, label=f"{row['stage']} {row['model_tag']}")
                if not is_number(points[0][0]):
                    ax.set_xticks(range(len(points)), [str(x) for x, *_ in points])
            random_accuracy = chosen[-1]["metrics"]["random_accuracy"]
            if is_number(random_accuracy):
                ax.axhline(random_accuracy, linestyle=":", color=INK, linewidth=1.2)
            ax.set_ylim(0, 1.03)
            ax.margins(x=0.04)
            ax.legend(loc="lower left", fontsize=8, frameon=False, ncols=3, labelcolor=INK)
            ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            ax.set_title(str(task), fontsize=9.5, color=INK, loc="left", pad=8)
        for ax in axes[len(tasks[start:start + 2]):]:
            ax.set_visible(False)
        parts.append(plot(drawing, f"{name}-{start}", heading, caption))
    return "".join(parts)
