"""The report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere; plots are inline SVG.

It draws what `report.collect` found and computes nothing that is not also in report.md.
"""
import math

from markdown_it import MarkdownIt

from nanochat.report import COLUMNS, LEGEND, baseline, is_number, percent, result_row, texts, verdict
from nanochat.report_plots import STAGE_COLORS, accuracy_plot, answer_of, by_length, by_level, color, curves, escape, letters_plot, telemetry
from nanochat.run_logger import visible

VERDICT_CLASSES = {"above": "good", "no better": "flat", "below": "bad"}
MAX_SAMPLES = 8
MAX_WRONG = 40     # per evaluation

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
    """What `report.collect` returned -> the whole report as text."""
    body = [page_header(report), tiles(report), results(report["evals"]), accuracy_plot(report["evals"]), by_level(report["evals"]), by_length(report["evals"]),
            curves(report["runs"]), telemetry(report["runs"]), letters_plot(report["evals"]), samples(report), worst_note(report["evals"]), sections(report["sections"]), fact_table(report["facts"]), missing(report["missing"])]
    return whole_page(title(report), body)


def answers_page(report):
    """The wrong answers of every evaluation, the surest first, to be read: numbers do not say what a model gets wrong."""
    body = ["<header><h1>Worst answers</h1><p>Of every evaluation the wrong answers, the surest first: those whose letter was most probable "
            "behind the model's own reasoning; then what could not be read.</p></header>"]
    body += [worst(row) for row in report["evals"] if row.get("answers")]
    return whole_page("Worst answers", body)


def whole_page(heading, body):
    return ("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
            f"<title>{escape(heading)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n" + "\n".join(filter(None, body)) + "\n</main>\n</body>\n</html>\n")


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


# -- the answers to read ----------------------------------------------------------------------------------------------

def worst_note(evals):
    return '<p class="lead">The wrong answers of every evaluation, the surest first: <a href="answers.html">answers.html</a>.</p>' if any(
        row.get("answers") for row in evals) else ""


def worst(row):
    wrong = [answer for answer in row["answers"] if not answer_of(answer).get("correct")]
    chosen = sorted(wrong, key=sureness, reverse=True)[:MAX_WRONG]
    words = f"{len(wrong):,} of {len(row['answers']):,} answers are wrong" + (f"; the {len(chosen)} surest:" if len(chosen) < len(wrong) else ":")
    return (f'<h2>{escape(row["task"])} · {escape(row["stage"])} {escape(row["model_tag"])}</h2><p class="lead">{escape(words)}</p>'
            f'<div class="card">{"".join(map(wrong_answer, chosen))}</div>')


def sureness(answer):
    """The probability of the answered letter behind the reasoning; below 0 where there is none to read."""
    logprobs = (answer.get("after_reasoning") or {}).get("logprobs") or {}
    written = answer_of(answer).get("answer")
    return math.exp(logprobs[written]) if is_number(logprobs.get(written)) else -1.0


def wrong_answer(answer):
    said, sure = answer_of(answer), sureness(answer)
    facts = [f"problem {answer.get('index')}", f"right: {answer.get('gold')}", f"answered: {said.get('answer') or 'nothing that can be read'}"]
    facts += [f"{name} {answer[name]}" for name in ("level", "kind") if answer.get(name) is not None]
    facts += [f"{100 * sure:.1f} % sure"] if sure >= 0 else []
    facts += ["cut off"] if said.get("finish_reason") == "length" else []
    return (f'<div class="sample"><div class="head">{escape(" · ".join(facts))}</div><pre>{escape(str(answer.get("prompt", "")))}</pre>'
            f'<div class="answer"><pre>{escape(str(said.get("text", "")))}</pre></div></div>')
