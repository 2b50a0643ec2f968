"""Text -> number pieces that the rewards of several tasks share. Pure functions: no task, no model, no tokenizer.

Extractors are strict: what is not clearly a number is None, never a guess.
"""
import re
from fractions import Fraction

# 1,234.5  -7  3/4 : a sign counts only where it cannot be a minus between two numbers; commas only in groups of three.
NUMBER = re.compile(r"(?<![\w.,])(?:(?<![)\]])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+(?!\.\d))?(?![\w]|[.,]\d)", re.ASCII)
MAX_DIGITS = 40                                         # a longer "number" is noise, and int() of it takes quadratic time


def parse_number(text):
    """The exact value of a number as people write it ("$1,234.50", "3/4", "-7", "60%", "12."), or None if it is anything else."""
    text = text.strip().lstrip("$").rstrip("%").strip().removesuffix(".")
    if len(text) > MAX_DIGITS or not NUMBER.fullmatch(text):
        return None
    top, _, bottom = text.replace(",", "").partition("/")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / int(bottom or 1)


def last_number(text):
    """The value of the last number in a text, or None if there is no number or the last one makes no sense."""
    found = None
    for found in NUMBER.finditer(text):
        pass
    return parse_number(found.group()) if found else None


def same_number(one, other):
    """True if both texts are numbers of equal value: "1,000" and "1000.0" are."""
    value = parse_number(one)
    return value is not None and value == parse_number(other)


def length_penalty(mode, length, max_length, coefficient, target, floor=0.0):
    """The reward part of a completion's length in tokens: "linear" beyond the target, or "dapo", a ramp from the target to max_length."""
    if mode == "linear":
        return linear_length_penalty(length, target, coefficient, floor)
    return coefficient * soft_overlong_penalty(length, max_length, max_length - target)


def linear_length_penalty(length, target, coefficient, floor=0.0):
    """0 up to the target, then -coefficient for each further token, but never below -floor when floor > 0."""
    penalty = -coefficient * max(0, length - target)
    return max(penalty, -floor) if floor > 0 else penalty


def soft_overlong_penalty(length, max_length, buffer):
    """0 until `buffer` tokens before max_length, falling to -1 at max_length and beyond (DAPO, arXiv 2503.14476, eq. 13)."""
    if not 0 < buffer <= max_length:
        raise ValueError(f"the buffer must be within 1..max_length, not {buffer} with max_length={max_length}: try {max(1, max_length // 5)}")
    return -min(1.0, max(0.0, (length - (max_length - buffer)) / buffer))
