"""The special tokens of a checkpoint that becomes a run: which ids, and whether the table grows by a mask token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mdm.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_mdm.checkpoint.special_tokens import (
    folder_tokenizer,
    mask_by_name,
    mask_of_family,
    other_masks,
    stated_by_folder,
)
from megatron_mdm.config.errors import UserError
from megatron_mdm.data.tokenizer_files import Backend


@dataclass(frozen=True)
class SpecialTokens:
    mask_id: int
    pad_id: int
    eos_id: int
    end_ids: tuple[int, ...]  # that end a response, too
    vocab_size: int  # rows of the table, which may have grown
    tokenizer: Path | None  # the file that is read; None: the run takes token ids only
    notes: tuple[str, ...]  # a line each: where the mask token comes from, and where files disagree


def special_tokens(checkpoint: HuggingFaceCheckpoint, asked: Mapping[str, str]) -> SpecialTokens:
    """Ids by what was asked for (a text or an id, by 'mask', 'pad', 'eos'; empty: nothing), else by the folder's files.
    A model without a mask token gets one: a row of the table that the tokenizer does not use, or a new row.

    Raises UserError where the tokenizer has more ids than the table rows, files name two mask tokens, or an id is
    missing, malformed or out of range.
    """
    folder = checkpoint.folder
    rows = checkpoint.model.vocab_size
    assert isinstance(rows, int)
    backend, file, fault = folder_tokenizer(folder)
    if backend.num_ids > rows:
        raise UserError(
            f"{file}: has ids up to {backend.num_ids - 1}, but the embedding table has {rows} rows; it is the "
            "tokenizer of another model"
        )
    wanted = {name: _asked(name, text, backend) for name, text in asked.items() if text}
    stated = stated_by_folder(folder, checkpoint.config, backend, lenient=tuple(wanted))
    if not stated.by["mask"]:
        fallback = mask_of_family(checkpoint.family, rows)
        if not fallback and "mask" not in wanted:
            fallback = mask_by_name(backend, file, rows, "--mask-token")
        stated = replace(stated, by={**stated.by, "mask": fallback})
    notes = [*([fault] if fault else []), *stated.notes]
    chosen: dict[str, tuple[int, ...]] = {}
    for name in stated.by:
        if name in wanted:
            chosen[name] = (wanted[name],)
            other = stated.contradicts(name, wanted[name])
            notes += [f"{name} token {wanted[name]}, as was asked for, though it is {other}"] if other else []
            continue
        chosen[name], told = stated.choice(name, f"--{name}-token")
        notes += told
    if not chosen["eos"]:
        raise UserError(f"{folder}: no file names the end token ('eos_token_id'); give it with --eos-token")
    eos, *ends = chosen["eos"]
    pad = (*chosen["pad"], eos)[0]
    for name, token in (("eos", eos), ("pad", pad)):
        if token >= rows:
            raise UserError(f"{folder}: {name} token {token} is outside the table of {rows} rows (--{name}-token)")
    notes += [f"eos token {token} is outside the table of {rows} rows and left out" for token in ends if token >= rows]
    stated_mask = chosen["mask"][0] if chosen["mask"] else None
    origin = ""
    if "mask" in wanted:
        origin = "as was asked for"
    elif stated_mask is not None:
        origin = f"by {stated.by['mask'][0].where}"
    mask, rows, note = _mask_row(stated_mask, rows, backend, origin)
    notes += other_masks(mask, backend, file)
    if mask in (eos, pad):
        raise UserError(f"{folder}: {mask} is both the mask token and the {'eos' if mask == eos else 'pad'} token")
    end_ids = tuple(token for token in ends if token < rows and token != mask)
    return SpecialTokens(mask, pad, eos, end_ids, rows, file, (note, *notes))


def _asked(name: str, text: str, backend: Backend) -> int:
    if text.isdecimal():
        return int(text)
    token_id = backend.token_id(text)
    if token_id is None:
        raise UserError(f"--{name}-token '{text}': the tokenizer has no such token; give an id")
    return token_id


def _mask_row(mask: int | None, rows: int, backend: Backend, origin: str) -> tuple[int, int, str]:
    """(id, rows of the table, what was done)"""
    if mask is None:
        mask = backend.num_ids or rows
    if mask > rows:
        raise UserError(f"mask token {mask} is beyond the table of {rows} rows; the next free id is {rows}")
    if mask == rows:
        return mask, rows + 1, f"mask token {mask}: no row was free, so the table grew from {rows} to {rows + 1} rows"
    if backend.num_ids and mask >= backend.num_ids:
        spare = "a spare row of the table, which the tokenizer does not use"
        return mask, rows, f"mask token {mask}: {', '.join(filter(None, [origin, spare]))}"
    return mask, rows, f"mask token {mask}: {origin}"
