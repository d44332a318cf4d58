"""Documents for a pretraining corpus, in chunks, from any position: text, JSON lines, parquet, `datasets`.

What a chunk holds is raw; decoding happens where there are several processes (encode.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.json_files import has_an_object_a_line, read_json
from megatron_mdm.data.text_files import open_text

CHUNK_BYTES = 1 << 20
_ROWS = 1024  # of a table, or of JSON that is not read line by line, in a chunk
# White space but for \r and \n, as str.isspace() has it, in UTF-8.
_SPACE = (
    rb"(?:[\t\x0b\x0c\x1c-\x1f ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
)
_BLANK_LINES = rb"(?:%s*(?:\r\n|\n|\r))+" % _SPACE
# Between the documents of a text file. A separator begins at the last byte of a line's end; the first that a match may
# have is one of two, which makes the search fast.
SEPARATORS: dict[str, re.Pattern[bytes] | None] = {
    "line": re.compile(rb"\n|\r(?!\n)"),
    "paragraph": re.compile(rb"(?:\n|\r(?!\n))" + _BLANK_LINES),
    "file": None,
}
_LEADING = re.compile(_BLANK_LINES)
_JSON_LINE = re.compile(rb"\n")


class Position(NamedTuple):
    """Where reading continues: bytes of a text file, rows of a table."""

    file: int = 0
    offset: int = 0
    number: int = 1  # of the next line or row, for messages


START = Position()


class Chunk(NamedTuple):
    records: Sequence[Any]
    path: str
    places: Sequence[str]  # of the records in the file: "line 3", "row 12"
    bad: Sequence[str]  # what could not be read, with its place
    parse: str  # a key of encode.PARSERS
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

    @property
    def divides_texts(self) -> bool:
        return self.format == "text" and SEPARATORS[self.separator] is not None

    def total(self) -> int | None:
        """Bytes of all files; None where it is not known."""
        if self.format == "datasets" or any(path.endswith(".gz") for path in self.paths):
            return None
        return sum(_size(path) for path in self.paths)


def format_of(path: str) -> str:
    """The format that a file's name tells; a folder, and a name that is no file, are for `datasets`."""
    suffixes = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
    if Path(path.partition(":")[0]).is_dir() or (not Path(path).exists() and "." not in Path(path).name):
        return "datasets"
    return suffixes.get(Path(path.removesuffix(".gz")).suffix, "text")


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _text(source: Source, start: Position) -> Iterator[Chunk]:
    for index, path, first in _files(source, start):
        with open_text(path) as file:
            yield from _separated(file, path, index, first, SEPARATORS[source.separator], "text")


def _json(source: Source, start: Position) -> Iterator[Chunk]:
    for index, path, first in _files(source, start):
        with open_text(path) as file:
            if has_an_object_a_line(file):
                yield from _separated(file, path, index, first, _JSON_LINE, "json")
            else:
                yield from _objects(file, path, index, first.offset)


def _files(source: Source, start: Position) -> Iterator[tuple[int, str, Position]]:
    """(number, path, position) of the files that are left to be read."""
    for index in range(start.file, len(source.paths)):
        yield index, source.paths[index], start if index == start.file else Position(index)


def _separated(
    file: IO[bytes], path: str, index: int, start: Position, separator: re.Pattern[bytes] | None, parse: str
) -> Iterator[Chunk]:
    """Blocks of about CHUNK_BYTES that end at a separator; without one, the whole file. Where a block ends depends on
    where it begins only, so that an interrupted preparation cuts the same shards."""
    _, offset, number = start
    offset = file.seek(offset) if offset else file.tell()  # behind a byte order mark
    block, rest = _block(b"", file, separator)
    while block:
        offset += len(block)
        records = []
        places = []
        begin = 0
        if separator and (leading := _LEADING.match(block)):  # of the file, or of a gap that the last block's end cut
            begin = leading.end()
            number = number + _num_lines(block, 0, leading.end())
        ends = [match.span() for match in separator.finditer(block, begin)] if separator else []
        for end, following in [*ends, (len(block), len(block))]:
            records.append(block[begin:end].removesuffix(b"\r") if separator else block)
            places.append(f"line {number}")
            number += _num_lines(block, begin, following)
            begin = following
        yield Chunk(records, path, places, (), parse, len(block), Position(index, offset, number))
        block, rest = _block(rest, file, separator)


def _block(content: bytes, file: IO[bytes], separator: re.Pattern[bytes] | None) -> tuple[bytes, bytes]:
    """(what goes to the last separator in CHUNK_BYTES, or in twice as many …, or to the file's end; what follows).
    content: of the block, as far as it has been read."""
    size = CHUNK_BYTES
    while separator:
        content += file.read(max(0, size - len(content)))
        if len(content) < size:
            return content, b""
        if end := _last_end(separator, content, size):
            return content[:end], content[end:]
        size *= 2
    return content + file.read(), b""


def _last_end(separator: re.Pattern[bytes], content: bytes, size: int) -> int:
    """The place where the last separator in the first `size` bytes ends; 0 without one. Searched from the back."""
    tail = 1 << 12
    while True:
        begin = max(0, size - tail)
        # One that touches the end may continue behind it.
        ends = [match.end() for match in separator.finditer(content, begin, size) if match.end() < size]
        if ends or not begin:
            return max(ends, default=0)
        tail *= 4


def _num_lines(content: bytes, begin: int, end: int) -> int:
    lone = content.count(b"\r", begin, end)
    return content.count(b"\n", begin, end) + (lone and lone - content.count(b"\r\n", begin, end))


def _objects(file: IO[bytes], path: str, index: int, done: int) -> Iterator[Chunk]:
    """JSON that is not one object a line, from an object on."""
    bad = list[str]()
    objects = read_json(path, file, bad.append)
    for _ in islice(objects, done):
        bad.clear()
    while (batch := list(islice(objects, _ROWS))) or bad:
        done += len(batch)
        places = [where.removeprefix(f"{path}, ") for where, _ in batch]
        records = [record for _, record in batch]
        yield Chunk(records, path, places, tuple(bad), "object", 0, Position(index, done, 1))
        bad.clear()


def _parquet(source: Source, start: Position) -> Iterator[Chunk]:
    from pyarrow import ArrowException, parquet

    for index, path, (_, done, _) in _files(source, start):
        size = _size(path)
        try:
            file = parquet.ParquetFile(path)
            if source.field not in file.schema_arrow.names:
                raise UserError(f"{path}: no column '{source.field}' (found {', '.join(file.schema_arrow.names)})")
            total = max(1, file.metadata.num_rows)
            row = 0
            for batch in file.iter_batches(_ROWS, columns=[source.field]):
                row += len(batch)
                if row > done:  # rows are read in the same batches again, so a position is the end of one
                    share = size * len(batch) // total
                    yield _rows(python_values(batch.column(0)), path, index, row, share)
        except (ArrowException, OSError) as error:
            raise UserError(f"{path}: not a parquet file that can be read ({' '.join(str(error).split())})") from None


def _datasets(source: Source, start: Position) -> Iterator[Chunk]:
    """Streamed, so nothing is stored on this machine."""
    import datasets

    for index, name, (_, row, _) in _files(source, start):
        try:
            rows = datasets.load_dataset(name, split=source.split, streaming=True).skip(row)
            for batch in rows.iter(_ROWS):
                if source.field not in batch:
                    raise UserError(f"{name}: no column '{source.field}' (found {', '.join(batch)})")
                row += len(batch[source.field])
                yield _rows(batch[source.field], name, index, row, len(batch[source.field]))
        except UserError:
            raise
        except Exception as error:  # of any type: it reads files of many kinds, over the network
            raise UserError(f"{name}: cannot be read with `datasets` ({' '.join(str(error).split())})") from None


def _rows(values: Sequence[Any], path: str, index: int, end: int, size: int) -> Chunk:
    """Rows of a table, the last being number `end`."""
    places = [f"row {number}" for number in range(end - len(values) + 1, end + 1)]
    return Chunk(values, path, places, (), "value", size, Position(index, end, end + 1))


def python_values(rows: Any) -> list[Any]:
    """The values of a pyarrow array or batch; the exception in place of one that Python cannot hold (text that is not
    UTF-8, a time that is no date)."""
    try:
        return rows.to_pylist()
    except Exception:
        return [_value_or_error(rows.slice(row, 1)) for row in range(len(rows))]


def _value_or_error(rows: Any) -> Any:
    try:
        return rows.to_pylist()[0]
    except Exception as error:
        return error


FORMATS: dict[str, Callable[[Source, Position], Iterator[Chunk]]] = {
    "text": _text,
    "jsonl": _json,
    "parquet": _parquet,
    "datasets": _datasets,
}
