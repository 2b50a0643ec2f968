"""Rows of any shape become conversations, traces and answers come apart, and OpenThoughts is a random-access task."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.common import get_task, message_text
from tasks.reasoning import JsonLines, final_answer, in_mode, normalized_answer, read_messages, split_trace, with_trace
from tests.fakes.hub import FakeHub

ROOT = Path(__file__).parents[1]


def row(number, **changes):
    return {"conversations": [{"from": "human", "value": f"What is {number} + 1?"},
                              {"from": "gpt", "value": f"<think>\nOne more than {number}.\n</think>\n\nFinal Answer: {number + 1}"}], **changes}


def write_rows(path, rows):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows), encoding="utf-8")
    return path


def pairs(task):
    return [(conversation["messages"][0]["content"], message_text(conversation["messages"][-1])) for conversation in task]


# Rows

@pytest.mark.parametrize("raw", [
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"conversation": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"conversations": [{"speaker": "Prompter", "text": "Q"}, {"speaker": "Bot", "text": " A "}]},
    {"Conversations": [{"author": "human", "content": "Q"}, {"author": "model", "content": [{"type": "text", "text": "A"}]}]},
    {"messages": [{"type": "human", "value": "Q"}, {"type": "ai", "value": "A"}]},
    {"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}},
    {"question": "Q", "answer": "A"}, {"prompt": "Q", "completion": "A"}, {"instruction": "Q", "input": "", "output": "A"},
    {"Problem": "Q", "Solution": "A"}, {"query": "Q", "response": "A"}, {"input": "Q", "final": "A"}, {"messages": [], "question": "Q", "answer": "A"},
])
def test_columns_and_roles_are_guessed(raw):
    assert read_messages(raw) == ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], None)


def test_an_instruction_keeps_the_input_it_speaks_of():
    messages, _ = read_messages({"instruction": "Add them.", "input": "1 and 2", "output": "3"})
    assert messages[0]["content"] == "Add them.\n\n1 and 2"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking", "chain_of_thought"])
def test_a_reasoning_column_becomes_a_trace_unless_there_is_one(name):
    messages, _ = read_messages({"question": "Q", name: "R", "answer": "A"})
    assert messages[1]["content"] == "<think>\nR\n</think>\n\nA"
    assert read_messages({"question": "Q", name: "R", "answer": "<think>own</think>A"})[0][1]["content"] == "<think>own</think>A"
    assert read_messages({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", name: "R"}]})[0] == messages


@pytest.mark.parametrize("raw", [
    None, 7, [], "text", {}, {"question": "Q"}, {"answer": "A"}, {"question": " ", "answer": "A"}, {"question": 3, "answer": 4}, {"messages": [1, 2]},
    {"messages": [{"role": "narrator", "content": "Q"}, {"role": "assistant", "content": "A"}]}, {"messages": [{"role": "user", "content": "Q"}]},
    {"messages": [{"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"}]}, {"messages": {"role": "user"}},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None}]},
    {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "A"}]},
])
def test_what_is_no_conversation_has_a_reason(raw):
    messages, reason = read_messages(raw)
    assert messages is None and isinstance(reason, str) and reason


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(["user", "human", "gpt", "<think>", "</think>"]),
                    lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["messages", "conversations", "role", "from", "content", "value", "question", "answer", "reasoning"]), inner, max_size=4),
                    max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_no_row_raises(raw):
    messages, reason = read_messages(raw)
    assert (messages is None) != (reason is None)
    if messages:
        for mode in ("cot", "answer_only"):
            kept, why = in_mode(messages, mode, final_answer)
            assert (kept is None) != (why is None)


# Traces and answers

@pytest.mark.parametrize("text, parts", [
    ("<think>R</think>A", ("R", "A")), ("R</think>\n\nA", ("R", "A")), ("A", ("", "A")), ("<think>R", None), ("<think></think>A", ("", "A")),
    ("<|begin_of_thought|>R<|end_of_thought|> <|begin_of_solution|>A<|end_of_solution|>", ("R", "A")), ("<think>R</think>", ("R", "")),
    ("<think>a</think>b</think>A", ("a</think>b", "A")),
])
def test_traces_and_answers_come_apart(text, parts):
    assert split_trace(text) == parts


@pytest.mark.parametrize("text, answer", [
    ("<think>Answer: 1</think>It is 2.\n<final>3</final>", "3"), ("<final>1</final> no, <final> 2 </final>", "2"), ("Answer: 1\nFinal Answer: 2", "2"),
    ("Final Answer: 2\nAnswer: 1", "2\nAnswer: 1"), ("Final: 4", "4"), ("**Final Answer:** 5", "5"), ("**Answer**: 6", "6"), ("so\n#### 7", "7"),
    ("Answer: 1 or\nAnswer: 2", "2"), ("semifinal: 3", "semifinal: 3"), ("<think>8</think>\n\nNine it is.", "Nine it is."),
    ("<think>Answer: 1", None), ("Answer:", None), ("", None),
])
def test_final_answers_are_found_outside_the_trace(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("one, other", [
    ("Final Answer: 1,000", "#### 1000.0"), ("The area is \\boxed{12}.", "Answer: 12"), ("Answer: $\\boxed{\\frac{1}{2}}$", "\\boxed{\\frac{1}{2}}"),
    ("Answer: Paris.", "<think>France</think>answer: **paris**"), ("Answer: 1/2", "Answer: 0.5"), ("Answer: two  words", "Answer: Two words"),
])
def test_equal_answers_have_one_spelling(one, other):
    assert normalized_answer(one) == normalized_answer(other) is not None


@pytest.mark.parametrize("text", ["", "<think>Answer: 7", "Answer: 70", "Answer: -7", "<think>Answer: 7</think>Answer: 8", "Answer: 7 or 8"])
def test_another_answer_is_wrong(tmp_path, text):
    task = get_task("OpenThoughts", local_path=write_rows(tmp_path / "x.jsonl", [row(6)]))
    assert not task.is_correct(task[0], text) and task.is_correct(task[0], "Answer: 7") and task.reward(task[0], "<think>x</think> #### 7.0") == 1


# The task

def test_modes_keep_or_drop_the_trace(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [row(6), {"question": "Q", "reasoning": "R", "answer": "Answer: A"}])
    assert pairs(get_task("OpenThoughts", local_path=path, shuffle=False)) == [
        ("What is 6 + 1?", with_trace("One more than 6.", "Final Answer: 7")), ("Q", with_trace("R", "Answer: A"))]
    assert pairs(get_task("OpenThoughts", local_path=path, mode="answer_only", shuffle=False)) == [("What is 6 + 1?", "7"), ("Q", "A")]
    with pytest.raises(ValueError, match="cot, answer_only"):
        get_task("OpenThoughts", local_path=path, mode="short")


def test_every_reference_answer_is_right_and_none_is_wrong(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [row(number) for number in range(20)])
    for mode in ("cot", "answer_only"):
        task = get_task("OpenThoughts", local_path=path, mode=mode)
        assert all(task.reward(conversation, message_text(conversation["messages"][-1])) == 1 and not task.is_correct(conversation, "") for conversation in task)


def test_bad_rows_are_counted_and_left_out(tmp_path):
    unfinished = {"question": "Q", "answer": "<think>never"}
    path = write_rows(tmp_path / "x.jsonl", [row(1), "{torn", "", "[1]", {"question": "Q"}, unfinished, {"question": "Q", "answer": "plain"}, row(2)])
    task = get_task("OpenThoughts", local_path=path, shuffle=False)
    assert [question for question, _ in pairs(task)] == ["What is 1 + 1?", "What is 2 + 1?"]
    assert task.skipped == {"not a JSON object": 2, "no question and answer": 1, "a trace never ends": 1, "no trace to learn from": 1}
    with pytest.raises(ValueError, match="none of the 1 rows.*a trace never ends"):
        get_task("OpenThoughts", local_path=write_rows(tmp_path / "bad.jsonl", [unfinished]))


def test_the_order_is_the_seeds_and_stop_clamps(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [row(number) for number in range(50)])
    plain = pairs(get_task("OpenThoughts", local_path=path, shuffle=False))
    order = list(range(50))
    random.Random(42).shuffle(order)
    shuffled = [plain[place] for place in order]
    assert pairs(get_task("OpenThoughts", local_path=path)) == shuffled
    for stop in (0, 1, 7, 50, 1_000_000):
        task = get_task("OpenThoughts", local_path=path, stop=stop)
        assert pairs(task) == shuffled[:stop] and len(task) == min(stop, 50)
    assert pairs(get_task("OpenThoughts", local_path=path, start=5, stop=20, step=3)) == shuffled[5:20:3]
    task = get_task("OpenThoughts", local_path=path)
    assert [pairs([task[index]])[0] for index in (49, 0, 13)] == [shuffled[index] for index in (49, 0, 13)]


def test_only_as_many_rows_are_read_as_stop_needs(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "x.jsonl", [row(number) for number in range(500)])
    read, original = [], JsonLines.__getitem__
    monkeypatch.setattr(JsonLines, "__getitem__", lambda self, index: (read.append(index), original(self, index))[1])
    assert len(get_task("OpenThoughts", local_path=path, stop=10)) == 10 and len(read) == 10


def test_lines_are_found_by_their_places(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"a": "é"}\n\n   \r\n[2]\r\n{torn\n"\xff"\n{"last": 1}'.encode("latin-1").replace("é".encode("latin-1"), "é".encode()))
    lines = JsonLines(path)
    assert [lines[index] for index in range(len(lines))] == [{"a": "é"}, [2], None, "\ufffd", {"last": 1}]
    assert [lines[index] for index in (4, 0)] == [{"last": 1}, {"a": "é"}]


def test_a_missing_file_and_another_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        get_task("OpenThoughts", local_path=tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="1 split, train, and has no 'test'"):
        get_task("OpenThoughts", local_path=write_rows(tmp_path / "x.jsonl", [row(1)]), split="test")


def test_the_hub_serves_the_same_task(tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    write_rows(published / "train.jsonl", [row(number) for number in range(30)])
    program = ("from tasks.common import get_task\n"
               "task = get_task('OpenThoughts', dataset_id='me/thoughts', stop=5)\n"
               "print([conversation['messages'][0]['content'] for conversation in task], task[4]['messages'][1]['content'])\n")
    with FakeHub({"datasets/me/thoughts": published}) as hub:
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **hub.env(tmp_path / "home")}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    local = get_task("OpenThoughts", local_path=published / "train.jsonl", stop=5)
    assert run.stdout.strip() == f"{[question for question, _ in pairs(local)]} {pairs(local)[4][1]}"
