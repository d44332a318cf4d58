"""A picture as characters of a terminal: half blocks in 24-bit colours."""

from __future__ import annotations

import os
from typing import TextIO

import numpy as np
from PIL import Image

_UPPER_HALF = "▀"
_LARGEST = 64  # pixels of a side to which small pictures are enlarged, in whole factors


def has_colors(output: TextIO) -> bool:
    """Whether it is a terminal that says it shows 24-bit colours."""
    return output.isatty() and os.environ.get("COLORTERM", "") in ("truecolor", "24bit")


def blocks(image: Image.Image, columns: int, lines: int) -> list[str]:
    """Lines of at most so many columns: a character shows two pixels, one above the other."""
    pixels = np.asarray(_fitted(image, columns, 2 * lines))
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:1])])
    return [
        "".join(map(_character, upper.tolist(), lower.tolist())) + "\x1b[0m"
        for upper, lower in zip(pixels[::2], pixels[1::2])
    ]


def _character(upper: list[int], lower: list[int]) -> str:
    foreground, background = (";".join(map(str, color)) for color in (upper, lower))
    return f"\x1b[38;2;{foreground};48;2;{background}m{_UPPER_HALF}"


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    factor = min(width // image.width, height // image.height, max(1, _LARGEST // max(image.size)))
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    smaller = image.copy()
    smaller.thumbnail((max(1, width), max(1, height)))
    return smaller
