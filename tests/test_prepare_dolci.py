"""Dolci-Think prepared: English, short enough, stratified, the same for any order of the source, with every row accounted for."""
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts import prepare_dolci_think
from scripts.prepare_dolci_think import STRATA, STRATUM_OF, Config, Sample, is_english, quotas
from tasks.common import get_task
from tasks.dolci_think import CATEGORIES
from tests.fakes.hub import FakeHub

ROOT = Path(__file__).parents[1]
TRACE = "We want to know what the sum is. The first number is small. Then there is the other one. So we add them."


def row(number, category, trace=TRACE, question="What is the sum of these two numbers?", **fields):
    return {"messages": [{"role": "user", "content": f"{question} ({category} {number})"}, {"role": "assistant", "content": f"<think>{trace}</think>The sum is {number}."}],
            "category": category, **fields}


def plenty(each=100):
    return [row(number, category) for category in CATEGORIES for number in range(each)]


@pytest.fixture
def prepare(tmp_path):
    """prepare(rows, **changes) -> (the rows written, the report)"""
    def run(rows, output="out.jsonl", **changes):
        source = tmp_path / "source.jsonl"
        source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows), encoding="utf-8")
        config = replace(Config(source=str(source), output=str(tmp_path / output), target_rows=100, tokens_per_word=1.5), **changes)
        report = prepare_dolci_think.main(config)
        return [json.loads(line) for line in (tmp_path / output).read_text(encoding="utf-8").splitlines()], report
    return run


# The mix

def test_the_strata_have_their_shares(prepare):
    rows, report = prepare(plenty())
    assert Counter(STRATUM_OF[one["category"]] for one in rows) == {"structured reasoning": 40, "coding": 20, "instruction and chat": 15, "safety": 10, "short reasoning": 15}
    assert {name: facts["percent"] for name, facts in report["strata"].items()} == {name: percent for name, (percent, _) in STRATA.items()}
    assert set(STRATUM_OF) == set(CATEGORIES) and report["rows"] == 100


@given(st.integers(1, 10**7))
def test_quotas_sum_to_the_target(target):
    rows = quotas(target)
    assert sum(rows.values()) == target and all(abs(rows[name] - target * percent / 100) < 1 for name, (percent, _) in STRATA.items())


def test_a_scarce_stratum_is_reported_or_shrinks_the_others(prepare, capsys):
    scarce = [one for one in plenty() if one["category"] != "safety"] + [row(number, "safety") for number in range(4)]
    rows, report = prepare(scarce)
    assert len(rows) == 94 and report["strata"]["safety"] == {"wanted_rows": 10, "rows": 4, "wanted_percent": 10, "percent": 4.255}
    assert "6 rows fewer than wanted" in capsys.readouterr().out
    rows, report = prepare(scarce, exact_mix=True)
    assert len(rows) == 40 and {name: facts["percent"] for name, facts in report["strata"].items()} == {name: percent for name, (percent, _) in STRATA.items()}
    with pytest.raises(ValueError, match="a stratum is empty"):
        prepare([one for one in plenty() if one["category"] != "safety"], exact_mix=True)


def test_neither_the_order_nor_the_repetition_of_rows_changes_the_file(prepare, tmp_path):
    rows = plenty()
    first = prepare(rows)[0]
    random.Random(0).shuffle(rows)
    again, report = prepare(rows + rows[:50], "again.jsonl")
    assert again == first and report["dropped"]["duplicate"] == 50
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert prepare(rows, "other.jsonl", seed=1)[0] != first
    assert [one["category"] for one in first] != sorted(one["category"] for one in first), "the rows stand mixed"


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=60), st.integers(0, 20))
def test_a_sample_keeps_the_lowest_ranks_of_any_order(ranks, size):
    sample = Sample(size)
    for position, rank in enumerate(ranks):
        if sample.wants(rank):
            sample.add(rank, position, 1, "c")
    assert [entry[0] for entry in sample.lowest(size)] == sorted(ranks)[:size]


# The filters

def test_every_row_is_accounted_for(prepare):
    bad = ["{torn", "[1]", {"messages": []}, row(0, "chat", question="请解释这个问题的答案是什么"), row(1, "chat", trace=TRACE * 200),
           {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "no trace"}]},
           {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>never"}]}]
    rows, report = prepare(plenty() + bad)
    dropped = dict(report["dropped"])
    assert dropped.pop("usable, but not in the sample") == 700
    assert dropped == {"not a JSON object": 2, "no question and answer": 1, "not English": 1, "longer than max_tokens": 1, "no trace to learn from": 1, "a trace never ends": 1}
    assert report["source_rows"] == len(rows) + sum(report["dropped"].values()) == 807
    assert sum(facts["usable"] for facts in report["categories"].values()) == report["usable_rows"] == 800


@pytest.mark.parametrize("text", [
    "What is the capital of France?", "Solve 3x + 2 = 5", "Compute $\\int_0^1 x^2 dx$.", "Hi", "2+2?", "List prime numbers below fifty",
    "Write a function: ```python\n# función que devuelve la raíz de un número para los usuarios\n```", "Explain how a naïve café owner would compute the price.",
    "def f(x): return x", "Per person, die rolls van: what is the expected value of them?", "🙂 thanks!",
])
def test_english_passes(text):
    assert is_english([{"role": "user", "content": text}, {"role": "assistant", "content": TRACE}])


@pytest.mark.parametrize("text", [
    "请解释这个问题", "Объясните, пожалуйста, что это такое", "¿Cuál es la capital de Francia?", "Was ist die Hauptstadt von Frankreich und wie viele Menschen leben dort?",
    "Quelle est la capitale de la France et combien de personnes vivent dans cette ville ?", "Qual è la capitale della Francia e quante persone vivono in città che di solito?",
    "Mitä tarkoittaa että talo on suuri ja kaunis sekä vanha mutta hyvin hoidettu kaikilta osiltaan vaikka se sijaitsee kaukana keskustasta",
    "フランスの首都はどこですか", "Translate to Chinese: 你好世界你好世界你好",
])
def test_other_languages_do_not(text):
    assert not is_english([{"role": "user", "content": text}, {"role": "assistant", "content": TRACE}])
    if len(text) > 60:
        assert not is_english([{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}])


def test_lengths_are_counted_by_the_trained_tokenizer(prepare, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="tokens-per-word"):
        prepare(plenty(), tokens_per_word=0.0)
    from nanochat.tokenizer import Tokenizer
    tokenizer = Tokenizer.train([TRACE], 300)
    tokenizer.save(tmp_path / "tokenizer")
    rows, _ = prepare(plenty(), tokens_per_word=0.0, max_tokens=10_000)
    lengths = sorted(len(tokenizer.render_conversation(one, max_tokens=10_000)[0]) for one in rows)
    limit = lengths[len(lengths) // 2]
    rows, _ = prepare(plenty(), tokens_per_word=0.0, max_tokens=limit)
    assert max(len(tokenizer.render_conversation(one, max_tokens=10_000)[0]) for one in rows) == limit


# Files

def test_the_file_is_what_dolci_think_reads(prepare, tmp_path):
    rows, _ = prepare(plenty())
    task = get_task("DolciThink", local_path=tmp_path / "out.jsonl")
    assert [{"messages": one["messages"], "category": one["category"]} for one in task] == rows and not task.skipped
    assert len(get_task("DolciThink", local_path=tmp_path / "out.jsonl", category_filter=("short_reasoning", "chat"), mode="answer_only")) == 30


def test_a_failure_leaves_the_old_file_and_nothing_else(prepare, tmp_path, monkeypatch):
    before, _ = prepare(plenty())
    monkeypatch.setattr(prepare_dolci_think, "categorize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(plenty(), seed=1)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.report.json", "source.jsonl"]


def test_nothing_to_keep_and_a_missing_source_are_errors(prepare, tmp_path):
    with pytest.raises(ValueError, match="none of 1 rows is kept"):
        prepare(["{torn"])
    with pytest.raises(ValueError, match="is not a file"):
        prepare([], source=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="target_rows=0"):
        prepare(plenty(), target_rows=0)


def test_memory_does_not_grow_with_the_texts(tmp_path):
    filler = "and the other thing that we know of this is so " * 500
    source = tmp_path / "big.jsonl"
    source.write_text("".join(json.dumps(row(number, CATEGORIES[number % 8], trace=TRACE + filler)) + "\n" for number in range(300)))
    config = Config(source=str(source), output=str(tmp_path / "out.jsonl"), target_rows=250, max_tokens=50_000, tokens_per_word=1.5)
    tracemalloc.start()
    report = prepare_dolci_think.main(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report["rows"] > 150 and source.stat().st_size > 7_000_000 and peak < 1_500_000


def test_the_script_streams_from_the_hub(tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    (published / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in plenty(20)))
    with FakeHub({"datasets/me/dolci": published}) as hub:
        run = subprocess.run([sys.executable, "-m", "scripts.prepare_dolci_think", "--source=me/dolci", f"--output={tmp_path / 'out.jsonl'}", "--target_rows=40",
                              "--max_tokens=1500", "--tokens-per-word=1.5"], cwd=ROOT, capture_output=True, text=True, timeout=120,
                             env={**os.environ, **hub.env(tmp_path / "home"), "NANOCHAT_BASE_DIR": str(tmp_path / "base")})
    assert run.returncode == 0, run.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 40 and "40 of 160 rows" in run.stdout
