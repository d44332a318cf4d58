"""What preparing public data sets has in common: fields, splits, and how many files each takes."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.records import Record
from megatron_mdm.diffusion.randomness import Purpose, stream

Sets = dict[str, list[Record]]  # by name: train, validation, test; each is written as NAME.jsonl


def field(record: Record, names: Sequence[str], where: str) -> str:
    """The string in the first of these fields that holds one. Raises UserError where none does."""
    for name in names:
        if isinstance(record.get(name), str):
            return record[name]
    raise UserError(f"{where}: expected a string in the field '{names[0]}'")


def nine_to_one(rows: list[Record], seed: int) -> Sets:
    """Training and validation, 9 : 1, drawn by the seed, each in the rows' order."""
    order = stream(seed, Purpose.SPLIT).permutation(len(rows))
    held_out = sorted(order[: max(1, len(rows) // 10)].tolist())
    kept = sorted(order[max(1, len(rows) // 10) :].tolist())
    return {"train": [rows[row] for row in kept], "validation": [rows[row] for row in held_out]}


def check_number(paths: Sequence[str], counts: Sequence[int], task: str, files: str) -> None:
    """Raises UserError, which says what `files` the task takes, unless their number is one of counts."""
    if len(paths) not in counts:
        raise UserError(f"{task}: give {files}; found {len(paths)}")
