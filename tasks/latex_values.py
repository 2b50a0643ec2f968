r"""LaTeX tokens become a value: nested tuples that are equal where two spellings surely mean the same. For tasks/latex.py, which makes the tokens.

Reordering is all that is done to sums and products. No sum is added up, no fraction reduced, no bracket multiplied out, no root taken.
"""
import math
from fractions import Fraction

MAX_NESTING = 12
OPEN, CLOSE = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
GREEK = {"\\" + name for name in "alpha beta gamma delta epsilon varepsilon theta lambda mu nu rho sigma tau phi varphi omega pi infty".split()}


class Unread(Exception):
    """These tokens are no expression whose other spellings are known."""


def read_value(tokens, nesting):
    """Tokens -> a value as nested tuples; equal values are the same answer."""
    if nesting > MAX_NESTING or not tokens:
        return raw(tokens)

    def several(parts):
        return tuple(read_value(part, nesting + 1) for part in parts)

    parts = split(tokens, r"\cup")
    if len(parts) > 1:
        return ("union", *sorted(several(parts), key=repr))
    parts = split(tokens, "=")
    if len(parts) == 2 and all(parts):
        return ("=", *sorted(several(parts), key=repr))
    if tokens[0].startswith(r"\begin{") and tokens[-1] == r"\end" + tokens[0][6:]:
        return ("matrix", tokens[0], *(several(split(row, "&")) for row in split(tokens[1:-1], "\\\\")))
    if tokens[0] in OPEN and closing(tokens, 0) == len(tokens) - 1:
        parts = split(tokens[1:-1], ",")
        if tokens[0] == r"\{":
            return as_set(several(parts))
        if tokens[0] in "([" and len(parts) > 1:
            return ("tuple", tokens[0], *several(parts), tokens[-1])
    parts = [part for part in split(tokens, ",") if part]  # "1, 2, and 3" has an empty part
    if len(parts) > 1:
        return as_set(several(parts))
    if tokens.count(r"\pm") == 1 and r"\mp" not in tokens:
        place = tokens.index(r"\pm")
        return as_set(tuple(read_value(tokens[:place] + [sign] + tokens[place + 1:], nesting + 1) for sign in "+-"))
    try:
        return Expression(tokens, nesting).value()
    except Unread:
        return raw(tokens)


def as_set(values):
    return ("set", *sorted(set(values), key=repr)) if len(set(values)) > 1 else values[0]


def raw(tokens):
    """The tokens themselves, without braces around a single one."""
    kept = []
    for token in tokens:
        kept.append(token)
        if token == "}" and len(kept) >= 3 and kept[-3] == "{":
            kept[-3:] = kept[-2:-1]
    return ("raw", *kept)


def split(tokens, mark):
    """Tokens -> the lists between the marks that stand in no bracket."""
    parts, depth = [[]], 0
    for token in tokens:
        depth += (token in OPEN or token.startswith(r"\begin{")) - (token in CLOSE or token.startswith(r"\end{"))
        if token == mark and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def closing(tokens, start):
    """The place of the bracket that closes the one at `start`, of any kind: intervals are half open; -1 if none does."""
    depth = 0
    for place in range(start, len(tokens)):
        depth += (tokens[place] in OPEN) - (tokens[place] in CLOSE)
        if depth == 0:
            return place
    return -1


ONE = ("*", Fraction(1), ())


class Expression:
    """Recursive descent over sums, products, powers, \\frac and \\sqrt. Every value is ("*", coefficient, ((base, exponent), ...)), the factors
    sorted. Unread is raised for anything else, and where two numbers wait to be added, multiplied or reduced."""

    def __init__(self, tokens, nesting):
        self.tokens, self.nesting = list(reversed(tokens)), nesting  # reversed: the next token is popped

    def value(self):
        value = self.sum()
        if self.tokens:
            raise Unread
        return value

    def peek(self):
        return self.tokens[-1] if self.tokens else ""

    def take(self, *wanted):
        return self.tokens.pop() if self.peek() in wanted and self.tokens else None

    def expect(self, token):
        if not self.take(token):
            raise Unread

    def sum(self):
        terms = []
        while True:
            sign = self.take("+", "-")
            if terms and not sign:
                break
            _, coefficient, factors = self.product()
            terms.append(("*", -coefficient if sign == "-" else coefficient, factors))
        if len({factors for _, _, factors in terms}) < len(terms) or any(term[1] == 0 for term in terms) and len(terms) > 1:
            raise Unread                                # 2 + 3, x + x, x + 0
        return terms[0] if len(terms) == 1 else ("*", Fraction(1), ((("+", *sorted(terms, key=repr)), ONE),))

    def product(self):
        over, under = [], []
        while True:
            operator = self.take(r"\cdot", "/")
            if over and not operator and self.peek() in ("", "+", "-", ")", "]", "}", ",", r"\}"):
                break
            if operator and not over:
                raise Unread
            is_whole = is_digits(self.peek())
            value = self.power()
            if is_whole and value[2] == () and self.peek() == r"\frac":
                value = mixed(value, self.power())
            (under if operator == "/" else over).append(value)
        return quotient(over, under)

    def power(self):
        base = self.atom()
        if not self.take("^"):
            return base
        exponent = self.group()
        if self.peek() in ("^", "!"):
            raise Unread
        return ("*", Fraction(1), ((base, exponent),)) if base[2] == () or len(base[2]) > 1 or base[1] != 1 or base[2][0][1] != ONE \
            else ("*", Fraction(1), ((base[2][0][0], exponent),))

    def group(self):
        """What a command or ^ takes: a group in braces, or one token."""
        if self.peek() == "{":
            return self.atom()
        if self.peek() == "-":
            self.tokens.pop()
            _, coefficient, factors = self.atom()
            return ("*", -coefficient, factors)
        return self.atom()

    def digit(self):
        r"""An argument of \frac: \frac12 is one half."""
        token = self.peek()
        if is_digits(token) and len(token) > 1:
            self.tokens[-1:] = [token[1:], token[0]]
        return self.group()

    def atom(self):
        self.nesting += 1
        if self.nesting > MAX_NESTING or not self.tokens:
            raise Unread
        token = self.tokens.pop()
        if is_digits(token[0]) or token[0] == "." and len(token) > 1:
            value = ("*", Fraction(token), ())
            if self.peek() in ("_", "!"):
                raise Unread                            # a number in another base, a factorial
        elif token in ("(", "[", "{"):
            value = self.sum()
            self.expect({"(": ")", "[": "]", "{": "}"}[token])
        elif token == r"\frac":
            value = quotient([self.digit()], [self.digit()])
        elif token == r"\sqrt":
            degree = ONE
            if self.take("["):
                degree = self.sum()
                self.expect("]")
            value = ("*", Fraction(1), ((("sqrt", degree, self.digit()), ONE),))
        elif token in GREEK or len(token) == 1 and token.isalpha():
            name = (token,)
            if self.take("_"):
                name += (self.group(),)
            value = ("*", Fraction(1), ((("name", *name), ONE),))
        else:
            raise Unread
        self.nesting -= 1
        return value


def is_digits(token):
    return token.isascii() and token.isdigit()


def mixed(whole, part):
    r"""1\frac{1}{2} is three halves."""
    if part[2] != () or not 0 < part[1] < 1:
        raise Unread
    return ("*", whole[1] + part[1], ())


def quotient(over, under):
    """Products of values as one value. Unread where numbers are left to be multiplied or reduced."""
    numbers = [value[1] for value in over if abs(value[1]) != 1]
    divisors = [value[1] for value in under if abs(value[1]) != 1]
    sign = math.prod(-1 if value[1] < 0 else 1 for value in (*over, *under))
    if len(numbers) > 1 or len(divisors) > 1 or any(value == ONE for value in under):
        raise Unread
    coefficient = Fraction(abs(numbers[0])) if numbers else Fraction(1)
    if divisors:
        if coefficient.denominator != 1 or divisors[0].denominator != 1 or divisors[0] == 0 or math.gcd(coefficient.numerator, divisors[0].numerator) > 1:
            raise Unread
        coefficient /= abs(divisors[0])
    factors = [factor for value in over for factor in value[2]]
    factors += [(base, ("*", -exponent[1], exponent[2])) for value in under for base, exponent in value[2]]
    if len({base for base, _ in factors}) < len(factors) or coefficient == 0 and (factors or under):
        raise Unread                                    # x * x, 0 * x
    return ("*", sign * coefficient, tuple(sorted(factors, key=repr)))
