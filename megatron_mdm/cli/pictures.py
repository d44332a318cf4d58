"""Pictures of any source as the squares that an image tokenizer is shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.data.captioned import Captioned, CaptionedSource, num_without_caption
from megatron_mdm.data.records import BadRecords
from megatron_mdm.images.pixels import cropped, is_enlarged, read_image

_AHEAD = 8  # pictures in work for each thread


class Square(NamedTuple):
    place: int  # of the picture among all that the sources name, from 0
    source: Captioned
    pixels: NDArray[np.uint8]  # [R, R, 3]
    is_enlarged: bool  # the picture was smaller


@dataclass(frozen=True)
class Faults:
    """What happens to bad records, and to pictures that cannot be read, which are told apart for resuming."""

    records: BadRecords
    pictures: BadRecords

    @classmethod
    def of(cls, on_error: str) -> Faults:
        return cls(BadRecords(on_error), BadRecords(on_error))

    @property
    def first(self) -> list[str]:
        return [*self.records.first, *self.pictures.first][: BadRecords.NUM_SHOWN]

    @property
    def count(self) -> int:
        return self.records.count + self.pictures.count


def squares(
    sources: Sequence[CaptionedSource], resolution: int, faults: Faults, *, skip: int = 0, threads: int = 1
) -> Iterator[Square]:
    """Every picture but the first `skip`, cropped, in the sources' order. Bad ones raise UserError or are counted."""
    found = enumerate(chain.from_iterable(source.read(faults.records) for source in sources))
    with closing(_decoded(islice(found, skip, None), resolution, threads)) as decoded:
        for place, source, work in decoded:
            with faults.pictures.of(source.where):
                yield Square(place, source, *work.result())


Decoded = tuple[NDArray[np.uint8], bool]  # the square, whether the picture was smaller
InWork = tuple[int, Captioned, Future[Decoded]]


def _decoded(found: Iterator[tuple[int, Captioned]], resolution: int, threads: int) -> Generator[InWork, None, None]:
    """In order; some more are worked on meanwhile."""

    def work(picture: Captioned) -> Decoded:
        image = read_image(picture.image)
        return cropped(image, resolution), is_enlarged(image, resolution)

    with ThreadPoolExecutor(threads) as pool:
        waiting = deque[InWork]()
        for place, picture in found:
            waiting.append((place, picture, pool.submit(work, picture)))
            if len(waiting) > threads * _AHEAD:
                yield waiting.popleft()
        yield from waiting


def notes(num_pictures: int, num_enlarged: int, resolution: int, sources: Sequence[CaptionedSource]) -> list[str]:
    """What a user may not expect of the pictures, a line each."""
    lines = []
    if num_enlarged:
        lines.append(f"{num_enlarged:,} of {num_pictures:,} pictures are smaller than {resolution} pixels: enlarged")
    for source in sources:
        if source.needs_captions and (number := num_without_caption(source.path)):
            lines.append(f"{source.path}: {number:,} pictures have no caption: left out")
    return [f"warning: {line}" for line in lines]
