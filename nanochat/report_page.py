"""The report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere; plots are inline SVG.

It draws what `report.collect` found and computes nothing that is not also in report.md.
"""
import io
import logging
import math
import re
from html import escape as escape_html

import matplotlib
from markdown_it import MarkdownIt  # comes with rich
from matplotlib.figure import Figure

from nanochat.report import COLUMNS, LEGEND, baseline, is_number, percent, result_row, series, texts, verdict
from nanochat.run_logger import visible

INK, MUTED, FAINT, RULE = "#1c2733", "#5f6c7b", "#a9b4c0", "#e4e8ed"
STAGE_COLORS = {"base": "#7a8797", "mid": "#2b8a83", "sft": "#2f6db5", "rl": "#cf5b36"}
VERDICT_CLASSES = {"above": "good", "no better": "flat", "below": "bad"}
MAX_SAMPLES = 8

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: #1c2733; font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 32px 96px; }
header h1 { margin: 0; font-size: 34px; line-height: 1.2; letter-spacing: -0.02em; }
header p { margin: 8px 0 0; color: #5f6c7b; }
h2 { margin: 56px 0 16px; font-size: 21px; letter-spacing: -0.01em; }
h2 + p.lead { margin-top: -8px; }
h3 { margin: 0 0 4px; font-size: 15px; }
p { margin: 0 0 12px; }
.lead, .note { color: #5f6c7b; }
.note { font-size: 14px; margin-top: 12px; }
code { font: 0.9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #edf0f4; padding: 1px 5px; border-radius: 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0; }
pre code { background: none; padding: 0; }
.tiles { display: grid; grid-template-columns: repeat(var(--across), 1fr); gap: 16px; margin-top: 32px; }
.tile, .card { background: #fff; border: 1px solid #e4e8ed; border-radius: 12px; }
.tile { padding: 18px 20px; }
.tile .label { font-size: 13px; color: #5f6c7b; }
.tile .value { font-size: 28px; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile .under { font-size: 13px; color: #5f6c7b; }
.card { padding: 20px 24px; margin-bottom: 16px; overflow-x: auto; }
.card > :last-child { margin-bottom: 0; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { font-size: 14px; color: #5f6c7b; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #5f6c7b; padding: 6px 12px 8px 0; border-bottom: 1px solid #cfd6de; vertical-align: bottom; }
td { padding: 9px 12px 9px 0; border-bottom: 1px solid #edf0f4; vertical-align: top; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
tr.first td { border-top: 2px solid #dbe1e8; }
th:last-child, td:last-child { padding-right: 0; }
td.number, th.number { text-align: right; }
td.strong { font-weight: 650; }
.facts td { white-space: normal; }
.facts td:first-child { color: #5f6c7b; width: 140px; }
.chip { display: inline-block; padding: 1px 10px; border-radius: 999px; font-size: 13px; font-weight: 600; white-space: nowrap; }
.good { background: #e2f3e8; color: #17663a; }
.flat { background: #eef0f3; color: #4b5866; }
.bad { background: #fbe6e1; color: #9b2f17; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 7px; }
.sample { border-top: 1px solid #edf0f4; padding: 16px 0; }
.sample:first-child { border-top: 0; padding-top: 0; }
.sample .head { display: flex; gap: 10px; align-items: baseline; flex-wrap: wrap; margin-bottom: 8px; font-size: 14px; color: #5f6c7b; }
.sample .answer { border-left: 3px solid #dfe4ea; padding-left: 14px; margin-top: 10px; }
summary { cursor: pointer; color: #2f6db5; font-size: 14px; }
details pre { margin-top: 10px; }
ul.missing { margin: 0; padding-left: 20px; color: #5f6c7b; }
@media (max-width: 760px) { .tiles { grid-template-columns: 1fr 1fr; } main { padding: 32px 16px 64px; } .card { padding: 16px; } figure svg { min-width: 680px; } }
@media print { body { background: #fff; } .tile, .card { break-inside: avoid; } }
"""


def html_page(report):
    """What `report.collect` returned -> the whole page as text."""
    body = [page_header(report), tiles(report), results(report["evals"]), accuracy_plot(report["evals"]), curves(report["runs"]),
            letters_plot(report["evals"]), samples(report), sections(report["sections"]), fact_table(report["facts"]), missing(report["missing"])]
    return ("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
            f"<title>{escape(title(report))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(filter(None, body)) + "\n</main>\n</body>\n</html>\n")


def escape(text):
    return escape_html(visible(text))


# -- words ------------------------------------------------------------------------------------------------------------

def title(report):
    tags = list(dict.fromkeys(run["model_tag"] for run in report["runs"]))
    return "Report" + (f" on {', '.join(tags)}" if tags else "")


def page_header(report):
    facts = dict(report["facts"])
    return f"<header><h1>{escape(title(report))}</h1><p>{escape(facts.get('Written', ''))} · {escape(facts.get('Code', ''))}</p></header>"


def tiles(report):
    """The few numbers one looks for first."""
    found = []
    row = headline(report["evals"])
    if row:
        texts_of_row = dict(zip(COLUMNS, result_row(row)))
        found.append((f"{texts_of_row['task']} after {row['stage']}", texts_of_row["accuracy"], f"{texts_of_row['95 % interval']}, n = {texts_of_row['n']}"))
        found.append(("Blind answers there score", percent(baseline(row["metrics"])), {"above": "the model is above them", "no better": "the model is no better", "below": "the model is below them"}.get(verdict(row), "")))
    base = next((section["data"] for section in report["sections"] if section["name"] == "base"), {})
    if is_number(base.get("parameters")):
        found.append(("Parameters", large(base["parameters"]), f"{large(base['tokens'])} training tokens" if is_number(base.get("tokens")) else ""))
    if is_number(base.get("val_bpb")):
        found.append(("Bits per byte, base", f"{base['val_bpb']:.3f}", "on held-out text"))
    for name, value in report["facts"]:
        if name in ("Training time", "Cost"):
            short, _, rest = value.partition(" (" if name == "Training time" else " for ")
            found.append((name, short, rest.rstrip(")")))
    cells = [f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div><div class="under">{escape(under)}</div></div>'
             for label, value, under in found]
    across = 3 if len(cells) in (3, 5, 6) else 4
    return f'<div class="tiles" style="--across: {across}">{"".join(cells)}</div>' if cells else ""


def headline(evals):
    """The evaluation that the report is about: AQuA if there is one, of the latest stage."""
    known = [row for row in evals if is_number(row["metrics"]["accuracy"])]
    wanted = [row for row in known if "aqua" in str(row["task"]).lower()] or known
    return max(wanted, key=lambda row: (list(STAGE_COLORS).index(row["stage"]) if row["stage"] in STAGE_COLORS else -1, row["time"]), default=None)


def large(number):
    return next((f"{number / size:.3g} {unit}" for size, unit in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if number >= size), f"{number:.0f}")


def results(evals):
    if not evals:
        return "<h2>Results</h2><p class=\"lead\">No evaluation has been run.</p>"
    numbers = set(COLUMNS) - {"stage", "model", "task", "vs blind"}
    head = "".join(f'<th class="{"number" if name in numbers else ""}">{escape(name)}</th>' for name in COLUMNS)
    lines, task = [], evals[0]["task"]
    for row in evals:
        cells = []
        for name, text in zip(COLUMNS, result_row(row)):
            inner = escape(text)
            if name == "stage":
                inner = f'<span class="dot" style="background:{color(row["stage"])}"></span>{inner}'
            if name == "vs blind" and text in VERDICT_CLASSES:
                inner = f'<span class="chip {VERDICT_CLASSES[text]}">{inner}</span>'
            cells.append(f'<td class="{"number" if name in numbers else ""}{" strong" if name == "accuracy" else ""}">{inner}</td>')
        lines.append(f'<tr class="{"first" if row["task"] != task else ""}">{"".join(cells)}</tr>')
        task = row["task"]
    return (f'<h2>Results</h2><div class="card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
            f'<p class="note">{escape(LEGEND)}</p>')


def samples(report):
    """Problems with the model's answers, from the headline evaluation, and what the stages showed while they trained."""
    parts = []
    row = headline([row for row in report["evals"] if row["samples"]])
    if row:
        shown = [sample(item) for item in row["samples"][:MAX_SAMPLES] if isinstance(item, dict)]
        parts.append(f'<h2>Sample problems</h2><p class="lead">{escape(str(row["task"]))} after {escape(str(row["stage"]))}, the first of its evaluation.</p>'
                     f'<div class="card">{"".join(shown)}</div>')
    logged = []
    for run in report["runs"]:
        step, name, text = next(reversed(texts(run)), (None, None, None))
        if isinstance(text, str):
            logged.append(f'<div class="card"><h3>{escape(run["stage"])}: {escape(str(name))} at step {step}</h3><pre>{escape(text)}</pre></div>')
        elif isinstance(text, list) and text and isinstance(text[0], dict):
            rows = "".join("<tr>" + "".join(f'<td style="white-space:pre-wrap">{escape(str(cell))}</td>' for cell in item.values()) + "</tr>"
                           for item in text[:MAX_SAMPLES] if isinstance(item, dict))
            head = "".join(f"<th>{escape(str(key))}</th>" for key in text[0])
            logged.append(f'<div class="card"><h3>{escape(run["stage"])}: {escape(str(name))} at step {step}</h3><table><tr>{head}</tr>{rows}</table></div>')
    return "".join(parts) + ("<h2>Seen while training</h2>" + "".join(logged) if logged else "")


def sample(item):
    """One problem: the question, the model's words, its letter beside the right one."""
    gold, predicted = (first_of(item, *names) for names in (("gold", "answer_letter", "correct_letter"), ("predicted", "pred", "letter")))
    correct = item.get("correct")
    correct = correct if isinstance(correct, bool) else (predicted == gold if gold is not None else None)
    chip = "" if correct is None else f'<span class="chip {"good" if correct else "bad"}">{"right" if correct else "wrong"}</span>'
    said = f"answered {predicted}" if predicted else "no readable answer"
    words = f"{said}, the right answer is {gold}" if gold is not None else said if predicted else ""
    completion = str(first_of(item, "completion", "response", "text") or "")
    answer = f"<pre>{escape(completion)}</pre>"
    if len(completion) > 900:
        answer = f"<pre>{escape(completion[:600])} …</pre><details><summary>all {len(completion):,} characters</summary>{answer}</details>"
    return (f'<div class="sample"><div class="head">{chip}<span>{escape(words)}</span></div><pre>{escape(str(first_of(item, "question", "prompt") or ""))}</pre>'
            f'<div class="answer">{answer}</div></div>')


def first_of(item, *names):
    return next((item[name] for name in names if item.get(name) is not None), None)


def sections(found):
    """The stages' own words. Their markdown is rendered with raw HTML and pictures switched off."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    cards = [f'<div class="card"><h3>{escape(str(section["name"]))}</h3>{reader.render(visible(str(section["markdown"])))}{knobs(section["data"])}</div>' for section in found]
    return "<h2>The stages in their own words</h2>" + "".join(cards) if cards else ""


def knobs(data):
    config = data.get("config")
    if not isinstance(config, dict) or not config:
        return ""
    text = "\n".join(f"{name} = {value}" for name, value in config.items())
    return f"<details><summary>settings</summary><pre>{escape(text)}</pre></details>"


def fact_table(facts):
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    return f'<h2>Machine and code</h2><div class="card facts"><table>{rows}</table></div>'


def missing(lines):
    return f'<h2>Not in this report</h2><ul class="missing">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def color(stage):
    return STAGE_COLORS.get(stage, "#8a63b8")


# -- plots ------------------------------------------------------------------------------------------------------------

def figure(width, height, columns=1):
    """A figure of `width` x `height` inches with a row of axes in the page's style -> (figure, list of axes)."""
    result = Figure(figsize=(width, height), layout="constrained")
    result.get_layout_engine().set(wspace=0.07)
    axes = list(result.subplots(1, columns, squeeze=False)[0])
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
