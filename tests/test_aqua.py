"""Letters found, letters not found, options and rationales of every quality, where the data comes from, and its preparation."""
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.aqua as aqua
from nanochat.common import env
from scripts import prepare_aqua
from tasks.aqua import AQUA, build_conversation, clean_rationale, extract_answer, parse_options, parse_row, permuted, split_choices
from tasks.contamination import GRAM, gram_set, words
from tasks.common import best_constant, get_task, message_text

REAL = Path(env("NANOCHAT_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")) / "aqua"
needs_real_data = pytest.mark.skipif(not (REAL / "validation.jsonl").is_file(), reason="the real AQuA files are not here")


@pytest.fixture(autouse=True)
def no_real_places(monkeypatch, tmp_path):
    """Neither this machine's data nor the network may decide a test."""
    for name in ("NANOCHAT_AQUA_DIR", "AQUA_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))

    def no_hub(*arguments):
        raise ConnectionError("the test asked for the Hub")
    monkeypatch.setattr(aqua, "load_hub_dataset", no_hub)


def row(correct="B", **changes):
    return {"question": "What is 3+4?", "options": ["A)6", "B)7", "C)8", "D)9", "E)12"], "rationale": "3+4=7\nAnswer: B", "correct": correct} | changes


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answer_text(conversation):
    return message_text(conversation["messages"][-1])


# ---------------------------------------------------------------------------------------------------------------------
# The grammar

FOUND = [
    ("Answer: B", "B"), ("answer: B", "B"), ("ANSWER:B", "B"), ("Answer:   E", "E"), ("Answer:\tC", "C"), ("Answer: B.", "B"),
    ("Answer: (B)", "B"), ("Answer: (B).", "B"), ("**Answer: B**", "B"), ("**Answer:** B", "B"), ("Answer: **B**", "B"), ("Answer: **B**.", "B"),
    ("Answer: **(B)**", "B"), ("x = 3\nAnswer: D", "D"), ("x = 3\r\nAnswer: D\r\n", "D"), ("  Answer: A  \n\n \t\n", "A"),
    ("Answer: A is wrong.\nAnswer: B", "B"), ("Answer: A\nNo, wait.\nAnswer: C", "C"), ("\u00a0Answer: B\u2003", "B"),
]
NOT_FOUND = [
    "", " \n ", "B", "(B)", "The answer is C.", "A train travels 60 km. The answer is C.", "Let a be the number", "e = 2.718 so C", "x^2 + b x + c",
    "Answer: because ...", "Answer: Cannot be determined, so E", "Answer: all of the above", "Answer: A is wrong. Answer: B", "Answer: b", "Answer: a",
    "Answer: AB", "Answer: A B", "Answer: A or B", "Answer: A, B", "Answer: A/B", "Answer: F", "Answer:", "Answer: ", "Answer B", "Answer = B",
    "Answer - B", "Answer : B", "Answer is: B", "My Answer: B", "1. Answer: B", "Answer: B\nDone.", "Answer: B\n.", "Answer: B..", "Answer: B!",
    "Answer: (B", "Answer: B)", "Answer: [B]", "Answer: ((B))", "**Answer: B", "Answer: B**", "Answer: *B*", "__Answer: B__", "Answer: ***B***",
    "Answer: B) 53 km", "Answer: option B", "Answer: Option B", "Answer: <B>", "Answer: <letter>", "Answer:\nB", "Ans: B", "Answer: Ｂ", "Answer: В",
    "An\u017fwer: B", "Answer：B", "answer -  each pipe ... Answer: C", "Answer: B Answer: B", "Answer: B\x00", "Answer: B\u200b",
    "Answer: B<|assistant_end|>", "```\nAnswer: B\n```", "> Answer: B", "Answer: B\u2028Answer: C", "Answer: BB",
]


@pytest.mark.parametrize("text, letter", FOUND)
def test_letters_found(text, letter):
    assert extract_answer(text) == letter


@pytest.mark.parametrize("text", NOT_FOUND)
def test_letters_not_found(text):
    assert extract_answer(text) is None


def test_only_the_letters_of_the_question_count():
    assert extract_answer("Answer: C", "AB") is None and extract_answer("Answer: H", list("ABCDEFGH")) == "H"
    assert extract_answer("Answer: A", "") is None and extract_answer("Answer: ]", "^]-A") == "]" and extract_answer("Answer: B", "^]-A") is None


def slow_extract_answer(text, letters="ABCDE"):
    """The grammar of extract_answer's docstring again: all allowed last lines are written out and compared."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    last = lines[-1] if lines else ""
    before, colon, after = last.partition(":")
    allowed_bodies = {}
    for X in letters:
        plain = {X, X + ".", f"({X})", f"({X})."}
        bold = {f"**{form}**" for form in plain} | {f"**{form}**." for form in plain}
        allowed_bodies |= {("answer", form): X for form in plain | bold}
        allowed_bodies |= {("**answer", f"** {form}"): X for form in plain} | {("**answer", f"**{form}"): X for form in plain}
        allowed_bodies |= {("**answer", f"{form}**"): X for form in plain} | {("**answer", f"{form}**."): X for form in plain}
    if not colon or not before.isascii():
        return None
    after = "** " + after[2:].lstrip(" \t") if before.lower() == "**answer" and after.startswith("**") else after.lstrip(" \t")
    return allowed_bodies.get((before.lower(), after))


PIECES = ["Answer", "answer", "ANSWER", ":", ": ", " ", "\n", "\r\n", "\t", "A", "B", "C", "E", "F", "a", "e", "(", ")", ".", "**", "*", "Answer: ",
          "Answer: B", "\u00a0", "\u2028", "\x0b", "ſ", "is", "the", "1", "-", "=", "\x00", "<|assistant_end|>", "😀", "В", "Answer:**"]


def test_twenty_thousand_adversarial_texts_agree_with_the_slow_checker():
    r, found = random.Random(0), Counter()
    for _ in range(20_000):
        text = "".join(r.choice(PIECES) for _ in range(r.randint(0, 9)))
        if r.random() < 0.3:
            text += "\nAnswer" + r.choice((":", ": ", ":  ")) + "".join(r.choice(("B", "**", "(", ")", ".", "A", " ")) for _ in range(r.randint(1, 4)))
        letter = extract_answer(text)
        assert letter == slow_extract_answer(text), repr(text)
        found[letter] += 1
    assert found[None] > 10_000 and found["A"] > 100 and found["B"] > 100


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_text_raises_or_finds_what_the_grammar_does_not_give(text):
    assert extract_answer(text) == slow_extract_answer(text)


def test_a_long_text_costs_little():
    assert extract_answer("Answer: " + "(" * 200_000) is None
    assert extract_answer("\n" * 200_000 + "Answer:" + " " * 200_000) is None
    assert "is B" in clean_rationale("Answer " * 20_000 + "so " * 20_000 + "is B", "B")[0]  # too far from its "Answer" to be a statement


# ---------------------------------------------------------------------------------------------------------------------
# Rows

@pytest.mark.parametrize("options, choices", [
    (["A)21", "B)21.5", "C)22", "D)22.5", "E)23"], ["21", "21.5", "22", "22.5", "23"]),
    (["A) 53 km", "B)  54 km"], ["53 km", "54 km"]),
    (["(A) x", "(B) y", "(C) z"], ["x", "y", "z"]),
    (["a) one", "b) two"], ["one", "two"]),
    (["A ) 32400", "B ) 6000"], ["32400", "6000"]),
    (["A. 5", "B. 6"], ["5", "6"]), (["A: 5", "B: 6"], ["5", "6"]), (["[A] 5", "[B] 6"], ["5", "6"]),
    (["A)(2,3)", "B)f(x) = 3) + 1"], ["(2,3)", "f(x) = 3) + 1"]),
    (["A)A) and B)", "B)both"], ["A) and B)", "both"]),
    (["21", "B)22", "cats"], ["21", "22", "cats"]),
    (["Apples", "Bread", "Cake"], ["Apples", "Bread", "Cake"]),
    (["A21", "B22"], ["A21", "B22"]),
    (["B)two", "A)one", "C)three"], ["one", "two", "three"]),
    (["x", "A)y"], ["x", "A)y"]),
    (["A).5", "B).75"], [".5", ".75"]),
    ([3, 4.5], ["3", "4.5"]),
    (["A)two\nlines", "B) tab\tbed "], ["two lines", "tab bed"]),
])
def test_options_are_parsed(options, choices):
    assert parse_options(options) == choices


@pytest.mark.parametrize("changes, reason", [
    ({"question": None}, "no question"), ({"question": "  "}, "no question"), ({"options": "A)1 B)2"}, "not 2 to 8 options"),
    ({"options": ["A)1"]}, "not 2 to 8 options"), ({"options": [str(i) for i in range(9)]}, "not 2 to 8 options"), ({"options": None}, "not 2 to 8 options"),
    ({"options": ["A)1", "B)"]}, "an option is empty"), ({"options": ["A)1", None]}, "an option is empty"),
    ({"correct": "F"}, "the key is not a letter of an option"), ({"correct": None}, "the key is not a letter of an option"),
    ({"correct": "AB"}, "the key is not a letter of an option"), ({"correct": ""}, "the key is not a letter of an option"), ({"correct": 1}, "the key is not a letter of an option"),
])
def test_unusable_rows_give_the_reason(changes, reason):
    assert parse_row(row(**changes)) == reason


@pytest.mark.parametrize("changes, flag", [
    ({"options": ["A)6", "B)7", "C)6", "D)9", "E)1"]}, "two options are equal"), ({"options": ["A)7", "B) 7", "C)6", "D)9", "E)1"]}, "the right option stands twice"),
    ({"rationale": ""}, "no rationale"), ({"rationale": None}, "no rationale"), ({"rationale": "Answer: B"}, "no rationale"),
    ({"rationale": "3+4=8\nAnswer: C"}, "the rationale states another letter"), ({"rationale": "Option B fits, 7 is it"}, "the rationale names a letter"),
    ({"rationale": "only answer choice d fits the text"}, "the rationale names a letter"),
])
def test_odd_rows_are_used_and_flagged(changes, flag):
    assert flag in parse_row(row(**changes))[-1]


def test_a_key_in_any_dress_is_read():
    for key in ("B", "b", " B ", "B)", "(B)", "B."):
        assert parse_row(row(key))[3] == "B"


@pytest.mark.parametrize("closing", [
    "Answer: B", "ANSWER:B", "Answer : B.", "answer B", "Answer - B", "Correct answer - B", "correct answer B", "The answer is B.", "Answer is B",
    "the answer is option B.", "CORRECT OPTION:OPTION B", "correct option is B", "Choice B.", "Option B", "Ans is B", "ANS:B", "Ans. B", "Answer (B)",
    "Answer B)", "Answer: Option B", "B", "(B)", "B.", "Hence B", "So B", "=> B", "Hence, the correct answer is B.", "so answer is B", "Answer: B) 7 km",
    "Answer B)7", "==> the correct answer is B.", "Thus, B is the correct answer", "B is correct.", "Answer b.", "answer is b", "**Answer: B**",
    "Answer: B\nAnswer: B", "B\nANSWER:B", "IMO B", "Answer will be B", "Therefore the correct choice is (B).", "Answer B 7", "Answer: “B”",
])
def test_every_closing_statement_is_stripped(closing):
    for rationale in ("3+4=7", "We add 3 and 4.\n3+4=7 km.", "Ann is 7."):
        for joint in ("\n", "\n\n ", "\r\n"):
            text, stated = clean_rationale(rationale + joint + closing, "B")
            assert text == rationale and set(stated) == {"B"}, (closing, text)


@pytest.mark.parametrize("rationale", [
    "total salary of B", "the edge of the cube is A", "so A+B=7", "speed of train B", "x = B", "3A", "the answer is a number", "P(A) = B/C",
    "therefore it holds for all", "the answer is 7", "a b c", "There is no answer.", "The options are equal",
])
def test_what_is_no_closing_statement_stays(rationale):
    assert clean_rationale(rationale, "C") == (rationale, [])


def test_a_lone_letter_that_is_not_the_key_stays():
    assert clean_rationale("the larger one is\nA", "B") == ("the larger one is\nA", []) and clean_rationale("it is 5\nA", "A") == ("it is 5", ["A"])


def test_the_answer_stands_once_on_a_line_of_its_own():
    """Bugs of the seed: "= 7.Answer: B" on one line, and the letter twice in two styles."""
    for rationale in ("3+4=7", "3+4=7 Answer: B", "3+4=7.\nAnswer: B", "3+4=7\nB\nANSWER:B"):
        parts = build_conversation(*parse_row(row(rationale=rationale))[:4])["messages"][-1]["content"]
        assert [part["type"] for part in parts] == ["text", "text"] and parts[1]["text"] == "\nAnswer: B"
        assert parts[0]["text"].rstrip(".") == "3+4=7"
    assert answer_text(build_conversation("q", ["1", "2"], "", "A")) == "Answer: A"


def test_the_prompt_asks_for_what_the_grammar_accepts():
    """A bug of the seed: the prompt asked for reasoning and for "only the letter" at once."""
    prompt = build_conversation("What is 3+4?", ["6", "7"], "3+4=7", "B")["messages"][0]["content"]
    assert prompt == 'What is 3+4?\n- 6=A\n- 7=B\nReason, then end with the line "Answer: <letter>".'
    asked = prompt.rpartition('"Answer')[0], prompt.rpartition('line "')[2].removesuffix('".')
    assert extract_answer(asked[1].replace("<letter>", "B")) == "B" and "only" not in prompt


def test_rewards_have_named_parts(tmp_path):
    write_rows(tmp_path / "validation.jsonl", [row()])
    task = AQUA("validation", data_dir=tmp_path)
    assert task.rewards(task[0], answer_text(task[0])) == {"correct": 1.0, "format": 0.1}
    assert task.rewards(task[0], "Answer: C") == {"correct": 0.0, "format": 0.1}
    for text in ("", "B", "the answer is B", "Answer: F"):
        assert task.rewards(task[0], text) == {"correct": 0.0, "format": 0.0}
    assert task.is_correct(task[0], "Answer: B") and not task.is_correct(task[0], "Answer: A")
    bare = AQUA("validation", data_dir=tmp_path, format_bonus=0.0)
    assert bare.reward(bare[0], "Answer: B") == 1.0 and bare.reward(bare[0], "Answer: A") == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Permutations

def five(letter="B", rationale="3+4=7"):
    return build_conversation("What is 3+4?", ["6", "7", "8", "9", "12"], rationale, letter)


def choice_of(conversation, letter):
    letters = conversation["letters"]
    return split_choices(message_text(conversation["messages"][0]), letters)[1][letters.index(letter)]


def test_a_permuted_question_keeps_its_right_text():
    conversation = five()
    before = json.dumps(conversation)
    for permutation in (0, 1, 2, 3, 4, 7, -1, [4, 3, 2, 1, 0], [1, 0, 2, 4, 3]):
        other = permuted(conversation, permutation)
        assert choice_of(other, other["answer_letter"]) == "7" and extract_answer(answer_text(other)) == other["answer_letter"]
        assert all(choice_of(other, letter) == choice_of(conversation, "ABCDE"[i]) for letter, i in zip("ABCDE", other["permutation"]))
        assert message_text(other["messages"][0]).startswith("What is 3+4?\n- ") and message_text(other["messages"][0]).endswith(aqua.INSTRUCTION)
        assert answer_text(other).startswith("3+4=7\n")
    assert json.dumps(conversation) == before            # the original is not touched
    assert message_text(permuted(conversation, 0)["messages"][0]) == message_text(conversation["messages"][0])


def test_the_cyclic_shifts_bring_the_answer_to_every_letter():
    assert sorted(permuted(five(), shift)["answer_letter"] for shift in range(5)) == list("ABCDE")
    assert permuted(five("B"), 1)["answer_letter"] == "C"


def test_a_wrong_permutation_or_prompt_is_refused():
    with pytest.raises(ValueError, match="is not an order of the 5 choices"):
        permuted(five(), [0, 0, 1, 2, 3])
    with pytest.raises(ValueError, match="has no lines"):
        permuted({"messages": [{"role": "user", "content": "A) 1 B) 2"}, {"role": "assistant", "content": "Answer: A"}], "letters": ["A", "B"], "answer_letter": "A"}, 1)


def test_choices_that_look_like_choice_lines_survive():
    conversation = build_conversation("- 5=A\n- 6=B\nWhich?", ["x=A", "- y=B", "=C", "z - 1", "w"], "r", "D")
    for shift in range(5):
        assert choice_of(permuted(conversation, shift), permuted(conversation, shift)["answer_letter"]) == "z - 1"


def test_permuted_training_data_is_balanced_deterministic_and_leaves_named_letters_alone(tmp_path):
    rows = [row(question=f"What is 3+4+{i}-{i}?") for i in range(200)] + [row(rationale="Option B fits: 7")] * 3
    write_rows(tmp_path / "train.jsonl", rows)
    plain, task, again, other = (AQUA("train", tmp_path, permute_options=on, seed=seed) for on, seed in ((False, 1), (True, 1), (True, 1), (True, 2)))
    assert Counter(conversation["answer_letter"] for conversation in plain) == {"B": 203}
    assert Counter(task[i]["answer_letter"] for i in range(200)) == dict.fromkeys("ABCDE", 40)
    assert all(choice_of(conversation, conversation["answer_letter"]) == "7" for conversation in task)
    assert list(task) == list(again) != list(other) and task[7] == task[7]
    assert [task[i] for i in range(200, 203)] == [plain[i] for i in range(200, 203)] and task.flagged["the rationale names a letter"] == 3
    assert len({tuple(conversation["permutation"]) for conversation in list(task)[:200]}) > 50


# ---------------------------------------------------------------------------------------------------------------------
# Where the data comes from

def test_a_folder_is_chosen_by_argument_then_environment_then_base_directory(tmp_path, monkeypatch):
    for name in ("argument", "nanochat", "aqua", "base/aqua"):
        write_rows(tmp_path / name / "validation.jsonl", [row(question=name)])

    def question(**kwargs):
        return message_text(AQUA("validation", **kwargs)[0]["messages"][0]).partition("\n")[0]
    assert question() == "base/aqua"
    monkeypatch.setenv("AQUA_DATA_DIR", str(tmp_path / "aqua"))
    assert question() == "aqua"
    monkeypatch.setenv("NANOCHAT_AQUA_DIR", str(tmp_path / "nanochat"))
    assert question() == "nanochat" and question(data_dir=str(tmp_path / "argument")) == "argument"


def test_a_named_folder_without_the_split_is_an_error_and_no_reason_to_use_the_network(tmp_path, monkeypatch):
    write_rows(tmp_path / "train.jsonl", [row()])
    with pytest.raises(ValueError, match="has no validation.jsonl"):
        AQUA("validation", data_dir=tmp_path)
    monkeypatch.setenv("AQUA_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="AQUA_DATA_DIR"):
        AQUA("train")


def test_half_a_base_directory_is_not_completed_from_the_network(tmp_path):
    write_rows(tmp_path / "base" / "aqua" / "train.jsonl", [row()])
    with pytest.raises(ValueError, match="only 1 other splits"):
        AQUA("test")


def test_without_files_the_hub_is_asked(monkeypatch):
    with pytest.raises(ConnectionError):
        AQUA("test")
    monkeypatch.setattr(aqua, "load_hub_dataset", lambda path, name, split: [row()] if (path, name, split) == ("deepmind/aqua_rat", "raw", "test") else [])
    assert len(AQUA("test")) == 1


def test_the_names_of_the_original_release_work(tmp_path):
    write_rows(tmp_path / "dev.json", [row()])
    write_rows(tmp_path / "train.json", [row(), row()])
    assert len(AQUA("validation", data_dir=tmp_path)) == 1 and len(get_task("aqua", split="train", data_dir=tmp_path)) == 2


def test_a_file_shorter_than_its_counts_is_refused(tmp_path):
    write_rows(tmp_path / "train.jsonl", [row()] * 3)
    (tmp_path / "counts.json").write_text(json.dumps({"train": {"rows": 4}}))
    with pytest.raises(ValueError, match="has 3 rows, but counts.json beside it says 4"):
        AQUA("train", data_dir=tmp_path)


def test_bad_rows_are_counted_and_the_rest_is_used(tmp_path):
    write_rows(tmp_path / "train.jsonl", [row(), row("Z"), row(question=""), row(options=["A)1"]), row()])
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"question": "cut of')
    task = AQUA("train", data_dir=tmp_path, stop=1_000)
    assert len(task) == 2 and sum(task.skipped.values()) == 4 and task.skipped["not a JSON object"] == 1
    write_rows(tmp_path / "test.jsonl", [row("Z")] * 3)
    with pytest.raises(ValueError, match="none of the 3 rows"):
        AQUA("test", data_dir=tmp_path)


def test_shuffle_is_a_fixed_order_of_the_same_rows(tmp_path):
    write_rows(tmp_path / "train.jsonl", [row(question=str(i)) for i in range(50)])
    plain, one, two = (list(map(message_text, (c["messages"][0] for c in AQUA("train", tmp_path, shuffle=shuffle)))) for shuffle in (False, True, True))
    assert one == two != plain and sorted(one) == sorted(plain)


def test_an_unknown_split_names_the_three():
    with pytest.raises(ValueError, match="train, validation, test"):
        AQUA("dev")


def prepared(**changes):
    return {**five(), **changes}


@pytest.mark.parametrize("changes, reason", [
    ({"letters": None}, "letters are not"), ({"letters": ["A", "C"]}, "letters are not"), ({"letters": ["A"]}, "letters are not"), ({"answer_letter": "F"}, "answer_letter"),
    ({"answer_letter": "C"}, "does not give answer_letter"), ({"messages": []}, "not a list"), ({"messages": "hello"}, "not a list"),
    ({"messages": [{"role": "assistant", "content": "Answer: B"}] * 2}, "not a list"), ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "no text"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "B"}]}, "does not give"), ({"messages": [1, 2]}, "not a list"),
    ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "Answer: B"}]}, "no text"), ({"messages": [{}, {}]}, "not a list"),
    ({"messages": [{"role": "user", "content": [{"text": 3}]}, {"role": "assistant", "content": "Answer: B"}]}, "no text"),
])
def test_prepared_rows_are_checked(tmp_path, changes, reason):
    write_rows(tmp_path / "train.jsonl", [prepared(), prepared(**changes)])
    task = AQUA("train", data_dir=tmp_path)
    assert len(task) == 1 and reason in next(iter(task.skipped))


def test_prepared_and_raw_rows_give_the_same_conversation(tmp_path):
    raw = row(level=2)
    write_rows(tmp_path / "raw" / "train.jsonl", [raw])
    write_rows(tmp_path / "both" / "train.jsonl", [{**raw, **build_conversation(*parse_row(raw)[:4])}])
    one, two = (AQUA("train", tmp_path / name)[0] for name in ("raw", "both"))
    assert one == two and one["level"] == 2 and "options" not in one


# ---------------------------------------------------------------------------------------------------------------------
# Preparation

def prepare(tmp_path, **changes):
    return prepare_aqua.main(prepare_aqua.Config(source=str(tmp_path / "raw"), output_dir=str(tmp_path / "out"), **changes))


@pytest.fixture
def raw_files(tmp_path):
    train = [row(question=f"Ann has {i} apples and buys {i} more of them today, how many has she?") for i in range(20)]
    train += [row(question="A  TRAIN runs 60 km in 2 hours!"), row("Z"), row(options=["A)6", "B)7", "C)7", "D)9", "E)12"], rationale="Answer: C")]
    write_rows(tmp_path / "raw" / "train.jsonl", train)
    write_rows(tmp_path / "raw" / "dev.json", [row(question="A train runs 60 km in 2 hours."), row("A"), row("A", question="Ann has 99 apples and buys 98 more of them today, how many has she?")])
    write_rows(tmp_path / "raw" / "test.json", [row(question="Nothing like it")] * 2)


def test_preparation_writes_conversations_counts_and_a_report(tmp_path, raw_files, capsys):
    counts = prepare(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl", "counts.json"}
    assert json.loads((tmp_path / "out" / "counts.json").read_text()) == counts
    train = AQUA("train", data_dir=tmp_path / "out")
    assert len(train) == counts["train"]["rows"] == 20
    assert counts["train"]["skipped"] == {"the key is not a letter of an option": 1, "asks a validation or test question": 2}
    assert counts["train"]["flagged"] == {"two options are equal": 1, "the right option stands twice": 1, "the rationale states another letter": 1, "no rationale": 1}
    assert counts["leaks"]["validation"]["exact"] == 1 and counts["leaks"]["validation"]["normalised"] == 2 and counts["leaks"]["test"]["exact"] == 0
    assert counts["leaks"]["validation"]["number_blind"] == 3 and counts["validation"]["best_constant"] == ["A", 0.6667]
    first = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert {"question", "options", "rationale", "correct", "messages", "letters", "answer_letter"} == set(first)
    printed = capsys.readouterr().out
    assert "always A scores 66.67 %" in printed and "normalised 2" in printed and "states another letter: 1" in printed


def test_limits_keep_the_first_rows_and_zero_leaves_a_split_out(tmp_path, raw_files):
    counts = prepare(tmp_path, max_train=4, max_validation=1, max_test=0)
    assert counts["train"]["rows"] == 4 and counts["validation"]["rows"] == 1 and "test" not in counts and not (tmp_path / "out" / "test.jsonl").exists()
    assert len(AQUA("train", data_dir=tmp_path / "out", stop=20_000)) == 4
    with pytest.raises(ValueError, match="keep nothing"):
        prepare(tmp_path, max_train=0, max_validation=0, max_test=0)


def test_leaks_can_be_kept(tmp_path, raw_files):
    assert prepare(tmp_path, drop_leaks=False)["train"]["rows"] == 22


def test_a_failed_preparation_leaves_the_old_files(tmp_path, raw_files):
    prepare(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_rows(tmp_path / "raw" / "test.json", [row("Z")])
    with pytest.raises(ValueError, match="no row of test can be used"):
        prepare(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_prepared_files_can_be_prepared_again(tmp_path, raw_files):
    prepare(tmp_path)
    again = prepare_aqua.main(prepare_aqua.Config(source=str(tmp_path / "out"), output_dir=str(tmp_path / "again")))
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (tmp_path / "out" / "train.jsonl").read_bytes() and again["train"]["rows"] == 20


def test_the_hub_is_asked_for_the_raw_form_at_the_revision(tmp_path, monkeypatch):
    asked = []

    def hub(path, name, split, revision):
        asked.append((path, name, split, revision))
        return [row(question=f"{split} {i}") for i in range(5)]
    monkeypatch.setattr(prepare_aqua, "load_hub_dataset", hub)
    counts = prepare_aqua.main(prepare_aqua.Config(revision="abc", max_train=3))
    assert asked == [("deepmind/aqua_rat", "raw", split, "abc") for split in ("validation", "test", "train")]
    assert counts["train"]["rows"] == 3 and counts["revision"] == "abc" and len(AQUA("train")) == 3  # the default place is where AQUA looks


def test_both_spellings_of_the_flags_work():
    from nanochat.configurator import parse
    config = parse(prepare_aqua.Config, ["--", "--output_dir=x", "--max-train=5", "--max_test", "7"])
    assert (config.output_dir, config.max_train, config.max_test) == ("x", 5, 7)


def test_similar_questions_are_found_as_by_comparing_every_pair():
    r = random.Random(1)
    vocabulary = [f"w{chr(97 + i)}" for i in range(6)]
    train, held = ([" ".join(r.choice(vocabulary) for _ in range(r.randint(1, 9))) for _ in range(n)] for n in (300, 40))
    found, _ = prepare_aqua.find_leaks(train, {"test": held})
    grams = [[gram_set(words(question), GRAM) for question in questions] for questions in (train, held)]
    best = [max(len(a & b) / len(a | b) for a in grams[0]) for b in grams[1]]
    assert found["test"]["jaccard"] == sum(value > 0.5 for value in best) > 0
    assert found["test"]["closest"]["similarity"] == round(max(best), 3)


# ---------------------------------------------------------------------------------------------------------------------
# The real files

@needs_real_data
def test_always_a_is_right_69_of_254_times_on_the_real_validation_file():
    task = AQUA("validation", data_dir=REAL)
    assert len(task) == 254 and not task.skipped and best_constant(task) == ("A", 69 / 254)


@needs_real_data
def test_every_gold_answer_of_the_real_files_earns_full_reward_in_every_order():
    for split in ("train", "validation"):
        for permute in (False, True):
            task = AQUA(split, data_dir=REAL, permute_options=permute)
            assert not task.skipped
            for conversation in task:
                text = answer_text(conversation)
                assert task.rewards(conversation, text) == {"correct": 1.0, "format": 0.1} and text.lower().count("answer:") <= 2
                assert task.reward(conversation, "") == 0.0


@needs_real_data
def test_real_rationales_no_longer_end_in_their_letter():
    """The seed's rationales did in 85 % of the rows, and said the letter a second time after that."""
    conversations = list(AQUA("validation", data_dir=REAL))
    endings = [message_text({"content": c["messages"][-1]["content"][:1]}).split()[-1].strip(".()") for c in conversations]
    assert sum(ending == c["answer_letter"] for ending, c in zip(endings, conversations)) <= 2


@needs_real_data
def test_permuted_real_questions_keep_the_right_text():
    plain, task = AQUA("validation", data_dir=REAL), AQUA("validation", data_dir=REAL, permute_options=True)
    assert all(choice_of(one, one["answer_letter"]) == choice_of(two, two["answer_letter"]) for one, two in zip(plain, task))
    share = best_constant(task)[1]
    assert share < 0.22
