"""Records of sample files: JSON lines, parquet, `datasets`; and what happens to a bad one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.documents import format_of

Record = dict[str, Any]


class BadRecords:
    """Stops at the first bad record, or counts them and keeps where the first ones are."""

    NUM_SHOWN = 10

    def __init__(self, skip: bool = False) -> None:
        self.skip, self.count, self.first = skip, 0, list[str]()

    def add(self, message: str) -> None:
        if not self.skip:
            raise UserError(message)
        self.count += 1
        if len(self.first) < self.NUM_SHOWN:
            self.first.append(message)


def read_records(path: str, bad: BadRecords | None = None) -> Iterator[tuple[str, Record]]:
    """("file, line n", object) of each record; a blank line is none. Bad ones raise UserError, or are counted."""
    yield from READERS[format_of(path)](path, bad or BadRecords())


def _json_lines(path: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    bad.add(f"{where}: not UTF-8 (byte {line[error.start]:#04x}, {error.start} bytes in)")
                    continue
                except ValueError as error:
                    bad.add(f"{where}: not valid JSON ({error})")
                    continue
                if not isinstance(record, dict):
                    bad.add(f"{where}: expected an object, found {type(record).__name__}")
                    continue
                yield where, record
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _parquet(path: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    from pyarrow import ArrowInvalid, parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a parquet file that can be read ({' '.join(str(error).split())})") from None


def _datasets(name: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    """A set of the `datasets` library, 'name' or 'name:split'; the split is train unless it is named."""
    if not Path(name).exists() and "/" not in name.strip("/"):
        raise UserError(f"{name}: no such data file")
    import datasets

    path, _, split = name.partition(":")
    try:
        for number, record in enumerate(datasets.load_dataset(path, split=split or "train", streaming=True), 1):
            yield f"{name}, row {number}", dict(record)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: neither a file nor a set for `datasets` ({' '.join(str(error).split())})") from None


READERS: dict[str, Callable[[str, BadRecords], Iterator[tuple[str, Record]]]] = {
    "text": _json_lines,  # JSON lines by another name
    "jsonl": _json_lines,
    "parquet": _parquet,
    "datasets": _datasets,
}
