"""Endless AQuA-shaped problems made from a seed: the default data where there is no network, and a curriculum in four levels.

    question   5 keys cost 85 coins. What do 3 keys cost?
    options    A)22  B)83  C)17  D)51  E)7
    rationale  85/5=17 so 3*17=51
    correct    D

Made for a model of a million parameters: every number, also inside the rationale, lies within 0..99, so that it is one token;
formulas have no blanks; each step is one operation with its operands and its result. Levels 1, 2 and 3
take that many operations; level 4 takes 3 to 5 and has two unknowns or a condition to turn round.

Train and held-out problems are disjoint by construction: the hash of a problem's kind and numbers, order and wording left out,
decides which split it may appear in, whatever the seed.
"""
import copy
import hashlib
import random
import re

from tasks.algebra_kinds import KINDS, LARGEST, LEVELS
from tasks.aqua import LetterTask, build_conversation
from tasks.common import balanced, register

RAW_FIELDS = ("question", "options", "rationale", "correct")
SIZES = {"train": 100_000, "validation": 1_000, "test": 1_000}


# ---------------------------------------------------------------------------------------------------------------------
# From a drawn problem to a row

KINDS_OF_LEVEL = {level: tuple(name for name, (its_level, _) in KINDS.items() if its_level == level) for level in LEVELS}


def split_of(kind, numbers):
    """The only split in which a problem with these numbers may appear: validation 5 %, test 5 %, train 90 %."""
    key = f"{kind}|{','.join(map(str, sorted(numbers)))}"
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 20
    return {0: "validation", 10: "test"}.get(bucket, "train")


def draw_problem(r, split, level):
    """-> (kind, question, rationale, answer, wrong) of a problem that belongs to the split."""
    kind = r.choice(KINDS_OF_LEVEL[level])
    while True:                                         # ends: test_algebra finds problems of each kind in each split
        drawn = draw(r, kind)
        if drawn and split_of(kind, drawn[0]) == split:
            return kind, *drawn[1:]


def draw(r, kind):
    """One sound problem of a kind -> (numbers, question, rationale, answer, wrong); None if the numbers came out unfit."""
    drawn = KINDS[kind][1](r)
    if drawn is None:
        return None
    numbers, question, steps, answer, wrong = drawn
    rationale = " so ".join(steps)
    if answer != int(answer) or answer < 0 or "--" in rationale or re.search(r"[=:,( ]-\d", f"{question} {rationale}"):
        return None
    if any(len(number) > 2 for number in re.findall(r"\d+", f"{question} {rationale}")):
        return None
    return numbers, question, rationale, int(answer), wrong


# (size of the answer's cluster, sizes of the others) once for each place in the partitions 2+2+1, 3+2, 3+1+1 and 2+1+1+1
SLOTS = ((2, (2, 1)),) * 4 + ((1, (2, 2)),) + ((3, (2,)),) * 3 + ((2, (3,)),) * 2 + ((3, (1, 1)),) * 3 + ((1, (3, 1)),) * 2 \
    + ((2, (1, 1, 1)),) * 2 + ((1, (2, 1, 1)),) * 3
STEPS = (1, 1, 2, 3, 5, 10, -1, -1, -2, -3, -5, -10)    # distances of near misses


def choose_options(r, answer, wrong):
    """Four wrong values, all different, in 0..99, such that the five options alone do not tell which one is right.

    They come in clusters of near misses: one cluster holds the answer, the others a typical mistake each. The answer takes a
    random place of the partition and of its cluster, so it is neither the centre of the crowd nor the lone value more often
    than by chance, and its rank by size is drawn first."""
    rank = max(min(r.randint(0, 4), answer), 4 - (LARGEST - answer))
    mistakes = [value for value in wrong if 0 <= value <= LARGEST and value != answer]
    for attempt in range(60):
        own, others = r.choice(SLOTS)
        values = set(cluster(r, answer, own))
        for size in others:
            # a random number now and then: kinds with one typical mistake would show it in every problem
            centre = mistakes[int(r.random() * len(mistakes))] if mistakes and r.random() < 0.8 else int(r.random() * (LARGEST + 1))
            values.update(cluster(r, centre, size))
        if len(values) == 5 and min(values) >= 0 and max(values) <= LARGEST and sum(value < answer for value in values) == rank:
            values.discard(answer)
            return sorted(values)
    below, above = list(range(answer)), list(range(answer + 1, LARGEST + 1))    # the numbers were too near to 0 or 99
    return r.sample(below, rank) + r.sample(above, 4 - rank)


def cluster(r, value, size):
    """`size` near numbers, one of which is the value: any of them could be the one that the others were made from."""
    if size == 1:
        return (value,)
    near = [0]
    while len(near) < size:
        other = near[int(r.random() * len(near))] + STEPS[int(r.random() * len(STEPS))]
        if other not in near:
            near.append(other)
    shift = value - near[int(r.random() * size)]
    return [number + shift for number in near]


def make_problem(split, index, level=None, seed=42):
    """The problem at an index of a split, as a raw AQuA row with "level" and "kind". The same arguments give the same problem;
    level None lets the index choose it. Among 5 consecutive indices each letter is right once."""
    if split not in SIZES:
        raise ValueError(f"ALGEBRA has no split {split!r}: the {len(SIZES)} splits are {', '.join(SIZES)}")
    level = level or balanced(LEVELS, index, seed, split, "level")
    r = random.Random(f"{seed}|{split}|{index}|{level}")
    kind, question, rationale, answer, wrong = draw_problem(r, split, level)
    values = choose_options(r, answer, wrong)
    r.shuffle(values)
    place = balanced(range(5), index, seed, split, "letter")
    values.insert(place, answer)
    letter = "ABCDE"[place]
    return {"question": question, "options": [f"{name}){value}" for name, value in zip("ABCDE", values)],
            "rationale": f"{rationale} so {answer}={letter}", "correct": letter, "level": level, "kind": kind}


def prepared(row):
    """A problem as raw row -> with its conversation, in the form that scripts.prepare_aqua writes. Its rationale ends with the
    line of the right option ("so 82=E"): a model of a million parameters copies what followed the value in the prompt long
    before it can carry the value over to the letter of the next line (dev/LOG.md)."""
    choices = [option.split(")", 1)[1] for option in row["options"]]
    return {**row, **build_conversation(row["question"], choices, row["rationale"], row["correct"])}


@register("ALGEBRA", random_accuracy=0.2)
class Algebra(LetterTask):
    """`size` problems of the given levels, equally many of each. Prompt and grammar are AQuA's."""

    def __init__(self, split="train", levels=LEVELS, size=None, seed=42, **kwargs):
        super().__init__(**kwargs)
        if split not in SIZES:
            raise ValueError(f"ALGEBRA has no split {split!r}: the {len(SIZES)} splits are {', '.join(SIZES)}")
        self.split, self.levels, self.seed = split, checked_levels(levels), seed
        self.size = SIZES[split] if size is None else size

    def with_levels(self, levels):
        """The same task, with problems of these levels only: a curriculum opens one after the other."""
        task = copy.copy(self)
        task.levels = checked_levels(levels)
        return task

    def num_examples(self):
        return self.size

    def get_example(self, index):
        row = make_problem(self.split, index, balanced(self.levels, index, self.seed, "level"), self.seed)
        return {name: value for name, value in prepared(row).items() if name not in RAW_FIELDS}


def checked_levels(levels):
    levels = (levels,) if isinstance(levels, int) else tuple(levels)
    if not levels or not set(levels) <= set(LEVELS):
        raise ValueError(f"levels={levels} are not all among {LEVELS}: give at least one of them")
    return levels
