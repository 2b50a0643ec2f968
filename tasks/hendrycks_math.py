r"""MATH: competition problems of seven subjects and five levels, answered in \boxed{} (Hendrycks et al. 2021, https://arxiv.org/abs/2103.03874).

    user       If $2x + 3 = 11$, what is $x$?
               Reason, then give the final answer in \boxed{}.
    assistant  Subtracting 3 gives $2x = 8$, so $x = \boxed{4}$.

MATH is EleutherAI/hendrycks_math on the Hub (7,500 train, 5,000 test; MIT), MATH-500 the 500 test problems that "Let's Verify Step by Step"
held out, HuggingFaceH4/MATH-500 (chosen in openai/prm800k; MIT). Guessing scores nothing. tasks/latex.py says which answers are equal.
"""
import re
from collections import Counter

from tasks.common import Task, message_text, register
from tasks.latex import last_boxed, same_answer, spelling
from tasks.splits import load_split

PROMPT_END = r"Reason, then give the final answer in \boxed{}."
SUBJECTS = {"algebra": "Algebra", "counting_and_probability": "Counting & Probability", "geometry": "Geometry", "intermediate_algebra": "Intermediate Algebra",
            "number_theory": "Number Theory", "prealgebra": "Prealgebra", "precalculus": "Precalculus"}  # the Hub's name -> the rows' name


class BoxedTask(Task):
    r"""Rows {problem, solution, level, type or subject}: right is a last \boxed{} that says the same as the solution's.

    `subjects` and `levels` choose among the rows; None takes all. Rows whose solution has no box are left out and counted in `skipped`."""

    def __init__(self, rows, subjects=None, levels=None, **slicing):
        super().__init__(**slicing)
        subjects = set(SUBJECTS) if subjects is None else {subjects} if isinstance(subjects, str) else set(subjects)
        if subjects - set(SUBJECTS):
            raise ValueError(f"{self.name} has no subject {', '.join(sorted(subjects - set(SUBJECTS)))}: the {len(SUBJECTS)} are {', '.join(SUBJECTS)}")
        levels = {levels} if isinstance(levels, int) else set(levels or range(1, 6)) | ({None} if levels is None else set())
        self.rows, self.skipped = [], Counter()
        for row in rows:
            subject, level = row.get("type") or row.get("subject"), read_level(row.get("level"))
            if subject not in {SUBJECTS[name] for name in subjects} and subject not in subjects or level not in levels:
                continue
            if last_boxed(row["solution"]) is None:
                self.skipped["no boxed answer"] += 1
            else:
                self.rows.append((row["problem"].strip(), row["solution"].strip(), subject, level))
        if not self.rows:
            raise ValueError(f"{self.name} has 0 problems of subjects {', '.join(sorted(subjects))} and levels {levels} ({dict(self.skipped)}): ask for others")

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        problem, solution, subject, level = self.rows[index]
        return {"messages": [{"role": "user", "content": f"{problem}\n{PROMPT_END}"}, {"role": "assistant", "content": solution}],
                "question": problem, "subject": subject, "level": level}

    def find_answer(self, conversation, text):
        boxed = last_boxed(text)
        return None if boxed is None else spelling(boxed)

    def is_correct(self, conversation, completion):
        return same_answer(last_boxed(completion), last_boxed(message_text(conversation["messages"][-1])))


def read_level(level):
    """"Level 5" or 5 -> 5; None for the two rows whose level is unknown."""
    found = re.fullmatch(r"(?:Level )?([1-5])", str(level))
    return int(found[1]) if found else None


@register("MATH")
class MATH(BoxedTask):
    """One split, from data_dir/{split}.jsonl or from the Hub, where each subject is a configuration of its own."""

    def __init__(self, split="train", data_dir=None, subjects=None, levels=None, **slicing):
        wanted = [subjects] if isinstance(subjects, str) else subjects or SUBJECTS
        configs = [name for name in SUBJECTS if name in wanted] if data_dir is None else ["all"]
        rows = [row for config in configs for row in load_split("EleutherAI/hendrycks_math", config, split, ("train", "test"), data_dir, f"{split}.jsonl")]
        super().__init__(rows, subjects, levels, **slicing)


@register("MATH-500")
class MATH500(BoxedTask):
    """The one split, test, from data_dir/math_500.jsonl or from the Hub. Never train on MATH's test split and report this."""

    def __init__(self, split="test", data_dir=None, subjects=None, levels=None, **slicing):
        super().__init__(load_split("HuggingFaceH4/MATH-500", "default", split, ("test",), data_dir, "math_500.jsonl"), subjects, levels, **slicing)
