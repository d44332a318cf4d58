"""Answers without their markup: LaTeX, HTML tags, typographic signs; and what stands in \\boxed{…}."""

from __future__ import annotations

import re
import unicodedata

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f", " "),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        **dict.fromkeys("‘’´", "'"),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff"),
        **{chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)},  # full width
        "\u2215": "\u2044",
        "￥": "¥",
        "￡": "£",
    }
)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_ONE_CHARACTER_FRACTION = re.compile(r"([0-9]?)([¼½¾⅐-⅞])")
_WRAPPER = re.compile(r"\\(?:boxed|fbox|mbox|text\w*|math(?:bf|rm|it|sf|tt)|bm|emph|underline)\s*\{([^{}]*)\}")
# White space is looked at from its beginning only: a run of it must not be searched from each of its places.
_FRACTION = re.compile(r"([0-9]?)(?:(?<!\s)\s+)?\\[dt]?frac(?:\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\s*([0-9])\s*([0-9]))")
_LATEX = [
    (re.compile(r"\\\\"), "\n"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;:! ]|(?<=\S)~(?=\S)"), " "),
    (re.compile(r"\\[()\[\]]"), ""),
    (re.compile(r"\\([$%&#_])"), r"\1"),
]
_BOX = re.compile(r"\\boxed\s*\{")
_DEEPEST = 32  # wrappers within each other; more than that is a model that repeats itself


def plain(text: str) -> str:
    """The text without LaTeX's wrappers and spaces, HTML tags and unusual forms of spaces, signs, quotes and digits.

    A fraction that is typeset as one (\\frac{1}{2}, ½) becomes "1⁄2" with U+2044, which "1/2" does not have: that may
    be a year or a name.
    """
    text = _TAG.sub("", text.translate(_CHARACTERS))
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    for _ in range(_DEEPEST):
        inner = _unwrapped(text)
        if inner == text:
            break
        text = inner
    return _ONE_CHARACTER_FRACTION.sub(lambda m: _apart(m[1]) + unicodedata.normalize("NFKC", m[2]), text)


def boxed_content(response: str) -> str | None:
    """What stands in the last \\boxed{…}, braces inside it balanced; None where there is none, or the last has no
    end."""
    boxes = list(_BOX.finditer(response))
    if not boxes:
        return None
    first = boxes[-1].end()
    depth = 1
    for place in range(first, len(response)):
        depth += {"{": 1, "}": -1}.get(response[place], 0)
        if depth == 0:
            return response[first:place]
    return None


def _unwrapped(text: str) -> str:
    """The text without its innermost wrappers and fractions."""
    text = _WRAPPER.sub(r"\1", text)
    return _FRACTION.sub(lambda m: f"{_apart(m[1])}{m[2] or m[4]}\u2044{m[3] or m[5]}", text)


def _apart(digit: str) -> str:
    """A space behind a digit that stands before a fraction: 3½ is three and a half, not 31⁄2."""
    return f"{digit} " if digit else ""
