"""Many pictures on one, with their captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_CELL = 128  # least width of a picture on the sheet, pixels
_LARGEST = 512  # most
_GAP = 8
_FONT_SIZE = 14
_LINES = 3  # of a caption
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 0) -> Image.Image:
    """A grid of RGB pictures, row by row, each above its caption, of which three lines are shown.

    Small pictures are enlarged by whole factors, pixel by pixel. columns 0: about square.
    """
    columns = columns or max(1, math.ceil(math.sqrt(len(images))))
    rows = max(1, math.ceil(len(images) / columns))
    shown = [_fitted(image) for image in images]
    font = ImageFont.load_default(_FONT_SIZE)
    width = max([_CELL, *(image.width for image in shown)])
    height = max([_CELL, *(image.height for image in shown)])
    texts = [_wrapped(caption, font, width) for caption in captions]
    line_height = _FONT_SIZE + 4
    below = line_height * max((len(lines) for lines in texts), default=0)
    cell = (width + _GAP, height + below + _GAP)
    result = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(result)
    for place, (image, lines) in enumerate(zip(shown, texts, strict=True)):
        left = _GAP + place % columns * cell[0]
        top = _GAP + place // columns * cell[1]
        result.paste(image, (left, top))
        for number, line in enumerate(lines):
            draw.text((left, top + height + number * line_height), line, fill=_INK, font=font)
    return result


def _fitted(image: Image.Image) -> Image.Image:
    factor = _CELL // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if max(image.size) > _LARGEST:
        image = image.copy()
        image.thumbnail((_LARGEST, _LARGEST))
    return image


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of words that fit the width; a word that does not is cut, and what is beyond _LINES is left out."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        lines[-1] = _cut(word, font, width)
        if len(lines) > _LINES:
            break
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], _cut(f"{lines[_LINES - 1]} …", font, width)]
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
