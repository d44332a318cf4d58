"""The exact value of an arithmetic expression that a model wrote: a parser of our own, which runs nothing."""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 200  # characters
MAX_DEPTH = 32  # parentheses and signs within each other

_TOKEN = re.compile(r" *(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|([-+*/()]))")


def value_of(expression: str) -> Fraction:
    """The value by the usual rules of + - * / and parentheses, as a fraction.

    Raises ValueError where it is longer or deeper than allowed, is no such expression (names, **, //, 2(3), 03 …), or
    divides by zero.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    parser = _Parser(_tokens(expression.strip(" ")))
    value = parser.sum(0)
    parser.expect("")
    return value


def _tokens(expression: str) -> list[str]:
    tokens = []
    place = 0
    while place < len(expression):
        match = _TOKEN.match(expression, place)
        if match is None:
            raise ValueError(f"{expression[place]!r} is no part of an expression")
        tokens.append(match[1] or match[2])
        place = match.end()
    return tokens


class _Parser:
    """By recursive descent: a sum of products of signed numbers and sums in parentheses."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.place = 0

    @property
    def next(self) -> str:
        """The next token; empty at the end."""
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        token = self.next
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise ValueError(f"expected {token or 'the end'}")

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value += sign * self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self.next in ("*", "/"):
            divides = self.take() == "/"
            factor = self.factor(depth)
            if divides and not factor:
                raise ValueError("division by zero")
            value = value / factor if divides else value * factor
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ValueError(f"deeper than {MAX_DEPTH}")
        token = self.take()
        if token in ("+", "-"):
            value = self.factor(depth + 1)
            return value if token == "+" else -value
        if token == "(":
            value = self.sum(depth + 1)
            self.expect(")")
            return value
        if not token or token in "*/)":
            raise ValueError(f"expected a number, found {token or 'the end'}")
        if len(token) > 1 and token[0] == "0" and token[1] != ".":
            raise ValueError(f"{token} begins with 0")
        return Fraction(token.removesuffix("."))
