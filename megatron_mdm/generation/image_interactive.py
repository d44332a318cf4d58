"""Captions typed in a terminal, which shows each picture as it forms."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from typing import TextIO

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.captions import Caption
from megatron_mdm.data.lengths import Room
from megatron_mdm.data.tokenizer import Tokenizer
from megatron_mdm.generation.image_sampler import UNKNOWN, denoise_images
from megatron_mdm.generation.image_settings import ImageSampling, ImageTokens
from megatron_mdm.generation.images import picture
from megatron_mdm.generation.interactive import Screen, typed_lines
from megatron_mdm.generation.settings import IdsEngine, SpecialIds
from megatron_mdm.images.terminal import blocks, has_colors
from megatron_mdm.images.tokenizer import ImageTokenizer
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext

_GREY = 96  # of what is still unknown


def draw_typed_captions(
    engine: IdsEngine,
    tokenizer: Tokenizer,
    image_tokenizer: ImageTokenizer,
    config: ImageSampling,
    special: SpecialIds,
    image: ImageTokens,
    room: Room,
    context: ParallelContext,
    lines: Iterable[str],
    output: TextIO,
) -> None:
    """Draw each line that the main rank reads until they end. Collective: the other ranks follow it.

    A terminal with 24-bit colours shows the picture after every step, another one its codes; elsewhere only the last
    codes are written. A caption that cannot be drawn costs itself only.
    """
    image_tokenizer.to(platform.device())
    for turn, text in typed_lines(context, lines, output):
        try:
            caption = Caption.of(text, tokenizer, image.vocabulary, room)
        except (UserError, ValueError) as error:
            output.write(f"error: {error}\n" if context.is_main else "")
            output.flush()
            continue
        form = _Form(image_tokenizer, output) if context.is_main else None
        watch = form.draw if form and output.isatty() else None
        (response,) = denoise_images(engine, [caption.ids], [turn], config, special, watch, image=image)
        if form:
            form.screen.clear()
            output.write("\n".join(form.lines(response.tokens)) + "\n")
            output.write(f"({response.steps} steps)\n" if output.isatty() else "")
            output.flush()


class _Form:
    """The picture below the caption."""

    def __init__(self, tokenizer: ImageTokenizer, output: TextIO) -> None:
        self.tokenizer = tokenizer
        self.screen = Screen(output)
        self.has_colors = has_colors(output)

    def draw(self, codes: Tensor) -> None:
        """codes [1, N]."""
        self.screen.show(self.lines(codes[0].tolist()))

    def lines(self, codes: Sequence[int]) -> list[str]:
        if not self.has_colors:
            return numbers(codes)
        size = shutil.get_terminal_size()
        return blocks(partly_known_picture(self.tokenizer, codes), size.columns, max(1, size.lines - 2))


def partly_known_picture(tokenizer: ImageTokenizer, codes: Sequence[int]) -> Image.Image:
    """The picture of the codes that are known, grey where they are not."""
    pixels = np.array(picture(tokenizer, [max(code, 0) for code in codes]))
    side = math.isqrt(len(codes))
    unknown = (np.array(codes) == UNKNOWN).reshape(side, side)
    pixels[unknown.repeat(tokenizer.down, 0).repeat(tokenizer.down, 1)] = _GREY
    return Image.fromarray(pixels)


def numbers(codes: Sequence[int]) -> list[str]:
    """A line of each row of codes; a point stands for an unknown one."""
    side = math.isqrt(len(codes))
    texts = ["·" if code == UNKNOWN else str(code) for code in codes]
    width = max(map(len, texts))
    return [" ".join(text.rjust(width) for text in texts[start : start + side]) for start in range(0, len(codes), side)]
