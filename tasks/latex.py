r"""LaTeX answers of mathematics problems: find the boxed one, and tell whether two of them say the same.

Sound before complete: \frac12 is 0.5, 1+x is x+1 and {2,1} is 1, 2, but arithmetic that was left undone is never done here. Whoever
boxes 2+2 where 4 is asked has not answered, so 2+2, 6/4 and 2\cdot 3 equal only themselves; so does everything this file cannot read.
"""
import math
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS, MAX_NESTING = 400, 12                        # a longer answer equals only the same text
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
BARE = re.compile(r"-?[0-9]+(?:\.[0-9]+)?|[a-zA-Z](?![a-zA-Z])", re.ASCII)  # \boxed 5
WORDS = r"text|textbf|textit|textrm|mbox|hbox|mathrm|mathbf|mathit|operatorname"
TOKEN = re.compile(rf"\\(?:{WORDS})\s*\{{(?P<text>[^{{}}]*)\}}|(?P<environment>\\(?:begin|end)\s*\{{[a-z]+\*?\}})|\\[a-zA-Z]+|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
                   r"|[a-zA-Z]{3,}|(?:cm|mm|km|kg|ft)(?![a-zA-Z])|[a-zA-Z]|\S", re.ASCII)
THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:(?:,|\{,\}|,\\!|\\,)[0-9]{3})+(?![0-9]|,[0-9])", re.ASCII)
UNICODE = str.maketrans({"−": "-", "–": "-", "·": r"\cdot ", "×": r"\times ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "°": r"^\circ ", "½": r"\frac12 "})
SPACING = {r"\,", r"\!", r"\;", r"\:", r"\ ", "~", r"\quad", r"\qquad", r"\left", r"\right", r"\displaystyle", r"\big", r"\Big", r"\bigl", r"\bigr", "$",
           r"\(", r"\)", r"\[", r"\]"}
SAME = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\times": r"\cdot", "*": r"\cdot",
        r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\degree": r"\circ", "%": r"\%", r"\lt": "<", r"\gt": ">"}
OPEN, CLOSE = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
GREEK = {"\\" + name for name in "alpha beta gamma delta epsilon varepsilon theta lambda mu nu rho sigma tau phi varphi omega pi infty".split()}
WORD = '"'                                              # what a token of words begins with


class Answer(NamedTuple):
    """What an answer says: of which unknown, its value in one form, and its unit. An absent unknown or unit agrees with any."""
    unknown: tuple
    value: tuple
    unit: str


def last_boxed(text):
    r"""The content of the last \boxed{...} or \fbox{...}, or of \boxed 5; None if there is none, it is empty, or it never closes."""
    last = None
    for last in BOX.finditer(text):
        pass
    if last is None:
        return None
    start = last.end()
    if text[start:start + 1] != "{":
        bare = BARE.match(text, start)
        return bare[0] if bare else None
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2                                  # \{ and \} are no groups
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1:place].strip() or None
        place += 1
    return None


def same_answer(one, other):
    """True if two answers in LaTeX are surely the same."""
    if one is None or other is None or not one.strip() or not other.strip():
        return False
    if one.strip() == other.strip():
        return True
    one, other = read_answer(one), read_answer(other)
    if one is None or other is None or one.value != other.value:
        return False
    if one.unknown and other.unknown and one.unknown != other.unknown:
        return False
    # 5 answers "how many cm?", but 10:30 does not tell a.m. from p.m.
    return one.unit == other.unit or ((not one.unit or not other.unit) and one.value[0] != "raw")


def spelling(text):
    """One spelling for an answer: equal numbers have equal ones. For tables and votes; `same_answer` judges."""
    answer = read_answer(text)
    if answer and answer.value[0] == "*" and not answer.value[2]:
        return str(answer.value[1])
    return " ".join(text.split())


def read_answer(text):
    """A text -> Answer, or None if it is empty or too long to read."""
    if len(text) > MAX_CHARS:
        return None
    tokens = tokenize(text)
    unit, tokens = split_unit(tokens)
    unknown, tokens = split_unknown(tokens)
    if not tokens:
        return Answer((), ("raw", unit), "") if unit else None
    return Answer(unknown, read_value(tokens, 0), unit)


# ---------------------------------------------------------------------------------------------------------------------
# Characters become tokens

def tokenize(text):
    """-> commands, numbers, single letters, signs, and words, each of which begins with WORD. Spacing, and what only looks different, is gone."""
    text = unicodedata.normalize("NFC", text).translate(UNICODE).strip().strip("$").strip().removesuffix(".").removesuffix("\\")
    if not text.startswith(("(", "[", "\\left", "\\{")):  # a comma in 10,000; but (1,200) is a pair
        text = THOUSANDS.sub(lambda found: re.sub("[^0-9]", "", found[0]), text)
    tokens = []
    for found in TOKEN.finditer(text):
        token = found[0]
        if found["text"] is not None:
            tokens += read_words(found["text"])
        elif found["environment"]:
            tokens.append("".join(token.split()))
        elif token[0].isascii() and token[0].isalpha() and len(token) > 1:
            tokens += read_words(token)
        elif token not in SPACING:
            tokens.append(SAME.get(token, token))
    return tokens


def read_words(content):
    """What stands inside \\text{}: words, a list's "and", the letter of a choice, or a number after all -> tokens."""
    words = " ".join(content.split()).strip(" .")
    if words.lower() in ("and", "or", ", and", ", or"):
        return [","]
    choice = re.fullmatch(r"\(?([A-Za-z])\)?", words)
    if choice:
        return [choice[1]]
    if re.fullmatch(r"-?[0-9]+(?:\.[0-9]+)?", words):
        return ["-", words[1:]] if words[0] == "-" else [words]
    return [WORD + words.casefold()] if words else []


def split_unit(tokens):
    """-> (unit, the tokens without it): words, degrees or percent at the end, dollars in front."""
    tokens, unit = list(tokens), []
    if tokens[:1] == [r"\$"]:
        return "dollar", tokens[1:]
    if tokens[:2] == ["-", r"\$"]:
        return "dollar", ["-", *tokens[2:]]
    power = []
    if len(tokens) >= 3 and tokens[-2] == "^" and tokens[-1] in "23" and tokens[-3].startswith(WORD):
        tokens, power = tokens[:-2], tokens[-1:]
    elif len(tokens) >= 5 and tokens[-4:-2] == ["^", "{"] and tokens[-1] == "}" and tokens[-2] in "23" and tokens[-5].startswith(WORD):
        tokens, power = tokens[:-4], tokens[-2:-1]
    while tokens and tokens[-1].startswith(WORD):
        unit.insert(0, tokens.pop()[1:].removesuffix("s"))
    if tokens[-2:] == ["^", r"\circ"]:
        return "degree", tokens[:-2]
    if tokens[-4:] == ["^", "{", r"\circ", "}"]:
        return "degree", tokens[:-4]
    if tokens[-1:] == [r"\%"]:
        return "percent", tokens[:-1]
    return " ".join(unit + power), tokens


def split_unknown(tokens):
    r"""x = 5, a_1 = 5, f(x) = 5, x \in [0,1] -> (the tokens of the unknown, the rest)."""
    for length in (1, 3, 4):
        if len(tokens) > length + 1 and tokens[length] in ("=", r"\in") and tokens.count("=") + tokens.count(r"\in") == 1:
            left = tokens[:length]
            is_letter = len(left[0]) == 1 and left[0].isalpha()
            if is_letter and (length == 1 or left[1] == "_" and length == 3 or left[1] == "(" and left[3:] == [")"]):
                return tuple(left), tokens[length + 1:]
    return (), tokens


# ---------------------------------------------------------------------------------------------------------------------
# Tokens become a value

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
