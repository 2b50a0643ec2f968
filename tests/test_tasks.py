"""Every registered task, on small files made here and on the real ones where they are: the reference earns all, "" earns nothing."""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nanochat.execution import calculate, sandbox_refusal
from tasks.aqua import permuted
from tasks.common import Task, get_task, message_text, task_names
from tasks.gsm8k import answer_parts, extract_number
from tasks.humaneval import extract_code
from tasks.hendrycks_math import SUBJECTS
from tasks.rewards import same_number
from tests.fakes.hub import FakeHub
from tests.test_bbh import write_bbh

DATA = Path(os.environ.get("NANOCHAT_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
ARC_ROW = {"question": "Which is a gas?", "choices": {"text": ["iron", "air", "ice"], "label": ["1", "2", "3"]}, "answerKey": "2"}
MMLU_ROWS = [{"question": "2+2?", "subject": "college_mathematics", "choices": ["1", "2", "3", "4"], "answer": 3},
             {"question": "Who ruled?", "subject": "world_religions", "choices": ["a", "b", "c", "d"], "answer": 0}]
GSM_ROW = {"question": "Half of 10, doubled?", "answer": "Half is 10/2 = <<10/2=5>>5.\nDoubled 5*2=<<5*2=10>>10\n#### 10"}
EVAL_ROW = {"task_id": "t/0", "prompt": 'import math\n\ndef root(x):\n    """ The square root.\n    """\n', "entry_point": "root",
            "canonical_solution": "    return math.sqrt(x)\n", "test": "def check(candidate):\n    assert candidate(9) == 3\n"}
THOUGHT = "<think>\n2 and 2 are 4.\n</think>\n\nThe answer is 4."
MATH_ROW = {"problem": "If $2x + 3 = 11$, what is $x$?", "level": "Level 2", "type": "Algebra", "solution": "So $2x = 8$ and $x = \\boxed{4}$."}
MBPP_ROW = {"task_id": 11, "text": "Write a function to add one.", "code": "def inc(x):\r\n    return x + 1", "test_list": ["assert inc(1) == 2", "assert inc(5) == 6"],
            "test_setup_code": "", "challenge_test_list": []}
SANITIZED_ROW = {"task_id": 11, "prompt": "Write a function for the area of a circle.", "code": "def area(r):\n    return math.pi * r * r",
                 "test_list": ["assert math.isclose(area(2), 12.566370614)"], "test_imports": ["import math"]}
FILES = {                                               # name -> (file, rows, the argument that takes the file's path, if not its folder)
    "AQUA": ("test.jsonl", [{"question": "1+1?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "1+1=2", "correct": "B"}]),
    "ARC-Easy": ("arc_easy_test.jsonl", [ARC_ROW]), "ARC-Challenge": ("arc_challenge_test.jsonl", [ARC_ROW]),
    "MMLU": ("test.jsonl", MMLU_ROWS), "MMLU-Science": ("test.jsonl", MMLU_ROWS), "GSM8K": ("test.jsonl", [GSM_ROW]),
    "HumanEval": ("HumanEval.jsonl", [EVAL_ROW]), "SmolTalk": ("test.jsonl", [CHAT]),
    "JsonlChat": ("chat.jsonl", [CHAT], "path"), "CustomJSON": ("chat.jsonl", [CHAT], "path"),
    "OpenThoughts": ("traces.jsonl", [{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": THOUGHT}]}], "local_path"),
    "DolciThink": ("traces.jsonl", [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": THOUGHT}]}], "local_path"),
    "MATH": ("test.jsonl", [MATH_ROW]), "MATH-500": ("math_500.jsonl", [{**MATH_ROW, "subject": "Algebra", "level": 2}]),
    "MBPP": ("test.jsonl", [MBPP_ROW]), "MBPP-Sanitized": ("test.jsonl", [SANITIZED_ROW]), "BBH": ("", []),
    "ALGEBRA": None, "SimpleSpelling": None, "SpellingBee": None,
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build(name, folder):
    if name not in FILES:
        pytest.fail(f"{name} is registered but unknown to this test: add a file with its rows to FILES")
    if FILES[name] is None:
        return get_task(name, split="test", stop=20)
    if name == "BBH":                                   # 27 files: made by the test of its own
        return get_task(name, data_dir=write_bbh(folder))
    file, rows, *argument = FILES[name]
    path = write_rows(folder / file, rows)
    return get_task(name, **{argument[0]: path}) if argument else get_task(name, split="test", data_dir=folder)


def is_scored(task):
    return type(task).is_correct is not Task.is_correct


def check_reference(task, conversations):
    for conversation in conversations:
        reference = message_text(conversation["messages"][-1])
        parts = task.rewards(conversation, reference)
        assert parts["correct"] == 1.0 and task.is_correct(conversation, reference)
        assert all(value > 0 for value in parts.values()), parts
        assert task.reward(conversation, "") == 0 and not task.is_correct(conversation, "")


@pytest.mark.parametrize("name", task_names())
def test_the_reference_answer_earns_full_reward_and_an_empty_one_none(name, tmp_path):
    task = build(name, tmp_path)
    if name in ("HumanEval", "MBPP", "MBPP-Sanitized") and sandbox_refusal():
        pytest.skip(f"no sandbox: {sandbox_refusal()}")
    assert len(task) > 0 and task.name == name
    if is_scored(task):
        check_reference(task, task)
    else:
        with pytest.raises(NotImplementedError):
            task.is_correct(task[0], "anything")


@pytest.mark.parametrize("name, folder, split", [("ARC-Easy", "arc", "validation"), ("ARC-Challenge", "arc", "test"), ("MMLU", "mmlu", "validation"),
                                                 ("GSM8K", "gsm8k", "train"), ("AQUA", "aqua", "validation")])
def test_so_it_is_on_real_rows(name, folder, split):
    if not (DATA / folder).is_dir():
        pytest.skip("the real data is not here")
    task = get_task(name, split=split, data_dir=DATA / folder)
    check_reference(task, list(task)[:400])
    if "letters" in task[0]:
        for conversation in task:
            assert permuted(permuted(conversation, 1), -1)["messages"] == conversation["messages"]


# Multiple choice

def test_arc_numbers_become_letters_and_three_choices_are_enough(tmp_path):
    conversation = build("ARC-Easy", tmp_path)[0]
    assert conversation["letters"] == ["A", "B", "C"] and conversation["answer_letter"] == "B"
    assert conversation["messages"][0]["content"].splitlines()[1:4] == ["- iron=A", "- air=B", "- ice=C"]


def test_science_is_a_part_of_mmlu_that_auxiliary_train_cannot_give(tmp_path):
    write_rows(tmp_path / "test.jsonl", MMLU_ROWS)
    write_rows(tmp_path / "auxiliary_train.jsonl", MMLU_ROWS)
    assert [conversation["subject"] for conversation in get_task("MMLU", split="test", subjects="science", data_dir=tmp_path)] == ["college_mathematics"]
    assert len(get_task("MMLU", split="auxiliary_train", data_dir=tmp_path)) == 2
    with pytest.raises(ValueError, match="name no subject"):
        get_task("MMLU", split="auxiliary_train", subjects="science", data_dir=tmp_path)
    with pytest.raises(ValueError, match="all' or 'science"):
        get_task("MMLU", split="test", subjects="history", data_dir=tmp_path)


def test_a_folder_without_the_split_is_an_error_and_no_download(tmp_path):
    write_rows(tmp_path / "train.jsonl", [GSM_ROW])
    with pytest.raises(ValueError, match=r"test.jsonl is not there; the folder holds 1 JSON files \['train.jsonl'\]"):
        get_task("GSM8K", split="test", data_dir=tmp_path)
    with pytest.raises(ValueError, match="the 2 splits are train, test"):
        get_task("GSM8K", split="dev", data_dir=tmp_path)


# Numbers

def test_calculator_marks_become_calls_and_outputs():
    assert [(part["type"], part["text"]) for part in answer_parts(GSM_ROW["answer"])] == [
        ("text", "Half is 10/2 = "), ("python", "10/2"), ("python_output", "5"), ("text", "5.\nDoubled 5*2="),
        ("python", "5*2"), ("python_output", "10"), ("text", "10\n#### 10")]


@pytest.mark.parametrize("text, number", [
    ("#### 72", "72"), ("so\n####72\n\n", "72"), ("####  -1,234.50", "-1,234.50"), ("#### $5", "$5"), ("#### 3/4", "3/4"), ("", None), ("72", None),
    ("#### 72 apples", None), ("#### 1 2", None), ("#### 1,23", None), ("#### 5\nno wait", None), ("### 5", None), ("#### ", None), ("#### x", None),
    ("#### 1e3", None), ("the answer is #### 5", None)])
def test_only_a_last_line_of_marks_and_number_counts(text, number):
    assert extract_number(text) == number


def test_equal_values_are_equal_answers(tmp_path):
    task = build("GSM8K", tmp_path)
    for text, right in (("#### 10.0", True), ("#### 10", True), ("#### $10.", True), ("#### 20/2", True), ("#### 10.01", False), ("#### 100", False)):
        assert task.is_correct(task[0], text) is right
    assert task.find_answer(task[0], "#### 10.0") == task.find_answer(task[0], "#### 10") == "10"


def test_our_calculator_agrees_with_gsm8k_wherever_it_answers():
    if not (DATA / "gsm8k").is_dir():
        pytest.skip("the real data is not here")
    calls = unknown = 0
    for conversation in get_task("GSM8K", split="train", data_dir=DATA / "gsm8k"):
        parts = conversation["messages"][-1]["content"]
        assert not any("<<" in part["text"] for part in parts)
        for call, output in zip(parts, parts[1:]):
            if call["type"] == "python":
                value = calculate(call["text"])
                calls, unknown = calls + 1, unknown + (value is None)
                assert value is None or same_number(value, output["text"]) or abs(float(value) - float(output["text"].replace(",", ""))) <= 0.01
    assert calls == 23716 and unknown == 2          # 560//10 and 180//3


# Code

needs_sandbox = pytest.mark.skipif(sandbox_refusal() is not None, reason=f"no sandbox: {sandbox_refusal()}")


@needs_sandbox
@pytest.mark.parametrize("text, right", [
    ("```python\ndef root(x):\n    return x ** 0.5\n```", True), ("def root(x):\n    return math.sqrt(x)", True), ("    return math.sqrt(x)", True),
    ("Sure!\n```py\ndef root(x):\n    return helper(x)\n\ndef helper(x):\n    return x ** 0.5\n```\nIt works.", True),
    ("def root(x):\n    return x", False), ("def root(x)\n", False), ("```python\nimport os\nos._exit(0)\n```", False), ("print(3)\nraise SystemExit(0)", False),
    ("def check(candidate): pass\ndef root(x): return 0", False), ("while True: pass", False)])
def test_code_is_right_if_its_test_passes_to_the_end(text, right, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.humaneval.SECONDS", 1.0)
    task = build("HumanEval", tmp_path)
    assert task.is_correct(task[0], text) is right


def test_the_first_fence_is_the_code():
    assert extract_code("a\n```python\nx = 1\n```\nb\n```\ny\n```") == "x = 1\n"
    assert extract_code("```\nx = 1") == "x = 1" and extract_code("x = 1") == "x = 1"


@needs_sandbox
def test_reference_solutions_of_humaneval_pass():
    if not (DATA / "humaneval").is_dir():
        pytest.skip("the real data is not here")
    task = get_task("HumanEval", data_dir=DATA / "humaneval", step=20)
    check_reference(task, task)


# Spelling

def test_train_and_test_words_are_disjoint_and_examples_repeat():
    for name in ("SimpleSpelling", "SpellingBee"):
        train, test = get_task(name, split="train"), get_task(name, split="test")
        assert not set(train.words) & set(test.words) and len(test.words) > 150 and len(train.words) > 1500
        assert [train[i] for i in range(50)] == [get_task(name, split="train")[i] for i in range(50)]
        assert len({json.dumps(train[i]) for i in range(300)}) == 300
    with pytest.raises(ValueError, match="train, test"):
        get_task("SpellingBee", split="validation")


def test_counts_are_true_and_no_count_is_most_of_them():
    task = get_task("SpellingBee", split="train", stop=1000)
    counts = Counter()
    for conversation in task:
        parts = conversation["messages"][-1]["content"]
        assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]
        assert calculate(parts[1]["text"]) == parts[2]["text"]
        counts[parts[2]["text"]] += 1
    assert max(counts.values()) < 650 and len(counts) >= 4


# Conversations from a file

def test_bad_lines_are_left_out_and_counted(tmp_path):
    good = [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]
    lines = [json.dumps({"messages": good, "source": "x"}), json.dumps(CHAT["messages"]), "", "{torn", "3", json.dumps({"other": 1}),
             json.dumps({"messages": CHAT["messages"][:1]}), json.dumps({"messages": CHAT["messages"][::-1]}),
             json.dumps({"messages": [{"role": "user", "content": " "}, CHAT["messages"][1]]}),
             json.dumps({"messages": [CHAT["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}]}),
             json.dumps({"messages": [CHAT["messages"][0], {"role": "assistant", "content": [{"type": "image"}]}]}), "[" * 100_000]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    task = get_task("JsonlChat", path=tmp_path / "chat.jsonl")
    assert len(task) == 3 and task[0]["messages"] == good and task[1]["messages"] == CHAT["messages"]
    assert task.skipped == {"not JSON": 2, "no list of messages": 2, "roles are not user and assistant in turn, ending with assistant": 2,
                            "a message has no text": 1, "a part is not {type, text}": 1}


def test_two_fields_become_a_conversation(tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"q": f"Question {i}", "a": "Yes."} for i in range(20)] + [{"q": "alone"}])
    task = get_task("JsonlChat", path=path, prompt_field="q", answer_field="a")
    assert len(task) == 20 and task[3]["messages"][0]["content"] == "Question 3" and task.skipped.total() == 1
    shuffled = get_task("JsonlChat", path=path, prompt_field="q", answer_field="a", shuffle=True)
    assert list(shuffled) != list(task) and sorted(map(str, shuffled)) == sorted(map(str, task))
    with pytest.raises(ValueError, match="belong together"):
        get_task("JsonlChat", path=path, prompt_field="q")
    with pytest.raises(ValueError, match="none of the 21 lines"):
        get_task("JsonlChat", path=path)


def test_a_missing_file_is_an_error(tmp_path):
    for arguments in ({}, {"path": tmp_path / "nowhere.jsonl"}, {"path": tmp_path}):
        with pytest.raises(ValueError, match="is not a file, so there are 0 conversations"):
            get_task("CustomJSON", **arguments)


def test_a_bad_row_of_smoltalk_names_itself(tmp_path):
    write_rows(tmp_path / "train.jsonl", [CHAT, {"messages": CHAT["messages"][:1]}])
    task = get_task("SmolTalk", split="train", data_dir=tmp_path)
    assert task[0] == CHAT
    with pytest.raises(ValueError, match="row 1 of SmolTalk train"):
        task[1]


# The Hub, as the real client sees it

SUBTASK_ROWS = [{"input": "not ( True ) is", "target": "False"}, {"input": "True and True is", "target": "True"}]
PUBLISHED = {  # data set -> {configuration: {split: rows}}, and the tasks with their arguments that it serves
    "deepmind/aqua_rat": ({"raw": {"validation": FILES["AQUA"][1]}}, [("AQUA", {"split": "validation"})]),
    "allenai/ai2_arc": ({"ARC-Easy": {"test": [ARC_ROW]}, "ARC-Challenge": {"test": [ARC_ROW]}}, [("ARC-Easy", {"split": "test"}), ("ARC-Challenge", {"split": "test"})]),
    "cais/mmlu": ({"all": {"test": MMLU_ROWS}}, [("MMLU", {"split": "test"}), ("MMLU-Science", {"split": "test"})]),
    "openai/gsm8k": ({"main": {"test": [GSM_ROW]}}, [("GSM8K", {"split": "test"})]),
    "openai/openai_humaneval": ({"openai_humaneval": {"test": [EVAL_ROW]}}, [("HumanEval", {})]),
    "HuggingFaceTB/smol-smoltalk": ({"default": {"test": [CHAT]}}, [("SmolTalk", {"split": "test"})]),
    "EleutherAI/hendrycks_math": ({subject: {"test": [{**MATH_ROW, "type": name}]} for subject, name in SUBJECTS.items()},
                                  [("MATH", {"split": "test"}), ("MATH", {"split": "test", "subjects": "geometry"})]),
    "HuggingFaceH4/MATH-500": ({"default": {"test": [{**MATH_ROW, "subject": MATH_ROW["type"], "level": 2}]}}, [("MATH-500", {})]),
    "lukaemon/bbh": ({"boolean_expressions": {"test": SUBTASK_ROWS}, "navigate": {"test": [{"input": "Do you return?", "target": "No"}]}},
                     [("BBH", {"subtasks": ["boolean_expressions", "navigate"]}), ("BBH", {"subtasks": "boolean_expressions", "few_shot": 1})]),
    "google-research-datasets/mbpp": ({"full": {"test": [MBPP_ROW]}, "sanitized": {"test": [SANITIZED_ROW]}},
                                      [("MBPP", {"split": "test"}), ("MBPP-Sanitized", {"split": "test"})]),
}
SIZES = {"MMLU": 2, "MATH": 7, "BBH": 3}


def publish(folder, configs):
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            (folder / config).mkdir(parents=True)
            write_rows(folder / config / f"{split}.jsonl", rows)
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def test_every_data_set_of_the_hub_is_read_through_the_real_client(tmp_path):
    wanted = [entry for _, entries in PUBLISHED.values() for entry in entries]
    program = ("import json, sys\nfrom tasks.common import get_task\n"
               "for name, arguments in json.load(sys.stdin):\n"
               "    task = get_task(name, **arguments)\n"
               "    print(json.dumps([name, len(task), list(task)]))\n")
    published = {f"datasets/{name}": publish(tmp_path / name, configs) for name, (configs, _) in PUBLISHED.items()}
    environment = {key: value for key, value in os.environ.items() if key not in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR")}
    with FakeHub(published) as hub:
        result = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], input=json.dumps(wanted), capture_output=True, text=True, timeout=500,
                                env={**environment, **hub.env(tmp_path / "home"), "NANOCHAT_BASE_DIR": str(tmp_path / "base")})
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == [name for name, _ in wanted]
    for (name, arguments), (_, size, conversations) in zip(wanted, lines):
        assert size == len(conversations) == (1 if len(arguments) > 1 and name != "AQUA" else SIZES.get(name, 1)), name
    local = {name: json.loads(json.dumps(list(build(name, fresh(tmp_path, name))))) for name in ("AQUA", "ARC-Easy", "MMLU", "GSM8K", "HumanEval", "SmolTalk", "MBPP", "MATH-500")}
    for name, conversations in local.items():           # a folder and the Hub give the same
        assert next(line[2] for line in lines if line[0] == name) == conversations, name


def fresh(folder, name):
    (folder / "local" / name).mkdir(parents=True)
    return folder / "local" / name
