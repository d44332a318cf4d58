"""Whose image codes a run is trained on: those of one image tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ImageConfig
from megatron_mdm.data.corpus import CorpusDataset
from megatron_mdm.data.splits import Dataset
from megatron_mdm.images.tokenizer import load_tokenizer

_SHOWN = 12  # digits of a fingerprint


def with_codes_of(image: ImageConfig, sets: Sequence[Dataset]) -> tuple[ImageConfig, list[str]]:
    """The section with the fingerprint of the image tokenizer that the samples' codes are of, and lines to be told.

    Raises UserError where they are of several, or of another than the section says.
    """
    found = sorted({sample.codes_of for part in sets if not isinstance(part, CorpusDataset) for sample in part.samples})
    found = [fingerprint for fingerprint in found if fingerprint]
    if len(found) > 1:
        raise UserError(
            f"'data': image codes of several image tokenizers ({', '.join(each[:_SHOWN] for each in found)}): the same "
            "ids would mean different pictures; encode all pictures with one (mdm prepare images)"
        )
    expected = _expected(image)
    if not found and expected:
        line = "warning: the samples do not say by which image tokenizer their codes were made ('codes_of')"
        return image.model_copy(update={"made_by": expected}), [line]
    if found and expected and found != [expected]:
        named = f"'image.tokenizer' {image.tokenizer}" if image.tokenizer else "'image.made_by'"
        raise UserError(
            f"'data': the image codes were made by another image tokenizer ({found[0][:_SHOWN]}) than {named} "
            f"({expected[:_SHOWN]}); name the one that made them, or encode the pictures again"
        )
    return image.model_copy(update={"made_by": found[0] if found else ""}), []


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
