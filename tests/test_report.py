"""The report: sections in order, numbers beside what blind answers score, nothing crashes on what is missing, all is escaped."""
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from nanochat import report
from nanochat.compute import Compute
from nanochat.report import Config, add_section, collect, markdown_page, result_row, sparkline, summary, verdict
from nanochat.report_page import html_page
from nanochat.report_plots import fifths, running_mean
from nanochat.run_logger import RunLogger

ROOT = Path(__file__).parent.parent
EVIL = "\x00\x1b[2J<script>alert('x')</script> & <img src=http://example.invalid/x.png>"


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@dataclass(frozen=True)
class RunConfig:
    run: str = "dummy"
    model_tag: str = "d2"


def log_run(stage, steps, metrics, tag="d2", text=None):
    logger = RunLogger(stage, RunConfig(model_tag=tag), Compute(torch.device("cpu"), torch.float32))
    for step in range(steps):
        logger.log(step, metrics(step))
    if text:
        logger.log_text(steps, "samples", text)
    logger.close()


def write_eval(base, name="sft_AQUA", **changes):
    row = {"stage": "sft", "model_tag": "d2", "step": 7, "task": "AQUA", "split": "validation", "n": 254, "settings": {},
           "metrics": {"accuracy": 0.3031, "ci_low": 0.25, "ci_high": 0.362, "best_constant": {"letter": "A", "share": 0.2756}, "random_accuracy": 0.2,
                       "no_reasoning": 0.25, "parse_failures": 2, "letters_pred": {"A": 200, "B": 52, "none": 2}, "letters_gold": {"A": 70, "B": 184},
                       "mean_tokens": 88.2}}
    (base / "eval").mkdir(parents=True, exist_ok=True)
    (base / "eval" / f"{name}.json").write_text(json.dumps({**row, **changes}))


def full_report(base):
    add_section("rl", "last", {"seconds": 60})
    add_section("base", f"first {EVIL}\n\n| a | b |\n|---|---|\n| 1 | {EVIL} |", {"seconds": 7200, "parameters": 12345678, "tokens": 1e9, "val_bpb": 0.91,
                                                                          "config": {"name": EVIL}})
    add_section("my-own", "a stage nobody knows")
    log_run("base", 50, lambda step: {"train/loss": 5 / (step + 1), "val/bpb": 2 / (step + 1)}, text=EVIL)
    log_run("rl", 30, lambda step: {"rl/mean_reward": step / 30, "rl/acc": step / 40, "completions/mean_length": 50.0, "completions/min_length": 3,
                                    "completions/max_length": 90})
    write_eval(base, samples=[{"question": EVIL, "completion": EVIL * 40, "predicted": "A", "gold": "B", "correct": False}])
    write_eval(base, "rl_AQUA", stage="rl", metrics={"accuracy": 0.45})
    return collect(Config(cost_per_hour=2.0))


class Strict(HTMLParser):
    """Notes every tag and checks that what is opened is closed."""
    VOID = {"meta", "br", "hr"}

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_sections_arrive_in_the_order_of_the_stages_and_a_rerun_replaces_its_own(base):
    for name in ("rl", "own", "base", "tok_train"):
        add_section(name, f"{name} text")
    add_section("base", "base again")
    page = markdown_page(collect(Config()))
    places = [page.index(f"## {name}") for name in ("tok_train", "base", "rl", "own")]
    assert places == sorted(places) and "base again" in page and "base text" not in page


def test_an_empty_folder_gives_a_report_that_says_what_is_missing():
    found = collect(Config())
    for page in (markdown_page(found), html_page(found), summary(found)):
        for stage in ("base", "mid", "sft", "rl"):
            assert f"No log of stage {stage}" in page
        assert "No evaluation" in page


def test_the_page_is_one_valid_file_without_script_or_foreign_source(base):
    page = html_page(full_report(base))
    parser = Strict()
    parser.feed(page)
    assert parser.open == [] and "script" not in parser.seen and "img" not in parser.seen and parser.sources == []
    assert "\x00" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page and page.count("<svg") == 5
    assert len(re.findall(r'\bid="([^"]+)"', page)) == len(set(re.findall(r'\bid="([^"]+)"', page))), "ids of two plots meet"


def test_the_plots_are_the_same_every_time(base):
    found = full_report(base)
    assert html_page(found) == html_page(found)


def test_the_table_shows_accuracy_between_its_interval_and_what_blind_answers_score(base):
    page = markdown_page(full_report(base))
    row = next(line for line in page.splitlines() if line.startswith("| sft | d2@7"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["sft", "d2@7", "AQUA validation", "254", "30.3 %", "25.0 – 36.2", "27.6 % (A)",
                                                                    "20.0 %", "25.0 %", "0.8 %", "88", "no better"]
    assert "2 h 01 min (base 2 h 00 min, rl 1 min 00 s)" in page and "$4.03" in page


@pytest.mark.parametrize("low, high, expected", [(0.28, 0.4, "above"), (0.25, 0.4, "no better"), (0.1, 0.2, "below"), (None, None, "-")])
def test_only_a_whole_interval_above_blind_answers_counts_as_above(low, high, expected):
    row = {"metrics": {"ci_low": low, "ci_high": high, "best_constant": {"letter": "A", "share": 0.2756}, "random_accuracy": 0.2}}
    assert verdict(row) == expected


def test_an_evaluation_may_lack_every_key(base):
    (base / "eval").mkdir(parents=True)
    for index, content in enumerate(("{}", '{"metrics": null}', '{"task": "X", "metrics": {"accuracy": 0.5, "best_constant": 0.4, "parse_failures": 0.25}, "n": 10}',
                                     "[1, 2]", '{"torn', '{"stage": "rl", "n": 0, "metrics": {"accuracy": 0.0, "letters_pred": {}, "letters_gold": {}}}')):
        (base / "eval" / f"{index}.json").write_text(content)
    found = collect(Config())
    assert len(found["evals"]) == 4 and any("3.json" in line for line in found["missing"]) and any("4.json" in line for line in found["missing"])
    rows = [result_row(row) for row in found["evals"]]
    assert ["40.0 %", "25.0 %"] == [next(row for row in rows if row[2] == "X")[place] for place in (6, 9)]
    for page in (markdown_page(found), html_page(found), summary(found)):
        assert "50.0 %" in page


def test_logs_that_are_torn_or_without_a_header_still_count(base):
    (base / "runs").mkdir(parents=True)
    (base / "runs" / "sft_d9.jsonl").write_text('{"step": 0, "train/loss": 2.0}\n{"step": 1, "train/loss": null, "non_finite": ["train/loss"]}\n{"st')
    found = collect(Config())
    assert found["runs"][0]["stage"] == "sft" and found["runs"][0]["model_tag"] == "d9"
    assert report.series(found["runs"][0], "train/loss") == ([0], [2.0])
    assert "no header line" in " ".join(found["missing"]) and "Training loss" in html_page(found)


def test_a_repeated_evaluation_replaces_the_older_one(base):
    write_eval(base, "old", time=1.0, metrics={"accuracy": 0.1})
    write_eval(base, "new", time=2.0, metrics={"accuracy": 0.9})
    (row,) = collect(Config())["evals"]
    assert row["metrics"]["accuracy"] == 0.9


def test_summarize_can_be_limited_to_one_run_and_says_when_there_is_none(base):
    write_eval(base)
    write_eval(base, "other", model_tag="d3")
    log_run("base", 3, lambda step: {"train/loss": 1.0})
    log_run("base", 3, lambda step: {"train/loss": 1.0}, tag="d3")
    only = summary(collect(Config(run="d3")))
    assert "d3" in only and "d2" not in only
    everything = summary(collect(Config(run="nothing")))
    assert "d2@7" in everything and "No run and no model is called nothing" in everything


def test_the_three_commands_run_from_the_command_line(base, tmp_path, monkeypatch, capsys):
    full_report(base)
    report.main("generate", Config(copy_to=str(tmp_path / "copy")))
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"answers.html", "report.md", "report.html"}
    run = subprocess.run([sys.executable, "-m", "nanochat.report", "--", "summarize", "d2"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "AQUA validation" in run.stdout, run.stderr
    report.main("reset", Config())
    assert not list((base / "report").iterdir()) and list((base / "runs").iterdir()) and list((base / "eval").iterdir())
    wrong = subprocess.run([sys.executable, "-m", "nanochat.report", "nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert wrong.returncode != 0 and "reset|generate|summarize" in wrong.stderr


def test_a_section_name_cannot_leave_the_folder():
    with pytest.raises(ValueError, match="section name"):
        add_section("../evil", "text")


def test_smoothing_keeps_a_straight_line_straight_but_for_its_end_and_sparklines_span_their_range():
    line = [float(i) for i in range(100)]
    assert running_mean(line)[:90] == pytest.approx(line[:90])
    assert sparkline([0.0, 1.0]) == "▁█" and len(sparkline(line)) == 24 and sparkline([3.0]) == "▁"


def write_answers(base, name="sft_AQUA", count=254):
    """Every third is wrong; the later, the surer and the longer."""
    rows = [{"index": index, "prompt": f"Question {index} {EVIL}", "gold": "A", "level": 1 + index % 3,
             "after_reasoning": {"answer": "B", "logprobs": {"A": -4.0, "B": -1 / (1 + index)}},
             "completions": [{"text": EVIL, "answer": "A" if index % 3 else "B", "correct": bool(index % 3), "finish_reason": "stop", "tokens": 10 + index}]}
            for index in range(count)]
    (base / "eval" / f"{name}_answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_the_worst_answers_are_the_wrong_ones_surest_first_and_model_output_stays_text(base):
    write_eval(base)
    write_answers(base)
    report.main("generate", Config())
    page = (base / "report" / "answers.html").read_text()
    shown = [int(number) for number in re.findall(r"problem (\d+) · right: A · answered: B", page)]
    assert shown == list(range(252, 132, -3)) and "85 of 254 answers are wrong; the 40 surest" in page
    strict = Strict()
    strict.feed(page)
    assert not strict.open and "script" not in strict.seen and "img" not in strict.seen
    assert 'href="answers.html"' in (base / "report" / "report.html").read_text()


def test_answers_that_do_not_fit_their_summary_are_named_and_left_out(base):
    write_eval(base)
    write_answers(base, count=253)
    report.main("generate", Config())
    assert "holds 253 answers, its summary counts 254" in (base / "report" / "report.html").read_text()
    assert "Question" not in (base / "report" / "answers.html").read_text()


def test_accuracy_by_length_is_that_of_fifths_and_rl_telemetry_is_drawn(base):
    write_eval(base, metrics={"accuracy": 2 / 3, "by_level": {"1": {"n": 85, "accuracy": 0.0, "ci_low": 0.0, "ci_high": 0.05},
                                                              "2": {"n": 169, "accuracy": 1.0, "ci_low": 0.97, "ci_high": 1.0}}})
    rows = write_answers(base)
    points = fifths({"answers": rows})
    assert [x for x, *_ in points] == [35, 85, 136, 187, 238] and all(0.6 < accuracy < 0.7 and low < accuracy < high for _, accuracy, low, high in points)
    evaluated = {"eval/accuracy": 0.4, "eval/ci_low": 0.3, "eval/ci_high": 0.5, "eval/pass@2": 0.5, "eval/pass@16": 0.9}
    log_run("rl", 30, lambda step: {**(evaluated if step % 10 == 0 else {}), "rl/kl_sequence_mean": step / 10, "frac_reward_zero_std": 0.3, "rl/letter_pred_counts/A": step, "rl/letter_pred_counts/B": 30 - step})
    report.main("generate", Config())
    page = (base / "report" / "report.html").read_text()
    assert all(words in page for words in ("Accuracy by level", "Accuracy by length of the answer", "What RL does to the policy", "letters answered", "accuracy on held-out problems, pass@16 dashed"))
