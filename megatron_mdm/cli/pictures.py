"""Pictures of any source as the squares that an image tokenizer is shown."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.captioned import Captioned, CaptionedSource, num_without_caption
from megatron_mdm.data.records import BadRecords, bad_lines
from megatron_mdm.images.pixels import cropped, is_enlarged, read_image
from megatron_mdm.parallel.progress import progress_bar

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


class Pictures(NamedTuple):
    pixels: NDArray[np.uint8]  # [N, R, R, 3]
    captions: list[str]
    fields: list[dict[str, Any]]  # of their records


def read_pictures(
    paths: Sequence[str], resolution: int, on_error: str, *, caption_field: str = "", needs_captions: bool = True
) -> Pictures:
    """All pictures of some sources, in memory; what was left out or enlarged is said on the standard error.

    Raises UserError where there are none.
    """
    faults = Faults.of(on_error)
    sources = [CaptionedSource(path, caption_field, needs_captions) for path in paths]
    found: list[Square] = list(progress_bar(squares(sources, resolution, faults), desc="read", unit="picture"))
    if not found:
        raise UserError(f"{', '.join(paths)}: no pictures ({faults.count} were bad{_first(faults)})")
    num_enlarged = sum(square.is_enlarged for square in found)
    for line in (*bad_lines(faults.count, faults.first), *notes(len(found), num_enlarged, resolution, sources)):
        print(line, file=sys.stderr)
    return Pictures(
        np.stack([square.pixels for square in found]),
        [square.source.caption for square in found],
        [square.source.fields for square in found],
    )


def digits_of(pictures: Pictures) -> NDArray[np.int64]:
    """The field `digit` of each picture's record, [N]. Raises UserError where one has none."""
    found = [fields.get("digit") for fields in pictures.fields]
    if not all(type(digit) is int for digit in found):
        raise UserError("every picture's record needs its 'digit', a number, as `mdm prepare digits` writes it")
    return np.array(found, dtype=np.int64)


def _first(faults: Faults) -> str:
    return f", the first: {faults.first[0]}" if faults.first else ""


def notes(num_pictures: int, num_enlarged: int, resolution: int, sources: Sequence[CaptionedSource]) -> list[str]:
    """What a user may not expect of the pictures, a line each."""
    lines = []
    if num_enlarged:
        lines.append(f"{num_enlarged:,} of {num_pictures:,} pictures are smaller than {resolution} pixels: enlarged")
    for source in sources:
        if source.needs_captions and (number := num_without_caption(source.path)):
            lines.append(f"{source.path}: {number:,} pictures have no caption: left out")
    return [f"warning: {line}" for line in lines]
