"""Documents for a pretraining corpus, in chunks, from any position: text, JSON lines, parquet, `datasets`.

What a chunk holds is raw; decoding happens where there are several processes (encode.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_mdm.config.errors import UserError

CHUNK_BYTES = 1 << 20
SEPARATORS = {"line": b"\n", "paragraph": b"\n\n", "file": b""}  # between the documents of a text file


class Position(NamedTuple):
    """Where reading goes on: bytes of a text file, rows of a table."""

    file: int = 0
    offset: int = 0
    number: int = 1  # of the next line or row, for messages


START = Position()


class Chunk(NamedTuple):
    records: list[bytes] | list[str]
    path: str
    number: int  # of the first record's first line, or row
    unit: str  # "line" or "row"
    parse: str  # a key of encode.PARSERS
    lines_between: int  # newlines that a separator holds
    size: int  # bytes or rows, for the progress bar
    following: Position


@dataclass(frozen=True)
class Source:
    """Files or the name of a data set, and how documents lie in them."""

    paths: Sequence[str]
    format: str  # a key of FORMATS
    field: str = "text"  # of JSON lines and tables
    separator: str = "paragraph"  # of text files, a key of SEPARATORS
    split: str = "train"  # of a `datasets` name

    def chunks(self, start: Position) -> Iterator[Chunk]:
        return FORMATS[self.format](self, start)

    def total(self) -> int | None:
        """Bytes of all files; None where it is not known."""
        if self.format == "datasets":
            return None
        return sum(_size(path) for path in self.paths)


def format_of(path: str) -> str:
    """The format that a file's name tells; a name that is no file is a `datasets` name."""
    suffixes = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
    if not Path(path).exists() and "." not in Path(path).name:
        return "datasets"
    return suffixes.get(Path(path).suffix, "text")


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _text(source: Source, start: Position) -> Iterator[Chunk]:
    yield from _separated(source, start, SEPARATORS[source.separator], "text")


def _json_lines(source: Source, start: Position) -> Iterator[Chunk]:
    yield from _separated(source, start, b"\n", "json")


def _separated(source: Source, start: Position, separator: bytes, parse: str) -> Iterator[Chunk]:
    """Blocks of about CHUNK_BYTES that end at a separator; without one, whole files. Where a block ends depends on
    where it begins only, so that an interrupted preparation cuts the same shards."""
    lines_between = separator.count(b"\n")
    for index in range(start.file, len(source.paths)):
        path, size = source.paths[index], _size(source.paths[index])
        _, offset, number = start if index == start.file else Position(index)
        with open(path, "rb") as file:
            while offset < size:
                file.seek(offset)
                block = _block(file, separator)
                offset += len(block)
                records = block.removesuffix(separator).split(separator) if separator else [block]
                following = Position(index, offset, number + block.count(b"\n"))
                yield Chunk(records, path, number, "line", parse, lines_between, len(block), following)
                number = following.number


def _block(file: BinaryIO, separator: bytes) -> bytes:
    """From here to the last separator in CHUNK_BYTES, or to the first behind it, or to the file's end."""
    if not separator:
        return file.read()
    block = b""
    while more := file.read(CHUNK_BYTES):
        block += more
        end = block.rfind(separator)
        if end >= 0 and len(more) == CHUNK_BYTES:
            return block[: end + len(separator)]
    return block


def _parquet(source: Source, start: Position) -> Iterator[Chunk]:
    from pyarrow import ArrowInvalid, parquet

    for index in range(start.file, len(source.paths)):
        path, done = source.paths[index], start.offset if index == start.file else 0
        size = _size(path)
        try:
            file = parquet.ParquetFile(path)
            if source.field not in file.schema_arrow.names:
                raise UserError(f"{path}: no column '{source.field}' (found {', '.join(file.schema_arrow.names)})")
            total, row = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(1024, columns=[source.field]):
                row += len(batch)
                if row > done:  # rows are read in the same batches again, so a position is the end of one
                    share = size * len(batch) // total
                    records = batch.column(0).to_pylist()
                    following = Position(index, row, row + 1)
                    yield Chunk(records, path, row - len(batch) + 1, "row", "value", 0, share, following)
        except ArrowInvalid as error:
            raise UserError(f"{path}: not a parquet file ({' '.join(str(error).split())})") from None


def _datasets(source: Source, start: Position) -> Iterator[Chunk]:
    """Streamed, so nothing is stored on this machine."""
    import datasets

    for index in range(start.file, len(source.paths)):
        name, row = source.paths[index], start.offset if index == start.file else 0
        try:
            rows = datasets.load_dataset(name, split=source.split, streaming=True).skip(row)
            for batch in rows.iter(1024):
                records = _column(batch, source.field, name)
                row += len(records)
                following = Position(index, row, row + 1)
                yield Chunk(records, name, row - len(records) + 1, "row", "value", 0, len(records), following)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{name}: cannot be read with `datasets` ({' '.join(str(error).split())})") from None


def _column(batch: dict[str, Any], field: str, name: str) -> list[str]:
    if field not in batch:
        raise UserError(f"{name}: no column '{field}' (found {', '.join(batch)})")
    return batch[field]


FORMATS: dict[str, Callable[[Source, Position], Iterator[Chunk]]] = {
    "text": _text,
    "jsonl": _json_lines,
    "parquet": _parquet,
    "datasets": _datasets,
}
