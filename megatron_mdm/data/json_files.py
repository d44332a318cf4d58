"""JSON objects of a file, whatever its layout: an object a line, objects that span lines, or one array of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from megatron_mdm.config.errors import UserError

Record = dict[str, Any]
Fault = Callable[[str], None]  # is told what is wrong and where; raises, or counts

_OPENINGS = (b"{", b"[", b"[{")  # lines that only begin something
_BETWEEN = re.compile(r"[\s,]*")  # of two objects
_BYTE = re.compile("[\udc80-\udcff]")  # that is not UTF-8, as surrogateescape decodes it
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # what half of a surrogate pair may come from
_DECODER = json.JSONDecoder()


def read_json(path: str, file: IO[bytes], fault: Fault) -> Iterator[tuple[str, Record]]:
    """("file, line n", object) of each record, n being the line on which it begins. The file is read line by line
    where each holds an object, else whole."""
    if has_an_object_a_line(file):
        yield from _lines(path, file, fault)
    else:
        yield from _values(path, file.read().decode("utf-8", "surrogateescape"), fault)


def has_an_object_a_line(file: IO[bytes]) -> bool:
    """Whether that is the layout, by the first object (also where it is broken). The file's place is kept."""
    start = file.tell()
    line = next((line for line in file if line.strip()), b"")
    answer = line.strip() not in _OPENINGS and (_is_object(line) or not _goes_on(line + file.read()))
    file.seek(start)
    return answer


def parse_object(line: bytes) -> Record:
    """One object. Raises ValueError with the reason where it is none, or holds what is no text."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {line[error.start]:#04x}, {error.start} bytes in)") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None
    return _checked(value, text, all_utf8=True)


def _lines(path: str, file: IO[bytes], fault: Fault) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = parse_object(line)
        except ValueError as error:
            fault(f"{path}, line {number}: {error}")
            continue
        yield f"{path}, line {number}", record


def _values(path: str, text: str, fault: Fault) -> Iterator[tuple[str, Record]]:
    """Objects one behind another, with or without an array's brackets and commas."""
    place = _behind_gap(text, 0)
    in_array = text.startswith("[", place)
    place = place + in_array
    line = 1
    counted = 0
    number = 0
    all_utf8 = not _BYTE.search(text)
    while (place := _behind_gap(text, place)) < len(text) and not (in_array and text[place] == "]"):
        line = line + text.count("\n", counted, place)
        counted = place
        number = number + 1
        indentation = text[text.rfind("\n", 0, place) + 1 : place]
        begins_line = not indentation.strip()
        where = f"{path}, line {line}" + ("" if begins_line else f", record {number}")
        try:
            value, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            fault(f"{where}: {_reason(error)}")
            if not begins_line:
                raise UserError(f"{where}: {_reason(error)}; what follows cannot be told apart") from None
            place = text.find(f"\n{indentation}{{", place)
            if place < 0:
                return
            continue
        try:
            record = _checked(value, text[place:end], all_utf8)
        except ValueError as error:
            fault(f"{where}: {error}")
        else:
            yield where, record
        place = end
    if in_array and text[place : place + 1] != "]":
        fault(f"{path}, line {line}: the array has no end; the file is cut off")
    elif text[place + 1 :].strip():
        fault(f"{path}: there is more behind the array's end")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _goes_on(content: bytes) -> bool:
    """Whether the content begins with an object that spans lines, is in an array, or has another on its line."""
    text = content.decode("utf-8", "surrogateescape")
    start = _behind_gap(text, 0)
    in_array = text.startswith("[", start)
    start = _behind_gap(text, start + in_array)
    if not text.startswith("{", start):
        return False
    try:
        _, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    return in_array or "\n" in text[start:end] or text.startswith("{", _behind_gap(text, end))


def _behind_gap(text: str, place: int) -> int:
    match = _BETWEEN.match(text, place)
    return match.end() if match else place


def _checked(value: Any, text: str, all_utf8: bool) -> Record:
    """An object whose strings can be written. text: what it was read from."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    if not all_utf8 and (byte := _BYTE.search(text)):
        raise ValueError(f"not UTF-8 (byte {ord(byte[0]) - 0xDC00:#04x})")
    if "\\u" in text and _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except RecursionError as error:
            raise ValueError(_reason(error)) from None
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"holds {half}, half of a surrogate pair, which is no character") from None
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if str(error).startswith("Exceeds the limit"):
        return "not valid JSON (a number of thousands of digits)"
    return f"not valid JSON ({error})"
