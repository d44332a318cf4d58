"""Records of sample files: JSON, parquet, `datasets`; and what happens to a bad one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.documents import format_of, python_values
from megatron_mdm.data.json_files import Record, read_json
from megatron_mdm.data.text_files import open_text

Many = TypeVar("Many")
ON_ERROR = ("stop", "skip")  # what to do with a bad record
_REASON_LENGTH = 400  # characters; other libraries' messages may hold a whole record


class BadRecords:
    """Stops at the first bad record, or counts them and keeps where the first ones are."""

    NUM_SHOWN = 10

    def __init__(self, on_error: str = "stop") -> None:
        """on_error: one of ON_ERROR."""
        self.skip = on_error == "skip"
        self.count = 0
        self.first = list[str]()

    def add(self, message: str) -> None:
        if not self.skip:
            raise UserError(message)
        self.count += 1
        if len(self.first) < self.NUM_SHOWN:
            self.first.append(message)

    def summary(self) -> str:
        """The bad records' number and the first of them, for a message that no record is left."""
        return f" ({self.count:,} bad, the first: {self.first[0]})" if self.first else ""

    @contextmanager
    def of(self, where: str) -> Iterator[None]:
        """A context in which every error is the fault of the record at this place."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            message = reason(error)
            self.add(message if message.startswith(where) else f"{where}: {message}")


def all_or_none(action: Callable[[], Many]) -> Many | None:
    """The result of an action on many records at once; None where one of them is bad, so that each has to be tried
    alone."""
    try:
        return action()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of the tokenizers library is no Exception
        return None


def bad_lines(count: int, first: Sequence[str]) -> list[str]:
    """What was left out, for a log: how many, and where the first ones are."""
    return [f"{count:,} bad records left out, such as:", *(f"  {message}" for message in first)] if count else []


def reason(error: BaseException) -> str:
    """What an error says, in one line that can be printed."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, RecursionError):
        return "nested too deeply"
    kind = "" if type(error) is ValueError and text else f"{type(error).__name__}: "
    return f"{kind}{text[:_REASON_LENGTH]}".encode("utf-8", "backslashreplace").decode().removesuffix(": ")


def read_records(path: str, bad: BadRecords | None = None) -> Iterator[tuple[str, Record]]:
    """("file, line n", object) of each record; a blank line is none. Bad ones raise UserError, or are counted."""
    yield from READERS[format_of(path)](path, bad or BadRecords())


def _json(path: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    with open_text(path) as file:
        yield from read_json(path, file, bad.add)


def read_parquet(path: str, bad: BadRecords, rows: int = 1024) -> Iterator[tuple[str, Record]]:
    """Records of a parquet file, of which so many are in memory at a time."""
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(rows):
            for record in python_values(batch):
                number += 1
                if isinstance(record, Exception):
                    bad.add(f"{path}, row {number}: {reason(record)}")
                else:
                    yield f"{path}, row {number}", record
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except (ArrowException, OSError, UnicodeDecodeError) as error:  # the last of a column's name
        raise UserError(f"{path}: not a parquet file that can be read ({' '.join(str(error).split())})") from None


def _datasets(name: str, bad: BadRecords) -> Iterator[tuple[str, Record]]:
    """A set of the `datasets` library, 'name' or 'name:split'; the split is train unless it is named."""
    path, _, split = name.partition(":")
    if not Path(path).exists() and "/" not in name.strip("/"):
        raise UserError(f"{name}: no such data file")
    import datasets

    try:
        for number, record in enumerate(datasets.load_dataset(path, split=split or "train", streaming=True), 1):
            yield f"{name}, row {number}", dict(record)
    except Exception as error:  # of any type: it reads files of many kinds, over the network
        raise UserError(f"{name}: neither a file nor a set for `datasets` ({reason(error)})") from None


READERS: dict[str, Callable[[str, BadRecords], Iterator[tuple[str, Record]]]] = {
    "text": _json,  # by another name
    "jsonl": _json,
    "parquet": read_parquet,
    "datasets": _datasets,
}
