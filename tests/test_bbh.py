"""BBH: 27 subtasks, each kind of answer by its own rule."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.bbh import KINDS, SUBTASKS, extract, options_of
from tasks.common import get_task, message_text

CHOICE = "Today is May 2. What day is tomorrow?\nOptions:\n(A) May 1\n(B) May 3\n(C) May 4"
EXAMPLES = {  # kind -> (question, target, other answers that are right, wrong ones, no answers)
    "letter": (CHOICE, "(B)", ("B", "B.", "**B**", "(B)."), ("A", "(C)"), ("D", "b", "B or C", "May 3", "")),
    "yes or no": ("Is it so?", "Yes", ("yes", "YES.", "**Yes**"), ("No",), ("maybe", "yes and no", "")),
    "True or False": ("not ( True ) and ( True ) is", "False", ("false", "False."), ("True",), ("0", "")),
    "valid or invalid": ("Is the argument valid?", "invalid", ("Invalid",), ("valid",), ("sound", "")),
    "number": ("((-1 + 2) * 24) =", "24", ("24.0", " 24", "24."), ("-24", "2.4"), ("twenty-four", "((-1 + 2) * 24)", "")),
    "closing brackets": ("Complete the rest of the sequence: [ ( {", "} ) ]", ("})]", "} )]"), (") } ]", "}"), ("[ ( { } ) ]", "brackets", "")),
    "sorted words": ("Sort: syndrome therefrom", "syndrome therefrom", ("syndrome, therefrom", "Syndrome  Therefrom"), ("therefrom syndrome", "syndrome"), ("", "  ")),
}


def write_bbh(folder):
    """The 27 files of the original release, three rows each."""
    for subtask, kind in SUBTASKS.items():
        question, target = EXAMPLES[kind][:2]
        rows = [{"input": f"{number}. {question}", "target": target} for number in range(3)]
        (folder / f"{subtask}.json").write_text(json.dumps({"canary": "none", "examples": rows}))
    return folder


def test_there_are_27_subtasks_and_three_in_four_can_be_guessed(tmp_path):
    task = get_task("BBH", data_dir=write_bbh(tmp_path))
    assert len(SUBTASKS) == 27 and len(task) == 81 and sum(map(len, KINDS.values())) == 27
    assert [conversation["chance"] for conversation in list(task)[::3]] == [{"letter": 1 / 3}.get(kind, 0.5 if " or " in kind else 0.0) for kind in SUBTASKS.values()]
    assert task.random_accuracy == 0.26
    with pytest.raises(ValueError, match="'chess'.*must be at least 0; the subtasks are date_understanding"):
        get_task("BBH", subtasks="chess", data_dir=tmp_path)
    with pytest.raises(ValueError, match="not 'train'"):
        get_task("BBH", split="train", data_dir=tmp_path)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_each_kind_of_answer_has_its_rule(kind, tmp_path):
    question, target, right, wrong, none = EXAMPLES[kind]
    task = get_task("BBH", subtasks=KINDS[kind][0], data_dir=write_bbh(tmp_path))
    conversation = task[0]
    assert conversation["messages"][0]["content"] == f'0. {question}\nEnd with the line "Answer: <{kind}>".' and conversation["question"] == f"0. {question}"
    for answers, correct, readable in ((right, True, True), (wrong, False, True), (none, False, False)):
        for answer in answers:
            text = f"Let us see.\n\nAnswer: {answer}\n"
            assert task.is_correct(conversation, text) is correct, answer
            assert (task.find_answer(conversation, text) is not None) is readable, answer
    for text in (f"Answer: {target} because", f"Answer: {target}\nI am sure.", target, f"The answer: {target}", ""):
        assert not task.is_correct(conversation, text) or kind == "sorted words", text


def test_shots_are_earlier_turns_and_are_not_asked(tmp_path):
    task = get_task("BBH", few_shot=2, data_dir=write_bbh(tmp_path))
    assert len(task) == 27
    messages = task[0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert [message["content"][:2] for message in messages[::2]] == ["0.", "1.", "2."] and messages[1]["content"] == "Answer: B"
    assert task.is_correct(task[0], message_text(messages[-1]))


def test_a_target_that_spells_its_option_out_is_that_option(tmp_path):
    rows = [{"input": CHOICE, "target": "May 3"}, {"input": CHOICE, "target": "June"}]
    (tmp_path / "snarks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task("BBH", subtasks=["snarks"], data_dir=tmp_path)
    assert message_text(task[0]["messages"][-1]) == "Answer: B" and task.is_correct(task[0], "Answer: (B)")
    assert task[1]["chance"] == 0 and task.is_correct(task[1], "Answer: June") and not task.is_correct(task[1], "Answer: B")
    with pytest.raises(ValueError, match=r"neither navigate.json nor navigate.jsonl; it holds 1 JSON files \['snarks'\]"):
        get_task("BBH", subtasks="navigate", data_dir=tmp_path)


def test_options_are_those_behind_the_last_heading():
    assert options_of(CHOICE) == {"A": "May 1", "B": "May 3", "C": "May 4"} and options_of("(A) no heading") == {}


@settings(max_examples=300, deadline=1000)
@given(st.text(max_size=300) | st.lists(st.sampled_from(["Answer:", "answer:", " ", "**", "(A)", "yes", "no", "\n", "]", ")", ",", "1", "-", ".", "ſ"]), max_size=60).map("".join))
def test_any_text_has_an_answer_of_its_kind_or_none(text):
    allowed = {"letter": {"A", "B"}, "yes or no": {"yes", "no"}, "True or False": {"True", "False"}, "valid or invalid": {"valid", "invalid"}}
    for kind in KINDS:
        answer = extract(text, kind, ["A", "B"])
        assert answer is None or answer in allowed.get(kind, {answer}) and answer.strip()
