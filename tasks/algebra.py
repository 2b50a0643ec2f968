"""Endless AQuA-shaped problems made from a seed: the default data where there is no network, and a curriculum in four levels.

    question   Tom buys 3 pens for 12 coins. What do 5 pens cost?
    options    A)15  B)20  C)24  D)19  E)60
    rationale  12/3=4 so 5*4=20
    correct    B

Made for a model of a million parameters: every number, also inside the rationale, lies within 0..99, so that it is one token;
formulas have no blanks; each step is one operation with its operands and its result. A level says how many operations
a problem takes: 1, 2, 3, and 4 or more.

Train and held-out problems are disjoint by construction: the hash of a problem's kind and numbers, order and wording left out,
decides which split it may appear in, whatever the seed.
"""
import hashlib
import random
import re

from tasks.aqua import LetterTask, build_conversation, parse_row
from tasks.common import balanced, register

LARGEST = 99
LEVELS = (1, 2, 3, 4)
SIZES = {"train": 100_000, "validation": 1_000, "test": 1_000}
NAMES = ("Ann", "Tom", "Sue", "Bob", "Kim", "Max", "Eva", "Sam")
THINGS = ("pens", "cups", "eggs", "books", "coins", "cards", "keys", "hats")
KINDS = {}                                              # kind -> (level, function)


def kind(level):
    """Registers a function (random generator r) -> (numbers, question, steps, answer, wrong): the drawn numbers, a wording,
    the steps of the rationale, the value asked for, and values that a typical mistake leads to."""
    def decorate(function):
        KINDS[function.__name__] = (level, function)
        return function
    return decorate


def people(r):
    return r.sample(NAMES, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Level 1: one operation

@kind(1)
def equation_add(r):
    x, a = r.randint(1, 80), r.randint(1, 50)
    b = x + a
    left = r.choice((f"x+{a}", f"{a}+x"))
    return (a, b), solve(r, f"{left}={b}"), [f"x={b}-{a}={x}"], x, (b + a, b - a + 10)


@kind(1)
def equation_subtract(r):
    x, a = r.randint(2, 99), r.randint(1, 50)
    b = x - a
    return (a, b), solve(r, f"x-{a}={b}"), [f"x={b}+{a}={x}"], x, (abs(b - a), b)


@kind(1)
def equation_multiply(r):
    a = r.randint(2, 33)
    x = r.randint(1, LARGEST // a)
    b = a * x
    return (a, b), solve(r, f"{a}x={b}"), [f"x={b}/{a}={x}"], x, (b - a, b + a)


@kind(1)
def equation_divide(r):
    a = r.randint(2, 33)
    b = r.randint(1, LARGEST // a)
    return (a, b), solve(r, f"x/{a}={b}"), [f"x={b}*{a}={b * a}"], b * a, (a + b, abs(b - a))


@kind(1)
def gain(r):
    a, b = r.randint(2, 80), r.randint(2, 60)
    (one, other), thing = people(r), r.choice(THINGS)
    question = r.choice((f"{one} has {a} {thing} and gets {b} more. How many {thing} now?",
                         f"{one} has {a} {thing}. {other} has {b}. How many {thing} in all?",
                         f"A box has {a} {thing}. {one} adds {b} {thing}. How many now?"))
    return (a, b), question, [f"{a}+{b}={a + b}"], a + b, (abs(a - b), a + b + 10)


@kind(1)
def loss(r):
    a, b = r.randint(5, 99), r.randint(2, 60)
    (one, other), thing = people(r), r.choice(THINGS)
    question = r.choice((f"{one} has {a} {thing} and loses {b}. How many {thing} are left?",
                         f"{one} has {a} {thing} and gives {b} to {other}. How many are left?",
                         f"{one} has {a} {thing}. {other} has {b} less. How many has {other}?"))
    return (a, b), question, [f"{a}-{b}={a - b}"], a - b, (a + b, a - b + 10)


@kind(1)
def product(r):
    a = r.randint(2, 33)
    b = r.randint(2, LARGEST // a)
    one, thing = r.choice(NAMES), r.choice(THINGS)
    question = r.choice((f"One of the {thing} costs {a} coins. What do {b} {thing} cost?",
                         f"{one} has {a} boxes with {b} {thing} each. How many {thing} in all?",
                         f"{one} reads {a} pages a day. How many pages in {b} days?"))
    return (a, b), question, [f"{a}*{b}={a * b}"], a * b, (a + b, a * b + a, a * b - b)


@kind(1)
def share(r):
    a = r.randint(2, 33)
    each = r.randint(2, LARGEST // a)
    total, one, thing = a * each, r.choice(NAMES), r.choice(THINGS)
    question = r.choice((f"{a} boys share {total} {thing}. How many does each get?",
                         f"{one} puts {total} {thing} into {a} equal boxes. How many in each?",
                         f"{a} {thing} cost {total} coins. What does one cost?"))
    return (a, total), question, [f"{total}/{a}={each}"], each, (total - a, each + a)


# ---------------------------------------------------------------------------------------------------------------------
# Level 2: two operations

@kind(2)
def linear_add(r):
    a, x, b = r.randint(2, 9), r.randint(1, 30), r.randint(1, 40)
    c = a * x + b
    left = r.choice((f"{a}x+{b}", f"{b}+{a}x"))
    return (a, b, c), solve(r, f"{left}={c}"), [f"{a}x={c}-{b}={a * x}", f"x={a * x}/{a}={x}"], x, (a * x, (c + b) // a, c - b - a)


@kind(2)
def linear_subtract(r):
    a, x, b = r.randint(2, 9), r.randint(1, 40), r.randint(1, 40)
    c = a * x - b
    return (a, b, c), solve(r, f"{a}x-{b}={c}"), [f"{a}x={c}+{b}={a * x}", f"x={a * x}/{a}={x}"], x, (a * x, abs(c - b) // a, c + b - a)


@kind(2)
def bracket(r):
    a, x, b = r.randint(2, 9), r.randint(1, 30), r.randint(1, 30)
    c = a * (x + b)
    return (a, b, c), solve(r, f"{a}(x+{b})={c}"), [f"x+{b}={c}/{a}={x + b}", f"x={x + b}-{b}={x}"], x, (x + b, (c - b) // a, x + 2 * b)


@kind(2)
def gain_loss(r):
    a, b, c = r.randint(5, 70), r.randint(2, 50), r.randint(2, 50)
    (one, other), thing = people(r), r.choice(THINGS)
    question = r.choice((f"{one} has {a} {thing}, gets {b} and loses {c}. How many {thing} now?",
                         f"{one} has {a} {thing} and gets {b} more. {one} gives {c} to {other}. How many are left?"))
    return (a, b, c), question, [f"{a}+{b}={a + b}", f"{a + b}-{c}={a + b - c}"], a + b - c, (a + b, abs(a - b) + c, abs(a - b - c))


@kind(2)
def rate(r):
    n, unit, m = r.randint(2, 9), r.randint(2, 20), r.randint(2, 12)
    total, one, thing = n * unit, r.choice(NAMES), r.choice(THINGS)
    question = r.choice((f"{n} {thing} cost {total} coins. What do {m} {thing} cost?",
                         f"{one} runs {total} km in {n} hours. How many km in {m} hours?",
                         f"{n} boxes hold {total} {thing}. How many {thing} do {m} boxes hold?"))
    return (n, total, m), question, [f"{total}/{n}={unit}", f"{m}*{unit}={m * unit}"], m * unit, (unit, total + m, total - n + m)


@kind(2)
def age_sum(r):
    a, d = r.randint(2, 45), r.randint(1, 30)
    one, other = people(r)
    question = r.choice((f"{one} is {a}. {other} is {d} years older. What is the sum of their ages?",
                         f"{one} has {a} {r.choice(THINGS)}. {other} has {d} more. How many in all?"))
    return (a, d), question, [f"{a}+{d}={a + d}", f"{a}+{a + d}={a + a + d}"], a + a + d, (a + d, a + a, abs(a + a - d))


@kind(2)
def average_two(r):
    a, b = r.randint(1, 80), r.randint(1, 80)
    question = r.choice((f"What is the average of {a} and {b}?", f"What number is halfway from {a} to {b}?"))
    return (a, b), question, [f"{a}+{b}={a + b}", f"{a + b}/2={(a + b) // 2}"], (a + b) / 2, (a + b, abs(a - b), abs(a - b) // 2)


@kind(2)
def sequence(r):
    start, step, down = r.randint(1, 90), r.randint(1, 15), r.random() < 0.4
    a, b, c, d, e = (start + (-step if down else step) * i for i in range(5))
    question = r.choice((f"What comes next: {a}, {b}, {c}, {d}?", f"Find the next number: {a}, {b}, {c}, {d}."))
    steps = [f"{a}-{b}={step}", f"{d}-{step}={e}"] if down else [f"{b}-{a}={step}", f"{d}+{step}={e}"]
    return (a, b), question, steps, e, (d, 2 * d - a, d + 1)


@kind(2)
def change(r):
    n, price, paid = r.randint(2, 9), r.randint(2, 20), r.randint(5, 99)
    one, thing = r.choice(NAMES), r.choice(THINGS)
    question = r.choice((f"{one} has {paid} coins and buys {n} {thing} at {price} each. How many coins are left?",
                         f"A box has {paid} {thing}. {n} boys take {price} each. How many are left?"))
    return (n, price, paid), question, [f"{n}*{price}={n * price}", f"{paid}-{n * price}={paid - n * price}"], paid - n * price, (
        n * price, paid - price, paid - n - price)


@kind(2)
def percent(r):
    base, p, n, k = draw_percent(r)
    unit, thing = base // n, r.choice(THINGS)
    question = r.choice((f"What is {p}% of {base}?", f"{p}% of {base} {thing} are red. How many are red?"))
    return (p, base), question, [f"{base}/{n}={unit}", f"{k}*{unit}={k * unit}"], k * unit, (base - k * unit, abs(base - p), unit)


def draw_percent(r):
    """-> (base, p, n, k) with p percent = k/n: tenths where the base allows it, else quarters or fifths."""
    n = r.choice((10, 4, 5))
    base, k = n * r.randint(1, LARGEST // n), r.randint(1, n - 1)
    p = 100 * k // n
    if base % 10 == 0 and p % 10 == 0:
        n, k = 10, p // 10
    return base, p, n, k


# ---------------------------------------------------------------------------------------------------------------------
# Level 3: three operations

@kind(3)
def average_three(r):
    a, b, c = (r.randint(1, 60) for _ in range(3))
    s = a + b + c
    question = r.choice((f"What is the average of {a}, {b} and {c}?", f"Find the mean of {a}, {b} and {c}."))
    return (a, b, c), question, [f"{a}+{b}={a + b}", f"{a + b}+{c}={s}", f"{s}/3={s // 3}"], s / 3, (s, (a + b) // 2, s // 2)


@kind(3)
def ratio_share(r):
    m, n, unit = r.randint(1, 9), r.randint(1, 9), r.randint(2, 20)
    total, (one, other), thing = (m + n) * unit, people(r), r.choice(THINGS)
    question = r.choice((f"{one} and {other} share {total} {thing} as {m}:{n}. How many does {one} get?",
                         f"The ratio of red to blue {thing} is {m}:{n}. Of {total} {thing}, how many are red?"))
    return (m, n, total), question, [f"{m}+{n}={m + n}", f"{total}/{m + n}={unit}", f"{m}*{unit}={m * unit}"], m * unit, (
        n * unit, unit, total // m)


@kind(3)
def percent_left(r):
    base, p, n, k = draw_percent(r)
    unit, part, one, thing, sign = base // n, base // n * k, r.choice(NAMES), r.choice(THINGS), r.choice("--+")
    result = base - part if sign == "-" else base + part
    question = r.choice((f"A book for {base} coins is {p}% off. What does it cost?",
                         f"{one} has {base} {thing} and gives away {p}%. How many are left?")) if sign == "-" else r.choice((
                         f"{one} has {base} {thing} and gets {p}% more. How many now?",
                         f"The price of {base} coins goes up by {p}%. What is it now?"))
    return (p, base), question, [f"{base}/{n}={unit}", f"{k}*{unit}={part}", f"{base}{sign}{part}={result}"], result, (
        part, abs(base - p), base - k)


@kind(3)
def two_sides(r):
    c, k, x, b = r.randint(1, 8), r.randint(1, 8), r.randint(1, 20), r.randint(1, 40)
    a, d = c + k, k * x + b
    left, right = f"{a}x+{b}", f"{c if c > 1 else ''}x+{d}"
    equation = r.choice((f"{left}={right}", f"{right}={left}"))
    steps = [f"{a}-{c}={k}", f"{d}-{b}={k * x}", f"x={k * x}/{k}={x}"]
    return (a, b, c, d), solve(r, equation), steps, x, (k * x, (d + b) // k, (d - b) // (a + c))


@kind(3)
def bracket_add(r):
    a, x, b, c = r.randint(2, 9), r.randint(1, 20), r.randint(1, 20), r.randint(1, 40)
    d = a * (x + b) + c
    steps = [f"{d}-{c}={d - c}", f"x+{b}={d - c}/{a}={x + b}", f"x={x + b}-{b}={x}"]
    return (a, b, c, d), solve(r, f"{a}(x+{b})+{c}={d}"), steps, x, (x + b, (d - c - b) // a, x + 2 * b)


@kind(3)
def two_prices(r):
    n, p, m, q = r.randint(2, 9), r.randint(2, 15), r.randint(2, 9), r.randint(2, 15)
    one, (thing, other) = r.choice(NAMES), r.sample(THINGS, 2)
    question = r.choice((f"{one} buys {n} {thing} at {p} and {m} {other} at {q}. What is the total?",
                         f"{n} boxes hold {p} {thing} each. {m} boxes hold {q} each. How many {thing} in all?"))
    steps = [f"{n}*{p}={n * p}", f"{m}*{q}={m * q}", f"{n * p}+{m * q}={n * p + m * q}"]
    return (n, p, m, q), question, steps, n * p + m * q, (n * p, n + p + m + q, n * q + m * p, abs(n * p - m * q))


@kind(3)
def think_back(r):
    x, a, b, c = r.randint(1, 40), r.randint(2, 9), r.randint(1, 40), r.randint(2, 9)
    if (a * x + b) % c:
        return None
    d = (a * x + b) // c
    question = r.choice((f"Take a number, times {a}, plus {b}, divided by {c} is {d}. What is it?",
                         f"{r.choice(NAMES)} takes a number, times {a}, plus {b}, divided by {c}, and gets {d}. Find it."))
    steps = [f"{d}*{c}={d * c}", f"{d * c}-{b}={a * x}", f"{a * x}/{a}={x}"]
    return (a, b, c, d), question, steps, x, (a * x, (d * c + b) // a, abs(d - b) // a)


# ---------------------------------------------------------------------------------------------------------------------
# Level 4: four or more operations, or two unknowns

@kind(4)
def system_sum(r):
    x, y, k = r.randint(1, 60), r.randint(1, 60), r.randint(2, 9)
    s, d, (one, other) = x + y, x - y, people(r)
    ask = r.choice(("x", "y", "k"))
    question = r.choice((f"If x+y={s} and x-y={d}, what is ", f"Given x+y={s} and x-y={d}, find "))
    question += {"x": f"{k}x", "y": "y", "k": f"x+{k}y"}[ask] + ("?" if "what" in question else ".")
    steps = [f"2x={s}+{d}={2 * x}", f"x={2 * x}/2={x}", f"y={s}-{x}={y}"]
    if ask == "x":
        steps[2:], answer = [f"{k}x={k}*{x}={k * x}"], k * x
    elif ask == "k":
        steps, answer = steps + [f"{k}y={k}*{y}={k * y}", f"{x}+{k * y}={x + k * y}"], x + k * y
    else:
        answer = y
    return (s, d, *((k,) if ask != "y" else ())), question, steps, answer, (x, y, s - d, 2 * x)


@kind(4)
def system_weights(r):
    a, k, x, y = r.randint(2, 6), r.randint(1, 6), r.randint(1, 20), r.randint(1, 20)
    b, s = a + k, x + y
    t, (thing, other) = a * x + b * y, r.sample(THINGS, 2)
    question = r.choice((f"If x+y={s} and {a}x+{b}y={t}, what is x?",
                         f"{s} {thing} and {other} cost {t}. Each of the {thing} costs {a}, of the {other} {b}. How many {thing}?"))
    steps = [f"{a}*{s}={a * s}", f"{t}-{a * s}={k * y}", f"{b}-{a}={k}", f"{k * y}/{k}={y}", f"{s}-{y}={x}"]
    return (a, b, s, t), question, steps, x, (y, k * y, abs(t - s) // b)


@kind(4)
def ages_later(r):
    a, young, k = r.randint(2, 8), r.randint(1, 20), r.randint(1, 20)
    old, (one, other) = a * young, people(r)
    s, thing = old + young, r.choice(THINGS)
    question = r.choice((f"{one} is {a} times as old as {other}. Their ages add to {s}. How old is {one} in {k} years?",
                         f"{one} has {a} times as many {thing} as {other}. They have {s} in all. {one} gets {k} more. How many has {one}?"))
    steps = [f"{a}+1={a + 1}", f"{s}/{a + 1}={young}", f"{a}*{young}={old}", f"{old}+{k}={old + k}"]
    return (a, s, k), question, steps, old + k, (old, young + k, young, s + k)


@kind(4)
def average_missing(r):
    a, b, c = (r.randint(1, 60) for _ in range(3))
    if (a + b + c) % 3:
        return None
    m, name = (a + b + c) // 3, r.choice(NAMES)
    question = r.choice((f"The average of {a}, {b} and x is {m}. What is x?",
                         f"{name} scores {a} and {b}. What third score makes the average {m}?"))
    steps = [f"3*{m}={3 * m}", f"{a}+{b}={a + b}", f"{3 * m}-{a + b}={c}"]
    return (a, b, m), question, steps, c, (abs(2 * m - a), 3 * m - a, 3 * m - b, abs(a + b - m))


@kind(4)
def ratio_difference(r):
    n, k, unit = r.randint(1, 8), r.randint(1, 6), r.randint(2, 20)
    m = n + k
    (one, other), thing = people(r), r.choice(THINGS)
    question = r.choice((f"{one} and {other} share {thing} as {m}:{n}. {one} gets {k * unit} more. How many {thing} in all?",
                         f"Red to blue {thing} are {m}:{n}. There are {k * unit} more red. How many {thing} in all?"))
    steps = [f"{m}-{n}={k}", f"{k * unit}/{k}={unit}", f"{m}+{n}={m + n}", f"{m + n}*{unit}={(m + n) * unit}"]
    return (m, n, k * unit), question, steps, (m + n) * unit, (m * unit, n * unit, unit, m + n + k * unit)


@kind(4)
def shop_change(r):
    n, p, m, q, paid = r.randint(2, 9), r.randint(2, 12), r.randint(2, 9), r.randint(2, 12), r.randint(10, 99)
    one, (thing, other) = r.choice(NAMES), r.sample(THINGS, 2)
    question = r.choice((f"{one} has {paid} coins and buys {n} {thing} at {p} and {m} {other} at {q}. How many coins are left?",
                         f"{one} pays {paid} for {n} {thing} at {p} and {m} {other} at {q}. What is the change?"))
    total = n * p + m * q
    steps = [f"{n}*{p}={n * p}", f"{m}*{q}={m * q}", f"{n * p}+{m * q}={total}", f"{paid}-{total}={paid - total}"]
    return (n, p, m, q, paid), question, steps, paid - total, (total, paid - n * p, paid - m * q, abs(total - n))


def solve(r, equation):
    return r.choice((f"If {equation}, what is x?", f"Solve {equation} for x.", f"Find x: {equation}."))


# ---------------------------------------------------------------------------------------------------------------------
# From a drawn problem to a row

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
    return {"question": question, "options": [f"{letter}){value}" for letter, value in zip("ABCDE", values)], "rationale": rationale,
            "correct": "ABCDE"[place], "level": level, "kind": kind}


KINDS_OF_LEVEL = {level: tuple(name for name, (its_level, _) in KINDS.items() if its_level == level) for level in LEVELS}


@register("ALGEBRA", random_accuracy=0.2)
class Algebra(LetterTask):
    """`size` problems of the given levels, equally many of each. Prompt and grammar are AQuA's."""

    def __init__(self, split="train", levels=LEVELS, size=None, seed=42, **kwargs):
        super().__init__(**kwargs)
        if split not in SIZES:
            raise ValueError(f"ALGEBRA has no split {split!r}: the {len(SIZES)} splits are {', '.join(SIZES)}")
        levels = (levels,) if isinstance(levels, int) else tuple(levels)
        if not levels or not set(levels) <= set(LEVELS):
            raise ValueError(f"levels={levels} are not all among {LEVELS}: give at least one of them")
        self.split, self.levels, self.seed = split, levels, seed
        self.size = SIZES[split] if size is None else size

    def num_examples(self):
        return self.size

    def get_example(self, index):
        row = make_problem(self.split, index, balanced(self.levels, index, self.seed, "level"), self.seed)
        question, choices, rationale, letter, _ = parse_row(row)
        return {**build_conversation(question, choices, rationale, letter), "level": row["level"], "kind": row["kind"]}
