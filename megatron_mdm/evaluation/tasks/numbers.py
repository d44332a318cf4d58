"""Numbers as answers write them, read exactly: the whole text is a number, or nothing is.

    18   18.0   .5   1,234   12 000   1.5e3   1/3   3 1/2   2 million

with a sign, a currency, a percent sign and emphasis around them. Thousands are groups of three behind one kind of
separator: "1,2,3", "1.000,50" and "12 00" are no numbers. Values are fractions: 1/3 is not 0.333, and 18 is 18.00.
A currency and a percent sign change nothing: 20 % is 20.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_mdm.evaluation.tasks.markup import plain

MAX_DIGITS = 300  # more than that is a model that repeats itself
SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_CURRENCY = r"(?:US|CA|AU|NZ|HK|[ACRS])?[$¢£¤¥฿\u20a0-\u20c0] ?|(?:USD|EUR|GBP|JPY|CNY|INR|CHF|CAD|AUD|Rs\.?) ?"
_BEFORE = rf'(?:[*_`"]|{_CURRENCY})*'
_GROUPED = "|".join(rf"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+(?![0-9])" for mark in (",", " ", "'"))
_DECIMAL = rf"(?P<decimal>(?:(?:{_GROUPED}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}})?)"
_RATIO = r"(?:(?P<whole>[0-9]+) )?(?P<top>[0-9]+) ?(?P<bar>[/\u2044]) ?(?P<bottom>[0-9]+)"
_SCALE = rf"(?: (?P<scale>{'|'.join(SCALES)})s?\b)?"
_BEHIND = rf'(?: ?%)?(?:[*_`"]| ?{_CURRENCY})*'
_NUMBER = re.compile(rf"{_BEFORE}(?:(?P<sign>[-+]){_BEFORE})?(?:{_RATIO}|{_DECIMAL}){_SCALE}{_BEHIND}")


def parse_number(text: str, slash: bool = False) -> Fraction | None:
    """The number that the whole text is, a period at its end aside; None where it is none.

    slash: "1/3" is a number, too; otherwise only a fraction that is typeset as one is.
    """
    found = leading_number(plain(text).strip(), slash)
    return found[0] if found is not None and found[1] in ("", ".") else None


def leading_number(text: str, slash: bool = False) -> tuple[Fraction, str] | None:
    """The number that a plain text (markup.plain) begins with, and the rest of the text, which is for the caller to
    judge: behind the 1 of "1,2,3" comes ",2,3"."""
    match = _NUMBER.match(text)
    if match is None or sum(map(str.isdigit, match[0])) > MAX_DIGITS:
        return None
    value = _value(match, slash)
    return None if value is None else (value, text[match.end() :])


def written(value: Fraction) -> str:
    """The one way to write a value: 18, -0.5, 1/3."""
    remaining = value.denominator
    for prime in (2, 5):
        while remaining % prime == 0:
            remaining //= prime
    if remaining != 1:
        return f"{value.numerator}/{value.denominator}"
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    sign = "-" if value < 0 else ""
    point = len(digits) - places
    return f"{sign}{digits[:point]}.{digits[point:]}" if places else f"{sign}{digits}"


def _value(match: re.Match[str], slash: bool) -> Fraction | None:
    if match["decimal"] is not None:
        value = Fraction(re.sub("[, ']", "", match["decimal"]).removesuffix("."))
    else:
        whole, top, bottom = (int(match[name] or 0) for name in ("whole", "top", "bottom"))
        if bottom == 0 or not (slash or match["bar"] == "\u2044") or (match["whole"] and top >= bottom):
            return None
        value = whole + Fraction(top, bottom)
    return (-value if match["sign"] == "-" else value) * SCALES.get(match["scale"] or "", 1)
