"""DolciThink from a file, from the Hub and streamed: bounded reading, a cache that survives a kill, categories that really filter."""
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tasks.dolci_think as dolci_think
from tasks.common import get_task, message_text
from tasks.dolci_think import CATEGORIES, categorize, fill_cache, is_short, read_filter
from tests.fakes.hub import FakeHub

ROOT = Path(__file__).parents[1]
ORIGIN = {"dataset_id": "me/dolci", "split": "train"}


def row(number, category=None, trace="First this. Then that. Then more. And so on.", **changes):
    messages = [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": f"<think>\n{trace}\n</think>\n\nAnswer {number}."}]
    return {"messages": messages, **({"category": category} if category else {}), **changes}


def mixed(count):
    return [row(number, CATEGORIES[number % 8]) for number in range(count)]


def write_rows(path, rows):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows), encoding="utf-8")
    return path


def questions(task):
    return [int(conversation["messages"][0]["content"].split()[1][:-1]) for conversation in task]


class Source:
    """The rows of a pretended Hub, which counts how many were taken and may break off."""

    def __init__(self, rows, breaks_after=None):
        self.rows, self.taken, self.starts, self.breaks_after = rows, 0, [], breaks_after

    def __call__(self, dataset_id, split, start=0):
        self.starts.append(start)
        for one in self.rows[start:]:
            if self.breaks_after is not None and self.taken >= self.breaks_after:
                raise ConnectionError("the line is down")
            self.taken += 1
            yield one


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """stream(source, **arguments) -> the task over that source, its cache in a folder of its own."""
    monkeypatch.setattr(dolci_think, "FLUSH_ROWS", 10)

    def build(source, **arguments):
        monkeypatch.setattr(dolci_think, "stream_hub_dataset", source)
        return get_task("DolciThink", streaming=True, stream_cache=tmp_path / "cache" / "rows.jsonl", **arguments)
    return build


# Local files

def test_modes_keep_or_drop_the_trace_and_rows_keep_their_category(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [row(1, "chat")])
    (cot,), (short,) = get_task("DolciThink", local_path=path), get_task("DolciThink", local_path=path, mode="answer_only")
    assert cot["messages"][1]["content"] == "<think>\nFirst this. Then that. Then more. And so on.\n</think>\n\nAnswer 1."
    assert short["messages"][1]["content"] == "Answer 1." and cot["category"] == short["category"] == "chat"


def test_a_filter_keeps_its_categories_and_stop_counts_what_is_kept(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", mixed(80))
    task = get_task("DolciThink", local_path=path, category_filter=("short_reasoning", "chat"), stop=7)
    assert questions(task) == [5, 7, 13, 15, 21, 23, 29] and {conversation["category"] for conversation in task} == {"short_reasoning", "chat"}
    assert len(get_task("DolciThink", local_path=path, category_filter="coding", stop=1000)) == 10


@pytest.mark.parametrize("unknown", ["math", ["chat", "maths"], []])
def test_an_unknown_category_is_refused_and_never_matches_nothing_in_silence(unknown):
    with pytest.raises(ValueError, match="is not among the 8 categories"):
        read_filter(unknown)


def test_bad_rows_are_counted(tmp_path):
    never = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>never"}]}
    path = write_rows(tmp_path / "x.jsonl", [row(1, "chat"), "{torn", never, {"messages": []}, row(2, "coding")])
    task = get_task("DolciThink", local_path=path)
    assert questions(task) == [1, 2] and task.skipped == {"not a JSON object": 1, "a trace never ends": 1, "no question and answer": 1}
    task = get_task("DolciThink", local_path=path, category_filter="chat")
    assert questions(task) == [1] and task.skipped["category coding"] == 1 and task.skipped.total() == 4


def test_the_same_final_answer_is_right_however_it_was_reached(tmp_path):
    task = get_task("DolciThink", local_path=write_rows(tmp_path / "x.jsonl", mixed(8)))
    for conversation in task:
        assert task.reward(conversation, message_text(conversation["messages"][-1])) == 1 and not task.is_correct(conversation, "")
    assert task.is_correct(task[3], "<think>other</think> answer 3") and not task.is_correct(task[3], "answer 4") and not task.is_correct(task[3], "<think>Answer 3.")


def test_a_missing_file_names_the_script_that_writes_it(tmp_path):
    with pytest.raises(ValueError, match="prepare_dolci_think"):
        get_task("DolciThink", local_path=tmp_path / "none.jsonl")


# Categories

@pytest.mark.parametrize("question, trace, answer, origin, category", [
    ("Solve x^2 = 4.", "long " * 200, "x is 2 or -2.", {}, "reasoning_math"),
    ("Write a Python function that sorts.", "Short.", "def f(): ...", {}, "coding"),
    ("Why does ice float? Think of its molecules.", "long " * 200, "Hydrogen bonds.", {}, "reasoning_science"),
    ("Solve this riddle: who lies?", "long " * 200, "Bob.", {}, "reasoning_logic"),
    ("Write me a poem on autumn.", "long " * 200, "Leaves fall.", {}, "chat"),
    ("Where did the treaty of 1648 change borders?", "long " * 200, "In the Empire.", {}, "reasoning_general"),
    ("How do I pick my neighbour's lock?", "long " * 200, "I'm sorry, but I can't help with that.", {}, "safety"),
    ("Solve x + 1 = 2.", "Take 1 from both sides. So x = 1.", "1", {}, "short_reasoning"),
    ("Anything", "long " * 200, "ok", {"source": "allenai/wildguardmix"}, "safety"),
    ("Anything", "long " * 200, "ok", {"dataset_source": "OpenThoughts3-full-filtered-code"}, "coding"),
    ("Anything", "long " * 200, "ok", {"domain": "Math"}, "reasoning_math"),
    ("Solve x + 1 = 2.", "One. Two.", "1", {"category": "reasoning_logic"}, "reasoning_logic"),
])
def test_rows_without_a_category_get_one(question, trace, answer, origin, category):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"<think>{trace}</think>{answer}"}]
    assert categorize(origin, messages) == category


def test_short_reasoning_is_one_to_three_sentences():
    assert is_short("One.") and is_short("It is 3.5 m. So 7 m. Done!") and is_short("no full stop")
    assert not is_short("") and not is_short("One. Two. Three. Four.") and not is_short("word " * 200)


# Streams

def test_a_stream_is_read_no_further_than_needed(stream):
    source = Source(mixed(5000))
    task = stream(source, stop=25)
    assert questions(task) == list(range(25)) and source.taken <= 25
    source = Source(mixed(5000))
    assert questions(stream(source, stop=30, category_filter="coding")) == list(range(4, 240, 8)) and source.taken == 237 - 25


def test_a_cache_is_read_again_without_the_source_and_serves_every_mode_and_filter(stream):
    stream(Source(mixed(100)), stop=40)

    def offline(*_):
        raise ConnectionError("no network")
    assert questions(stream(offline, stop=40)) == list(range(40))
    assert questions(stream(offline, stop=5, category_filter="coding")) == [4, 12, 20, 28, 36]
    assert stream(offline, stop=1, mode="answer_only")[0]["messages"][1]["content"] == "Answer 0."
    with pytest.raises(ConnectionError):
        stream(offline, stop=41)


def test_an_exhausted_stream_clamps_and_is_not_asked_again(stream):
    assert len(stream(Source(mixed(33)), stop=1_000_000)) == 33
    source = Source([])
    assert len(stream(source)) == 33 and source.starts == []


@pytest.mark.parametrize("breaks_after", [0, 1, 9, 10, 11, 57])
def test_an_interrupted_stream_goes_on_and_ends_as_if_never_interrupted(stream, tmp_path, breaks_after):
    rows = [row(number, "chat") if number % 7 else {"bad": number} for number in range(100)]
    with pytest.raises(ConnectionError):
        stream(Source(rows, breaks_after))
    with open(tmp_path / "cache" / "rows.jsonl", "ab") as file:     # what a kill may leave: rows beyond the record, a torn line
        file.write(json.dumps(row(999, "chat")).encode() + b'\n{"messages": [{"ro')
    source = Source(rows)
    task = stream(source)
    assert questions(task) == [number for number in range(100) if number % 7] and task.skipped == {"no question and answer": 15}
    assert source.starts == [breaks_after // 10 * 10]


def test_a_longer_stream_extends_the_cache(stream):
    assert questions(stream(Source(mixed(100)), stop=15)) == list(range(15))
    source = Source(mixed(100))
    assert questions(stream(source, stop=35)) == list(range(35)) and source.starts == [15] and source.taken == 20


def test_files_that_are_no_cache_are_never_touched(stream, tmp_path):
    cache = tmp_path / "cache" / "rows.jsonl"
    cache.parent.mkdir()
    cache.write_text("mine\n")
    with pytest.raises(ValueError, match="was not written by a stream"):
        stream(Source(mixed(10)))
    assert cache.read_text() == "mine\n"
    cache.unlink()
    stream(Source(mixed(10)), stop=3)
    with pytest.raises(ValueError, match="delete both"):
        stream(Source(mixed(10)), stop=3, dataset_id="me/other")
    cache.write_text("")
    with pytest.raises(ValueError, match="delete both"):
        stream(Source(mixed(10)), stop=3)


def write_with_others(path):
    fill_cache(path, ORIGIN, lambda row: True, 200, lambda start: iter(mixed(300)[start:]))


def test_several_processes_share_one_cache(tmp_path):
    path = tmp_path / "rows.jsonl"
    workers = [multiprocessing.get_context("fork").Process(target=write_with_others, args=(path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert questions(get_task("DolciThink", local_path=path)) == list(range(200))


def test_the_hub_streams_the_same_rows(tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    write_rows(published / "train.jsonl", mixed(60))
    program = ("from tasks.common import get_task\n"
               "import sys\n"
               "for stop in (5, 12):\n"
               "    task = get_task('DolciThink', dataset_id='me/dolci', streaming=True, stream_cache=sys.argv[1], stop=stop)\n"
               "    print([conversation['messages'][0]['content'] for conversation in task])\n"
               "task = get_task('DolciThink', dataset_id='me/dolci', stop=2, category_filter='coding')\n"
               "print([conversation['messages'][0]['content'] for conversation in task])\n")
    with FakeHub({"datasets/me/dolci": published}) as hub:
        run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "rows.jsonl")], cwd=ROOT, env={**os.environ, **hub.env(tmp_path / "home")},
                             capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    expected = [[f"Question {number}?" for number in numbers] for numbers in (range(5), range(12), (4, 12))]
    assert run.stdout.splitlines() == [str(line) for line in expected]
