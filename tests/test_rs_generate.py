"""Rejection sampling: what is kept is right, whole, once and capped; a killed run goes on; two ranks are one; only training splits are asked.

Run as a program it is one rank's or one process's run on the toy task: python -m tests.test_rs_generate --num-samples=4
"""
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tasks.common as common
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.compute import Compute
from nanochat.configurator import parse
from nanochat.engine import Completion
from nanochat.gpt import GPT, config_from_depth
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import Tokenizer
from nanochat.training import LoopState
from scripts import rs_generate
from scripts.rs_generate import Config, draw_seed, faithful_content, judge, select
from tasks.common import Task, get_task, message_text, register

ROOT = Path(__file__).parents[1]
ANSWERS = ("a", "bb", "ab", "b ba")
SIZE = 40


class Toy(Task):
    """"problem 3" is answered by one of four words; who guesses is right now and then."""

    def __init__(self, split="train", **kwargs):
        super().__init__(**kwargs)

    def num_examples(self):
        return SIZE

    def get_example(self, index):
        return {"messages": [{"role": "user", "content": f"problem {index}"}, {"role": "assistant", "content": ANSWERS[index % 4]}]}

    def is_correct(self, conversation, completion):
        return completion == message_text(conversation["messages"][-1])


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The toy task is known in this file's tests only: others ask for every task there is."""
    common.task_names()                                 # imports them: a task registers itself once
    monkeypatch.setattr(common, "_registry", dict(common._registry))
    register("rs-toy")(Toy)


@dataclass(frozen=True)
class Parent:
    seed: int = 0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base directory with a tokenizer and a small model that answers any problem with one of the four words, all equally likely."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        tokenizer = Tokenizer.train(["problem 1 a bb ab b ba"], 265)
        tokenizer.save(folder / "tokenizer")
        compute = Compute(torch.device("cpu"), torch.float32)
        torch.manual_seed(0)
        model = GPT(config_from_depth(1, tokenizer.vocab_size, 512, head_dim=32))
        model.init_weights()
        optimizer = MuonAdamW(model, compute)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            rows = []
            for index in torch.randint(0, SIZE, (16,), generator=generator).tolist():
                word = ANSWERS[int(torch.randint(0, 4, (1,), generator=generator))]
                ids, mask = tokenizer.render_conversation({"messages": [{"role": "user", "content": f"problem {index}"}, {"role": "assistant", "content": word}]})
                rows.append((ids + [0] * (40 - len(ids)), mask + [0] * (40 - len(ids))))
            ids, mask = (torch.tensor(part) for part in zip(*rows))
            model(ids[:, :-1], torch.where(mask[:, 1:] == 1, ids[:, 1:], -1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        for stage in ("rl", "sft"):
            save_checkpoint(stage, "toy", LoopState(step=60), Parent(), compute, model, optimizer, tokenizer)
    return folder


@pytest.fixture
def generate(world, tmp_path, monkeypatch):
    """generate(**changes) -> (rows, report) of one run on the toy task, its output in a folder of the test's own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))

    def run(name="rs.jsonl", **changes):
        config = replace(Config(task="rs-toy", device_type="cpu", dtype="float32", max_new_tokens=12, output=str(tmp_path / name)), **changes)
        report = rs_generate.main(config)
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()], report
    return run


# What is written

def test_rows_are_right_answers_that_say_where_they_come_from(generate):
    rows, report = generate(max_per_prompt=-1, dedupe=False, temperature=0.9)
    task = get_task("rs-toy")
    assert len(rows) == report["rows"] > 20
    for row in rows:
        provenance, conversation = row["provenance"], task[row["provenance"]["index"]]
        assert row["messages"][:-1] == conversation["messages"][:-1] and task.is_correct(conversation, message_text(row["messages"][-1]))
        assert provenance["task"] == "rs-toy" and provenance["checkpoint"] == "rl/toy/60" and provenance["temperature"] == 0.9 and provenance["reward"] == 1
        assert provenance["seed"] == draw_seed(Config(), "rs-toy", provenance["index"]) and 0 <= provenance["sample"] < 8
    assert report["rows"] + sum(report["dropped"].values()) == report["samples"] == 8 * SIZE
    toy = report["tasks"]["rs-toy"]
    assert toy["right_samples"] == len(rows) and toy["problems"] == SIZE and toy["ci_low"] < len(rows) / (8 * SIZE) == toy["accuracy"] < toy["ci_high"]


def test_the_rows_can_be_trained_on(generate, tmp_path):
    rows, _ = generate()
    task = get_task("JsonlChat", path=tmp_path / "rs.jsonl")
    assert [conversation["messages"] for conversation in task] == [row["messages"] for row in rows] and not task.skipped


def test_the_report_stands_beside_the_output_and_in_the_runs_report(generate, tmp_path, world):
    _, report = generate()
    assert json.loads((tmp_path / "rs.jsonl.report.json").read_text()) == report
    assert "Rejection sampling from `rl/toy/60`" in json.loads((world / "report" / "rs_generate.json").read_text())["markdown"]


def test_the_default_output_is_in_the_base_directory(generate, world):
    rs_generate.main(Config(task="rs-toy", device_type="cpu", dtype="float32", max_new_tokens=12, source="sft", max_problems=8))
    assert (world / "rs_cot.jsonl").is_file()


def test_neither_chunks_nor_rows_in_flight_change_what_is_drawn(generate):
    rows, _ = generate()
    assert generate("other.jsonl", problems_per_chunk=7, rows_in_flight=5)[0] == rows
    assert generate("third.jsonl", seed=43)[0] != rows


def test_several_tasks_share_a_file(generate):
    rows, report = generate(task="rs-toy | ALGEBRA", max_problems=6)
    assert set(report["tasks"]) == {"rs-toy", "ALGEBRA"} and report["tasks"]["ALGEBRA"]["problems"] == 6 and report["samples"] == 96
    assert {row["provenance"]["task"] for row in rows} == {"rs-toy"}, "this model cannot solve algebra"


def test_permuted_options_are_a_new_order_for_every_problem(monkeypatch):
    task = get_task("ALGEBRA", size=30)
    given, changed = (rs_generate.build_conversation, Config(permute_options=True))
    orders = set()
    for index in range(30):
        plain, moved = given(task, "ALGEBRA", index, Config()), given(task, "ALGEBRA", index, changed)
        assert moved == given(task, "ALGEBRA", index, changed) and task.is_correct(moved, message_text(moved["messages"][-1]))
        orders.add(tuple(moved["permutation"]))
        assert plain == task[index]
    assert len(orders) > 15


# Rules of keeping

def record(index, *answers, dropped=None):
    return {"task": "t", "index": index, "seed": 1, "prompt": [{"role": "user", "content": f"Q{index}"}], "dropped": dropped or {},
            "right": [{"sample": sample, "content": content, "reward": 1.0, "tokens": tokens} for sample, (content, tokens) in enumerate(answers)]}


def kept(records, **rules):
    rows, dropped = select(records, Config(**rules))
    total = sum(len(one["right"]) + sum(one["dropped"].values()) for one in records)
    assert len(rows) + dropped.total() == total, "every sample is kept or counted, once"
    return [message_text(row["messages"][-1]) for row in rows], dict(dropped)


def test_equal_answers_to_a_question_are_kept_once():
    records = [record(0, ("One  two", 3), ("one\ntwo ", 3), ("one three", 3)), record(1, ("one two", 3))]
    assert kept(records, max_per_prompt=-1) == (["One  two", "one three", "one two"], {"duplicate": 1})
    assert kept(records, max_per_prompt=-1, dedupe=False)[1] == {}


def test_caps_on_length_and_number_and_the_shortest():
    records = [record(0, ("a", 9), ("b", 2), ("c", 5), ("d", 2), dropped={"wrong": 4})]
    assert kept(records, max_per_prompt=2) == (["a", "b"], {"wrong": 4, "over max_per_prompt": 2})
    assert kept(records, max_tokens=5) == (["b", "c", "d"], {"wrong": 4, "longer than max_tokens": 1})
    assert kept(records, shortest_k=3) == (["b", "d", "c"], {"wrong": 4, "not among the shortest": 1})
    assert kept(records, min_right=4)[0] == ["a", "b", "c", "d"] and kept(records, min_right=5) == ([], {"wrong": 4, "of problems with too few right ones": 4})
    assert kept(records, shortest_k=3, max_per_prompt=1) == (["b"], {"wrong": 4, "not among the shortest": 1, "over max_per_prompt": 2})


def test_other_rules_keep_otherwise_and_sample_nothing_again(generate, monkeypatch):
    every, _ = generate(max_per_prompt=-1, dedupe=False)
    monkeypatch.setattr(rs_generate.Engine, "generate", lambda self, requests, on_finish: pytest.fail(f"{len(requests)} problems asked again"))
    rows, report = generate(max_per_prompt=1)
    counts = Counter(row["provenance"]["index"] for row in rows)
    assert set(counts.values()) == {1} and set(counts) == {row["provenance"]["index"] for row in every} and report["samples"] == 8 * SIZE


# What is judged right

def completion(tokens, text, reason="stop", mask=None):
    return Completion(tokens, mask or [1] * len(tokens), [0.0] * len(tokens), reason, text)


def test_only_strictly_right_answers_that_end_by_themselves_pass():
    task = SimpleNamespace(rewards=lambda conversation, text: {"correct": {"r": 1.0, "half": 0.5, "none": None}.get(text, 0.0), "format": 0.1})
    assert judge(task, {}, completion([1], "r")) == (None, 1.1)
    assert [judge(task, {}, completion([1], text, reason))[0] for text, reason in (("r", "length"), ("half", "stop"), ("x", "stop"), ("none", "stop"), ("", "length"))] \
        == ["cut off", "wrong", "wrong", "not judged", "cut off"]


def test_what_would_not_read_as_it_was_sampled_is_no_answer(world, monkeypatch):
    tokenizer = Tokenizer.load(world / "tokenizer")
    conversation = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    prompt = tokenizer.render_for_completion(conversation)
    special, end = tokenizer.encode_special, [tokenizer.encode_special("<|assistant_end|>")]

    def content(*pieces, forced=()):
        tokens, mask = [], []
        for piece in pieces:
            ids = [special(piece)] if piece.startswith("<|") else piece if isinstance(piece, list) else tokenizer.encode(piece)
            tokens, mask = tokens + ids, mask + [0 if piece in forced else 1] * len(ids)
        return faithful_content(tokenizer, prompt, completion(tokens, "", mask=mask), conversation)

    END, PY, PYE, OUT, OUTE = (f"<|{name}|>" for name in ("assistant_end", "python_start", "python_end", "output_start", "output_end"))
    assert content("two words", END) == "two words"
    assert content("so ", PY, "1+1", PYE, OUT, "2", OUTE, " it is", END, forced=(OUT, "2", OUTE)) == [
        {"type": "text", "text": "so "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": " it is"}]
    assert content("so ", PY, "1+1", PYE, OUT, "3", OUTE, " it is", END) is None, "the model made the tool's output up"
    assert content("a", PY, "1+1", END) is None and content("a", PYE, "b", END) is None and content("a", "<|user_start|>", "b", END) is None
    assert content("a", "<|bos|>") is None and content(END) is None
    torn = [tokenizer.encode("é")[0]] if len(tokenizer.encode("é")) > 1 else pytest.fail("é is one token")
    assert faithful_content(tokenizer, prompt, completion([*torn, *end], ""), conversation) is None


# What is refused

@pytest.mark.parametrize("changes, message", [
    ({"split": "test"}, "held out"), ({"split": "validation"}, "held out"), ({"task": "JsonlChat"}, "no split"), ({"task": "SmolTalk2"}, "there is no task"),
    ({"num_samples": 0}, "num_samples=0"), ({"temperature": 0.0}, "all samples are the same"), ({"max_per_prompt": 0}, "max_per_prompt=0"), ({"min_right": 9}, "1 to num_samples=8"),
    ({"task": "HumanEval"}, "has no split 'train'"),
])
def test_what_cannot_become_training_data_is_refused_before_any_work(generate, monkeypatch, changes, message):
    monkeypatch.setattr(rs_generate, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message):
        generate(**changes)


def test_a_model_that_solves_nothing_writes_nothing_and_says_so(generate, tmp_path):
    with pytest.raises(ValueError, match="none of 16 samples is kept.*'wrong'"):
        generate(task="ALGEBRA", max_problems=2)
    assert not (tmp_path / "rs.jsonl").exists() and (tmp_path / "rs.jsonl.report.json").exists()


def test_prompts_that_leave_no_room_are_counted(generate, monkeypatch):
    long = {"messages": [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "a"}]}
    monkeypatch.setattr(Toy, "get_example", lambda self, index, original=Toy.get_example: long if index == 3 else original(self, index))
    _, report = generate()
    assert report["dropped"]["prompt too long"] == 8


# Kills and ranks

def flags(output, **changes):
    config = {"task": "rs-toy", "device_type": "cpu", "dtype": "float32", "max_new_tokens": 12, "output": output, **changes}
    return [f"--{name}={value}" for name, value in config.items()]


def start(world, *arguments, ranks=1):
    launcher = [sys.executable, "-m"] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    return subprocess.Popen([*launcher, "tests.test_rs_generate", *arguments], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "NANOCHAT_BASE_DIR": str(world), "OMP_NUM_THREADS": "1"})


def test_a_run_broken_off_anywhere_ends_as_if_never_broken(generate, tmp_path, monkeypatch):
    rows, _ = generate()
    part = tmp_path / "rs.jsonl.rank0.part"
    whole = part.read_bytes()
    for cut in range(0, len(whole), len(whole) // 7):
        (tmp_path / "again.jsonl.rank0.part").write_bytes(whole[:cut])
        assert generate("again.jsonl")[0] == rows
    half = [line for line in whole.splitlines() if line][::2]
    (tmp_path / "again.jsonl.rank0.part").unlink()
    (tmp_path / "again.jsonl.rank5.part").write_bytes(b"\n".join([b"{torn", *half, b"[1]", b"7"]))
    asked, original = [], rs_generate.Engine.generate
    monkeypatch.setattr(rs_generate.Engine, "generate", lambda self, requests, on_finish: (asked.extend(requests), original(self, requests, on_finish))[1])
    assert generate("again.jsonl")[0] == rows and len(asked) == SIZE - len(half), "what another rank had answered was asked again"


def test_samples_of_other_settings_or_weights_are_never_taken_for_these(generate, tmp_path):
    rows, _ = generate(seed=1)
    assert generate(temperature=0.5, seed=1)[0] != rows and generate(seed=1)[0] == rows
    longer, _ = generate(seed=1, max_problems=20)
    assert [row for row in rows if row["provenance"]["index"] in {one["provenance"]["index"] for one in longer}] == longer


def test_kill_9_loses_at_most_what_was_in_flight(world, generate, tmp_path):
    rows, _ = generate()
    arguments = flags(tmp_path / "killed.jsonl", problems_per_chunk=1)
    process = start(world, *arguments)
    deadline, part = time.monotonic() + 60, tmp_path / "killed.jsonl.rank0.part"
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed.jsonl").exists() and part.stat().st_size
    assert generate("killed.jsonl", problems_per_chunk=1)[0] == rows


def test_two_ranks_write_what_one_process_writes(world, generate, tmp_path):
    rows, _ = generate()
    process = start(world, *flags(tmp_path / "two.jsonl"), ranks=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()] == rows
    assert (tmp_path / "two.jsonl.rank0.part").stat().st_size and (tmp_path / "two.jsonl.rank1.part").stat().st_size


if __name__ == "__main__":
    register("rs-toy")(Toy)
    rs_generate.main(parse(Config))
