"""The kinds of problems that tasks/algebra.py draws: 31 skeletons in four levels, each with several wordings.

A kind is a function of a random generator alone. It may draw numbers that do not fit (too large, negative, a fraction):
tasks/algebra.py drops such a draw and asks again, and decides which split the numbers belong to.
"""
LARGEST = 99                                            # every number is one or two digits, so that it is one token
LEVELS = (1, 2, 3, 4)
NAMES = ("Ann", "Tom", "Sue", "Bob", "Kim", "Max", "Eva", "Sam")
THINGS = ("pens", "cups", "eggs", "books", "balls", "cards", "keys", "hats")
KINDS = {}                                              # kind -> (level, function)


def kind(level):
    """Registers a function r -> (numbers, question, steps, answer, wrong): the drawn numbers, a wording, the steps of the
    rationale, the value asked for, and values that a typical mistake leads to. None if nothing fits."""
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
    return (a, b, c, d), question, steps, e, (d, 2 * d - a, d + 1)  # all four: a sequence and its reverse share a split


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
