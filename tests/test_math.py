r"""MATH: which \boxed{} counts, which LaTeX answers are equal, and that no text confuses the reader."""
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.common import get_task, message_text
from tasks.latex import TOKEN, last_boxed, read_answer, same_answer, spelling


@pytest.mark.parametrize("text, boxed", [
    (r"so \boxed{4}", "4"), (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\fbox{ 7 }", "7"), (r"\boxed 5", "5"), (r"\boxed12 cm", "12"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\text{a \} b}}", r"\text{a \} b}"), (r"\boxed{x", None), (r"\boxed{1} \boxed{2", None), (r"\boxed{}", None), (r"\boxed{ }", None),
    (r"\boxedx{3}", None), (r"\boxed", None), ("boxed{3}", None), ("", None), (r"\boxed{\boxed{3}}", "3"), (r"\boxed{3\\", None)])
def test_the_last_box_that_closes_is_the_answer(text, boxed):
    assert last_boxed(text) == boxed


EQUAL = [(r"\frac{1}{2}", "0.5"), (r"\dfrac12", r"\tfrac{1}{2}"), (".5", "1/2"), ("5.0", "5"), ("-3", "−3"), (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"1\frac{1}{2}", r"\frac32"),
         ("10,000", "10000"), (r"10{,}000", r"10,\!000"), ("1,234,567.5", "1234567.5"), ("$5$", "5"), ("5.", "5"), (r"\$5.50", "5.5"), (r"50\%", "50"), (r"90^\circ", "90"), (r"90^{\circ}", "90°"),
         (r"5\text{ cm}", "5"), ("12 cm", "12"), (r"6 \text{ inches}^2", "6"), (r"6 \text{ inches}^{2}", "6 inches^2"), (r"3\text{ hours}", "3 hour"),
         ("x+1", "1 + x"), ("x^2+2x+1", "1+2x+x^{2}"), (r"\frac{x}{2}", r"\frac12 x"), (r"\frac{\sqrt{3}}{2}", r"\frac12\sqrt3"), (r"\frac{7\pi}{6}", r"\frac{7}{6}\pi"), (r"3\pi", r"\pi \cdot 3"),
         (r"2\sqrt{3}+1", r"1+2\sqrt 3"), (r"\sqrt[3]{2}", r"\sqrt[3]2"), ("2^{10}", "2^10"), (r"x^{-1}", "x^{-1}"), ("1/x", "x^{-1}"), ("a_1+b", "b+a_{1}"),
         ("x=5", "5"), ("y=2x+3", "y = 3+2x"), (r"x \in [1,2]", "[1,2]"), ("x+y=4", "4 = y+x"), ("f(x)=x", "x"), (r"\{1,2\}", "2, 1"), (r"1 \text{ and } 2", "2,1"), (r"1, 2, \text{ or } 3", "3,2,1"),
         (r"\pm 2", "-2,2"), (r"3\pm\sqrt{2}", r"3+\sqrt2, 3-\sqrt2"), ("(3,4)", r"\left( 3 , 4.0 \right)"), (r"\left(-\infty,3\right]\cup[5,\infty)", r"[5,\infty)\cup(-\infty,3]"),
         (r"\begin{pmatrix}1\\0.5\end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}"), (r"\text{(C)}", "C"), ("(C)", "C"), (r"\text{Even}", "even"), ("2516_8", r"2516_{8}"),
         (r"\sin x", r"\sin  x"), (r"\mathrm{B}", "B"), (r"\text{5}", "5"), (r"x\le 3", r"x \leq 3")]


@pytest.mark.parametrize("one, other", EQUAL)
def test_these_say_the_same(one, other):
    assert same_answer(one, other) and same_answer(other, one) and same_answer(one, one)


DIFFERENT = [("2+2", "4"), ("6/4", "3/2"), (r"\frac{2}{4}", "0.5"), (r"2\cdot3", "6"), ("36/12", "3"), ("2-2", "0"), ("2^{10}", "1024"), ("3!", "6"), ("1/1", "1"), ("x-x", "0"), ("0x", "0"), ("x+x", "2x"),
             (r"\sqrt{4}", "2"), ("--3", "3"), ("(3,4)", "(4,3)"), ("[1,2)", "(1,2)"), ("(1,2)", r"\{1,2\}"), ("(1,200)", "1200"), (r"5\text{ cm}", r"5\text{ m}"), (r"50\%", "0.5"), ("5m", "5"),
             ("x=5", "y=5"), ("x+y=4", "4"), ("even", "neve"), ("ab", "abc"), (r"\sin x\cos y", r"\sin y\cos x"), (r"10:30\text{ a.m.}", "10:30"), (r"\frac12", r"\frac21"), ("1", "-1"), ("", ""), (" ", " "),
             ("x^2", "x^3"), ("0.33", r"\frac13"), (r"\frac{1}{0}", "0"), ("2516_8", "2516"), ("2516_8", "2516_9"), ("1,2", "1,2,3"), ("1", "1,1,2"), (r"\infty", r"-\infty"), ("x<3", "x>3"), ("A", "B"),
             (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), (r"\text{yes}", r"\text{no}"), ("100", "1,000"), ("1e3", "1000"), ("9" * 500, "9" * 499 + ".")]


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_these_do_not(one, other):
    assert not same_answer(one, other) and not same_answer(other, one)


def test_equal_numbers_have_one_spelling():
    assert spelling(r"\frac{1}{2}") == spelling("0.5") == spelling(".50") == "1/2" and spelling("1,000") == spelling(r"1000\text{ cm}") == "1000"
    assert spelling("x + 1") == "x + 1" and spelling("9" * 500) == "9" * 500


ROWS = [{"problem": "What is $2+2$?", "level": "Level 1", "type": "Prealgebra", "solution": r"It is $\boxed{4}$."},
        {"problem": "Roots of $x^2=2$?", "level": "Level 5", "type": "Algebra", "solution": r"They are $\boxed{\pm\sqrt{2}}$."},
        {"problem": "Odds?", "level": "Level ?", "type": "Counting & Probability", "solution": r"$\boxed{\frac{1}{2}}$"},
        {"problem": "No box?", "level": "Level 3", "type": "Algebra", "solution": "4"}]


def test_subjects_and_levels_are_chosen_and_rows_without_a_box_counted(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def chosen(**choice):
        return [conversation["question"] for conversation in get_task("MATH", data_dir=tmp_path, **choice)]

    assert chosen() == ["What is $2+2$?", "Roots of $x^2=2$?", "Odds?"] and get_task("MATH", data_dir=tmp_path).skipped == {"no boxed answer": 1}
    assert chosen(levels=5) == chosen(subjects="algebra") == ["Roots of $x^2=2$?"] and chosen(levels=[1, 2]) == ["What is $2+2$?"]
    assert chosen(subjects=["prealgebra", "counting_and_probability"]) == ["What is $2+2$?", "Odds?"]
    with pytest.raises(ValueError, match="no subject topology: the 7 are algebra"):
        chosen(subjects="topology")
    with pytest.raises(ValueError, match="0 problems"):
        chosen(levels=4)


def test_a_problem_is_judged_by_its_box(tmp_path):
    (tmp_path / "math_500.jsonl").write_text("".join(json.dumps({**row, "answer": "?", "subject": row.pop("type"), "level": 3}) + "\n" for row in map(dict, ROWS)))
    task = get_task("MATH-500", data_dir=tmp_path)
    conversation = task[1]
    assert message_text(conversation["messages"][0]) == "Roots of $x^2=2$?\nReason, then give the final answer in \\boxed{}." and conversation["level"] == 3
    assert task.is_correct(conversation, r"\boxed{\sqrt2, -\sqrt2}") and task.is_correct(conversation, r"\boxed{1}, no: \boxed{\pm\sqrt{2}}")
    assert not any(task.is_correct(conversation, text) for text in (r"\pm\sqrt{2}", r"\boxed{\pm\sqrt{2}", r"\boxed{\sqrt2}", "", r"\boxed{}"))
    assert task.find_answer(conversation, r"\boxed{0.50}") == "1/2" and task.find_answer(conversation, "none") is None
    assert not task.is_correct(task[0], r"\boxed{2+2}")  # the question is no answer


PIECES = ["\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "\\{", "\\}", "1", "23", ".5", "x", "abc", "+", "-", "^", "_", ",", "/", "=", "\\cup", "\\pm", "\\text{a}", "\\begin{pmatrix}",
          "\\end{pmatrix}", "&", "\\\\", "\\", "%", "$", "^\\circ", " ", "\\boxed", "\\boxed{", "!", "\\pi", "²", "ſ", "٣", "\x00", "\ud800", '"']


@settings(max_examples=300, deadline=1000)
@given(st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=150).map("".join), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_no_text_confuses_the_reader(text, other):
    assert same_answer(text, text) is bool(text.strip())
    assert same_answer(text, other) == same_answer(other, text)
    last_boxed(text), spelling(text), read_answer(text)
    assert last_boxed(f"{text}\\boxed{{7}}") == "7" or text.endswith("\\")


@pytest.mark.parametrize("piece", ["(", "{", "\\frac", "\\sqrt", "((1)", "{1}", "\\boxed{", "1,", "x+", "-", "\\pm", "[1,", "2^", "\\{", "\\text{", "a_", "1/"])
def test_long_answers_take_no_time(piece):
    start = time.perf_counter()
    for count in (30, 60, 133, 399, 20_000):
        read_answer((piece * count)[:400])
        same_answer(piece * count, piece * count + "1")
        last_boxed("\\boxed{" + piece * count)
    assert time.perf_counter() - start < 1


@settings(max_examples=200, deadline=1000)
@given(st.fractions(max_denominator=50).filter(lambda value: abs(value) < 10**6))
def test_every_spelling_of_a_number_is_that_number(value):
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    forms = [f"{value}", rf"{sign}\frac{{{top}}}{{{bottom}}}", f"${sign}{top}/{bottom}$"] if bottom > 1 else [f"{value}", f"{sign}{top:,}", f"{value}.00"]
    assert all(same_answer(one, other) for one in forms for other in forms)
    assert not same_answer(forms[0], str(value + 1)) and {spelling(form) for form in forms} == {str(value)}


def test_every_character_belongs_to_a_token():
    text = r"\frac12 \{ a_1 \text{ cm} 10.5%"
    assert "".join(found[0] for found in TOKEN.finditer(text)).replace(" ", "") == text.replace(" ", "")
