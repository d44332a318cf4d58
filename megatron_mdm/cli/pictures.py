"""Pictures of any source as the squares that an image tokenizer is shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.captioned import Captioned, CaptionedSource
from megatron_mdm.data.records import BadRecords
from megatron_mdm.images.pixels import cropped, is_enlarged, read_image


class Square(NamedTuple):
    source: Captioned
    pixels: NDArray[np.uint8]  # [R, R, 3]
    is_enlarged: bool  # the picture was smaller


def squares(source: CaptionedSource, resolution: int, bad: BadRecords) -> Iterator[Square]:
    """Every picture, cropped; those that cannot be read raise UserError or are counted."""
    for found in source.read(bad):
        with bad.of(found.where):
            image = read_image(found.image)
            yield Square(found, cropped(image, resolution), is_enlarged(image, resolution))


def notes(num_pictures: int, num_enlarged: int, num_without_caption: int, resolution: int) -> list[str]:
    """What a user may not expect of the pictures, a line each."""
    lines: list[Any] = [
        (num_enlarged, f"of {num_pictures:,} pictures are smaller than {resolution} pixels and were enlarged"),
        (num_without_caption, "pictures have no caption and were left out"),
    ]
    return [f"warning: {count:,} {text}" for count, text in lines if count]
