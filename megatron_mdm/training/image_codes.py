"""What rows of images say of themselves: whose codes they are, those of one image tokenizer, and how many."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ImageConfig
from megatron_mdm.data.corpus import CorpusDataset
from megatron_mdm.data.image_text import holds_image
from megatron_mdm.data.splits import Dataset
from megatron_mdm.images.tokenizer import load_tokenizer

_SHOWN = 12  # digits of a fingerprint


def as_the_rows_say(image: ImageConfig, sets: Sequence[Dataset]) -> tuple[ImageConfig, list[str]]:
    """The section with what the samples show: which image tokenizer made their codes, and how many an image has, where
    all have as many. And lines to be told.

    Raises UserError where codes are of several image tokenizers or, as the images' size, other than the section says.
    """
    samples = [sample for part in sets if not isinstance(part, CorpusDataset) for sample in part.samples]
    made_by, told = _made_by(image, {sample.codes_of for sample in samples if sample.codes_of})
    sizes = {int(sample.eligible.sum()) for sample in samples if holds_image(sample, image.vocabulary)}
    if image.num_tokens and sizes - {image.num_tokens}:
        raise UserError(
            f"'data': there are images of {', '.join(map(str, sorted(sizes)))} codes, but 'image.num_tokens' is "
            f"{image.num_tokens}; set it to 0 for images of several sizes"
        )
    size = sizes.pop() if len(sizes) == 1 else 0
    is_square = math.isqrt(size) ** 2 == size
    num_tokens = size if size and is_square else image.num_tokens
    return image.model_copy(update={"made_by": made_by, "num_tokens": num_tokens}), told


def _made_by(image: ImageConfig, found: set[str]) -> tuple[str, list[str]]:
    """The fingerprint of the image tokenizer, where anything says which one; lines to be told."""
    if len(found) > 1:
        raise UserError(
            f"'data': image codes of several image tokenizers ({', '.join(each[:_SHOWN] for each in sorted(found))}): "
            "the same ids would mean different pictures; encode all pictures with one (mdm prepare images)"
        )
    expected = _expected(image)
    if not found:
        line = "warning: the samples do not say by which image tokenizer their codes were made ('codes_of')"
        return expected, [line] if expected else []
    (only,) = found
    if expected and only != expected:
        named = f"'image.tokenizer' {image.tokenizer}" if image.tokenizer else "'image.made_by'"
        raise UserError(
            f"'data': the image codes were made by another image tokenizer ({only[:_SHOWN]}) than {named} "
            f"({expected[:_SHOWN]}); name the one that made them, or encode the pictures again"
        )
    return only, []


def _expected(image: ImageConfig) -> str:
    """The fingerprint that the section asks for; empty: none."""
    if not image.tokenizer:
        return image.made_by
    fingerprint = load_tokenizer(image.tokenizer).fingerprint()
    if image.made_by and image.made_by != fingerprint:
        raise UserError(
            f"'image.tokenizer' {image.tokenizer} ({fingerprint[:_SHOWN]}) is not the image tokenizer of "
            f"'image.made_by' ({image.made_by[:_SHOWN]})"
        )
    return fingerprint
