"""MBPP: its two parts, the release's own files, and code judged by its asserts in the sandbox."""
import json

import pytest

from nanochat.execution import sandbox_refusal
from tasks import mbpp
from tasks.common import get_task, message_text

needs_sandbox = pytest.mark.skipif(sandbox_refusal() is not None, reason=f"no sandbox: {sandbox_refusal()}")
ROW = {"task_id": 11, "text": "Write a function to add one.", "code": "def inc(x):\r\n    return x + 1", "test_list": ["assert inc(1) == 2", "assert inc(5) == 6"],
       "test_setup_code": "", "challenge_test_list": []}
SETUP_ROW = {**ROW, "task_id": 601, "text": "Sum a tree.", "code": "def total(node):\n    return node.value", "test_setup_code": "class Node:\n    value = 3",
             "test_list": ["assert total(Node()) == 3"]}
SANITIZED = {"task_id": 520, "prompt": "Area of a circle.", "code": "def area(r):\n    return math.pi * r * r", "source_file": "x",
             "test_list": ["assert math.isclose(area(2), 12.566370614)"], "test_imports": ["import math"]}


def release(folder):
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROW, SETUP_ROW)))
    (folder / "sanitized-mbpp.json").write_text(json.dumps([SANITIZED]))
    return folder


def test_the_releases_own_files_are_split_by_number(tmp_path):
    release(tmp_path)
    assert [len(get_task("MBPP", split=split, data_dir=tmp_path)) for split in ("prompt", "test", "validation", "train")] == [0, 1, 0, 1]
    assert len(get_task("MBPP-Sanitized", split="validation", data_dir=tmp_path)) == 1
    conversation = get_task("MBPP", split="test", data_dir=tmp_path)[0]
    assert message_text(conversation["messages"][0]) == ("Write a function to add one.\nYour code must pass these tests:\n```python\nassert inc(1) == 2\n"
                                                         "assert inc(5) == 6\n```")
    assert message_text(conversation["messages"][1]) == "```python\ndef inc(x):\n    return x + 1\n```"
    with pytest.raises(ValueError, match="4 splits are prompt, test"):
        get_task("MBPP", split="dev", data_dir=tmp_path)
    with pytest.raises(ValueError, match="full, sanitized"):
        get_task("MBPP", subset="half", data_dir=tmp_path)


def test_the_splits_are_disjoint_and_cover_974_problems():
    numbers = sorted(number for numbers in mbpp.SPLITS.values() for number in numbers)
    assert numbers == list(range(1, 975)) and len(mbpp.SPLITS["test"]) == 500


@needs_sandbox
def test_setup_and_imports_are_there_for_code_and_tests(tmp_path):
    release(tmp_path)
    for task in (get_task("MBPP", split="train", data_dir=tmp_path), get_task("MBPP-Sanitized", split="validation", data_dir=tmp_path)):
        assert task.is_correct(task[0], message_text(task[0]["messages"][-1])) and not task.is_correct(task[0], "")


@needs_sandbox
@pytest.mark.parametrize("text, right", [
    ("def inc(x): return x + 1", True), ("Sure:\n```python\ninc = lambda x: x + 1\n```\nDone.", True), ("def inc(x): return 2", False), ("def inc(x)", False),
    ("import os\nos._exit(0)", False), ("raise SystemExit(0)", False), ("while True: pass", False), ("no code at all", False)])
def test_code_is_right_if_every_assert_holds(text, right, tmp_path, monkeypatch):
    monkeypatch.setattr(mbpp, "SECONDS", 1.0)
    task = get_task("MBPP", split="test", data_dir=release(tmp_path))
    assert task.is_correct(task[0], text) is right


def test_without_a_sandbox_code_runs_only_if_weakness_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.execution.sandbox_refusal", lambda: "bwrap not found")
    task = get_task("MBPP", split="test", data_dir=release(tmp_path))
    with pytest.raises(RuntimeError, match="allow_weak"):
        task.is_correct(task[0], "def inc(x): return x + 1")
    task = get_task("MBPP", split="test", data_dir=tmp_path, allow_weak=True)
    assert task.is_correct(task[0], "def inc(x): return x + 1") and not task.is_correct(task[0], "def inc(x): return x")
