"""The special tokens of a checkpoint that becomes a masked-diffusion model: which ids, and whether the table grows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_mdm.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_mdm.config.errors import UserError
from megatron_mdm.models.families.family import Json

TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class SpecialTokens:
    mask_id: int
    pad_id: int
    eos_id: int
    vocab_size: int  # rows of the table, which may have grown
    note: str  # one line: where the mask token comes from


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer file knows."""

    path: Path
    ids: dict[str, int]

    @property
    def num_ids(self) -> int:
        return max(self.ids.values(), default=-1) + 1

    @classmethod
    def of(cls, folder: Path) -> Vocabulary | None:
        """Of the tokenizer file in a folder; None where there is none that we read."""
        path = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
        if path is None:
            return None
        try:
            return cls(path, _huggingface_ids(path) if path.suffix == ".json" else _sentencepiece_ids(path))
        except Exception as error:  # both libraries raise bare exceptions of their own
            raise UserError(f"{path}: not a tokenizer file ({' '.join(str(error).split())})") from None


def special_tokens(checkpoint: HuggingFaceCheckpoint, generation: Json, asked: dict[str, str]) -> SpecialTokens:
    """Ids by what was asked for (a text or an id, by 'mask', 'pad', 'eos'), else by config.json or
    generation_config.json. A model without a mask token gets one: a row of the table that the tokenizer does not use,
    or a new row.

    Raises UserError where the tokenizer has more ids than the table rows, or an id is missing or out of range.
    """
    rows, vocabulary = checkpoint.model.vocab_size, Vocabulary.of(checkpoint.folder)
    assert isinstance(rows, int)
    if vocabulary and vocabulary.num_ids > rows:
        raise UserError(
            f"{vocabulary.path}: has ids up to {vocabulary.num_ids - 1}, but the embedding table has {rows} rows; "
            "it is the tokenizer of another model"
        )
    known: Json = {**generation, **{name: value for name, value in checkpoint.config.items() if value is not None}}
    eos = _chosen("eos", known, vocabulary, asked)
    pad = _chosen("pad", known, vocabulary, asked)
    mask = _chosen("mask", known, vocabulary, asked)
    if mask is None and 0 <= checkpoint.family.mask_id < rows:
        mask = checkpoint.family.mask_id
    if eos is None:
        raise UserError(f"{checkpoint.folder}: config.json has no 'eos_token_id'; give it with --eos-token")
    for name, token in (("eos", eos), ("pad", pad)):
        if token is not None and not 0 <= token < rows:
            raise UserError(f"{checkpoint.folder}: {name} token {token} is outside the table of {rows} rows")
    mask_id, rows, note = _mask_row(mask, rows, vocabulary)
    return SpecialTokens(mask_id, eos if pad is None else pad, eos, rows, note)


def _mask_row(mask: int | None, rows: int, vocabulary: Vocabulary | None) -> tuple[int, int, str]:
    """(id, rows of the table, what was done)"""
    if mask is None:
        mask = vocabulary.num_ids if vocabulary else rows
    if mask > rows:
        raise UserError(f"mask token {mask} is beyond the table of {rows} rows; the next free id is {rows}")
    if mask == rows:
        return mask, rows + 1, f"mask token {mask}: no row was free, so the table grew from {rows} to {rows + 1} rows"
    if vocabulary and mask >= vocabulary.num_ids:
        return mask, rows, f"mask token {mask}: a spare row of the table, which the tokenizer does not use"
    return mask, rows, f"mask token {mask}: the checkpoint's own"


def _chosen(name: str, known: Json, vocabulary: Vocabulary | None, asked: dict[str, str]) -> int | None:
    """An id that was asked for or is known; None where neither."""
    text = asked.get(name, "")
    if text.isdecimal():
        return int(text)
    if text:
        if vocabulary is None or text not in vocabulary.ids:
            raise UserError(f"--{name}-token '{text}': the tokenizer has no such token; give an id")
        return vocabulary.ids[text]
    value = known.get(f"{name}_token_id")
    return value[0] if isinstance(value, list) else value  # the first ends a text, others a turn


def _huggingface_ids(path: Path) -> dict[str, int]:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)


def _sentencepiece_ids(path: Path) -> dict[str, int]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return {processor.id_to_piece(token): token for token in range(processor.vocab_size())}
