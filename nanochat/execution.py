"""What the model wrote, run safely: a calculator for its tool calls and a sandbox for its Python.

The calculator parses arithmetic itself and never evaluates Python. The sandbox starts a fresh interpreter under bubblewrap,
without network, host files, or a way to outlive its time. Nothing here judges an answer: `tasks/` does.
"""
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

# ---------------------------------------------------------------- calculator

MAX_CHARS, MAX_NESTING, MAX_BITS = 256, 32, 512
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
LEXEME = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<operator>\*\*|[-+*/%()]))")
COUNT = re.compile(r"""\s*(?P<q>['"])(?P<text>[^'"\\\n]*)(?P=q)\s*\.\s*count\(\s*(?P<r>['"])(?P<part>[^'"\\\n]+)(?P=r)\s*\)\s*""")


def calculate(expression):
    """An arithmetic expression, or "text".count("part"), as str -> its value as str, or None where it is anything else.

    + - * / ** and parentheses, decimals, thousands commas, and % behind a number for hundredths. Exact rational numbers
    inside: 0.1 + 0.2 is 0.3. Bounded in length, nesting and size, so it answers in microseconds whatever the text.
    """
    if len(expression) > MAX_CHARS:
        return None
    counted = COUNT.fullmatch(expression)
    if counted:
        return str(counted["text"].count(counted["part"]))
    try:
        return format_number(Arithmetic(expression).value())
    except (ArithmeticError, SyntaxError):
        return None


class Arithmetic:
    """Recursive descent: sum > product > sign > power > percent > atom. SyntaxError or ArithmeticError on bad input."""

    def __init__(self, expression):
        self.lexemes, self.next, self.nesting = [], 0, 0
        end, expression = 0, expression.rstrip()
        while end < len(expression):
            match = LEXEME.match(expression, end)
            if not match:
                raise SyntaxError(f"character {end} begins neither a number nor an operator")
            self.lexemes.append(match["number"] or match["operator"])
            end = match.end()

    def value(self):
        total = self.sum()
        if self.next < len(self.lexemes):
            raise SyntaxError(f"{self.lexemes[self.next]!r} follows a complete expression")
        return total

    def take(self, *wanted):
        """The next lexeme if it is one of `wanted`, and step over it; else None."""
        if self.next < len(self.lexemes) and self.lexemes[self.next] in wanted:
            self.next += 1
            return self.lexemes[self.next - 1]
        return None

    def sum(self):
        total = self.product()
        while operator := self.take("+", "-"):
            other = self.product()
            total = bounded(total + other if operator == "+" else total - other)
        return total

    def product(self):
        total = self.signed()
        while operator := self.take("*", "/"):
            other = self.signed()
            total = bounded(total * other if operator == "*" else total / other)
        return total

    def signed(self):
        negative = False
        while sign := self.take("-", "+"):  # a loop: a line of minus signs must not deepen the stack
            negative ^= sign == "-"
        value = self.power()
        return -value if negative else value

    def power(self):
        base = self.percent()
        if not self.take("**"):
            return base
        self.nest()
        exponent = self.signed()  # right-associative, and 2 ** -1 is allowed
        self.nesting -= 1
        return bounded(power(base, exponent))

    def percent(self):
        value = self.atom()
        while self.take("%"):
            value = bounded(value / 100)
        return value

    def atom(self):
        if self.take("("):
            self.nest()
            value = self.sum()
            self.nesting -= 1
            if not self.take(")"):
                raise SyntaxError("a parenthesis is never closed")
            return value
        if self.next == len(self.lexemes) or self.lexemes[self.next] in ("**", "+", "-", "*", "/", "%", ")"):
            raise SyntaxError("a number is missing")
        self.next += 1
        return bounded(Fraction(self.lexemes[self.next - 1].replace(",", "")))

    def nest(self):
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise SyntaxError(f"nested deeper than {MAX_NESTING}")


def bounded(value):
    """The Fraction itself, unless its digits outgrow MAX_BITS: sizes must not double at every operator."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise OverflowError("the number is too long")
    return value


def power(base, exponent):
    """base ** exponent as a Fraction: exact for whole exponents, through a float for roots."""
    if exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) != 1 and bits * abs(exponent.numerator) > 2 * MAX_BITS:
            raise OverflowError("the power is too large")
        return base ** (exponent.numerator if abs(base) != 1 else exponent.numerator % 2)
    if base < 0:
        raise ArithmeticError("a root of a negative number is not real")
    return Fraction(float(base) ** float(exponent))


def format_number(value):
    """A Fraction -> "12", "2.5", "3.333333333": about ten digits, no trailing zeros, never an exponent."""
    if value.denominator == 1:
        return str(value.numerator)
    whole_digits = len(str(abs(value.numerator) // value.denominator))
    if value and abs(value) < Fraction(1, 10**12):
        raise ArithmeticError("too small to print")
    places = max(10 - whole_digits, 2) if abs(value) >= Fraction(1, 10) else 18
    digits = round(abs(value) * 10**places)
    if places == 18:  # keep ten digits behind the leading zeros
        places -= max(len(str(digits)) - 10, 0)
        digits = round(abs(value) * 10**places)
    whole, rest = divmod(digits, 10**places)
    text = f"{whole}.{rest:0{places}d}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 and text != "0" else text


