"""The row of a caption and its image, as MMaDA orders it (training/prompting_utils.py); it is written down here only.

Text padding is left out: rotary positions are relative, and MMaDA's inference hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megatron_mdm.config.sections.image import ImageVocabulary
from megatron_mdm.data.sample import Sample


class ImageRow(NamedTuple):
    ids: list[int]
    span: tuple[int, int]  # [first, end) of the image's tokens, the only targets
    is_cut: bool  # whether the caption was too long


def image_row(caption: Sequence[int], codes: Sequence[int], vocabulary: ImageVocabulary) -> ImageRow:
    """Ids of a caption and image codes from 0 on, in raster order → a row. Raises ValueError for other codes."""
    if not codes or not 0 <= min(codes) <= max(codes) < vocabulary.num_codes:
        raise ValueError(f"image codes must be integers from 0 to {vocabulary.num_codes - 1}, at least one")
    before = prefix(caption, vocabulary)
    ids = [*before, *(vocabulary.first_id + code for code in codes), *suffix(vocabulary)]
    return ImageRow(ids, (len(before), len(before) + len(codes)), is_too_long(caption, vocabulary))


def prefix(caption: Sequence[int], vocabulary: ImageVocabulary) -> list[int]:
    """What stands before the image. A caption is cut so that eos stays."""
    kept = caption[: _most_tokens(vocabulary)]
    return [vocabulary.task, vocabulary.bos, *kept, vocabulary.eos, vocabulary.image_begin]


def null_prefix(vocabulary: ImageVocabulary) -> list[int]:
    """That of no caption: of caption dropout, and what guidance leads away from."""
    return prefix((), vocabulary)


def suffix(vocabulary: ImageVocabulary) -> list[int]:
    """What stands behind the image, always visible."""
    return [vocabulary.image_end]


def holds_image(sample: Sample, vocabulary: ImageVocabulary) -> bool:
    """Whether a sample is such a row: from its first token to the one before the targets."""
    first = first_target(sample)
    tokens = sample.tokens
    return first > 1 and tokens[0] == vocabulary.task and tokens[first - 1] == vocabulary.image_begin


def without_caption(sample: Sample, vocabulary: ImageVocabulary) -> Sample:
    """A row whose prefix is that of no caption."""
    first = first_target(sample)
    null = null_prefix(vocabulary)
    return sample._replace(
        tokens=np.concatenate([np.array(null, dtype=np.int32), sample.tokens[first:]]),
        eligible=np.concatenate([np.zeros(len(null), dtype=np.bool_), sample.eligible[first:]]),
    )


def first_target(sample: Sample) -> int:
    """The place of the first target token; of an image row, of the image."""
    return int(np.argmax(sample.eligible))


def is_too_long(caption: Sequence[int], vocabulary: ImageVocabulary) -> bool:
    return len(caption) > _most_tokens(vocabulary)


def _most_tokens(vocabulary: ImageVocabulary) -> int:
    return vocabulary.caption_tokens - 2  # bos and eos
