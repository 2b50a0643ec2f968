r"""LaTeX answers of mathematics problems: find the boxed one, and tell whether two of them say the same.

Sound before complete: \frac12 is 0.5, 1+x is x+1 and {2,1} is 1, 2, but arithmetic that was left undone is never done here. Whoever
boxes 2+2 where 4 is asked has not answered, so 2+2, 6/4 and 2\cdot 3 equal only themselves; so does everything this file cannot read.
"""
import re
import unicodedata
from typing import NamedTuple

from tasks.latex_values import read_value

MAX_CHARS = 400                                         # a longer answer equals only the same text
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
