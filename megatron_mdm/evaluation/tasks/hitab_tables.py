"""HiTab's tables: a JSON file each in tables/raw, or inside the record; as rows of cells between pipes."""

from __future__ import annotations

import ast
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.public_sets import field
from megatron_mdm.data.records import Record


def table_of(record: Record, where: str, tables: Path) -> tuple[str, str]:
    """(title, rows) of a record's table: `table`, its rows as text; `table_content`, what a file of tables/raw holds;
    or `table_id`, that file's name, in tables/raw/ or tables/. Raises UserError where it is not there."""
    if isinstance(record.get("table"), str):
        return field(record, ("title",), where), record["table"]
    if "table_content" in record:
        content = literal(record["table_content"], where, "table_content")
        source = f"{where}: 'table_content'"
    else:
        path = _path(record.get("table_id"), where, tables)
        content = _read(path)
        source = str(path)
    if not isinstance(content, dict) or not _is_matrix(content.get("texts")):
        raise UserError(f"{source}: expected an object with 'texts', a list of rows (as in tables/raw, not tables/hmt)")
    return str(record.get("title") or content.get("title") or ""), linearised(content["texts"])


def linearised(rows: list[list[Any]]) -> str:
    """A line for each row, "| a | b |". Of a merged cell, the text is where the files have it: at its top left; the
    rest of it is empty."""
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def literal(value: Any, where: str, name: str) -> Any:
    """The value; of a text that holds a list or an object as JSON or Python writes it, that."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith(("[", "{")):
        return [value]
    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{where}: '{name}' is a text that is neither JSON nor a Python literal") from None


def _path(table_id: Any, where: str, tables: Path) -> Path:
    if not isinstance(table_id, str | int) or Path(str(table_id)).name != str(table_id):
        raise UserError(f"{where}: 'table_id' {table_id!r} is no file's name")
    expected = tables / "raw" / f"{table_id}.json"
    path = next((path for path in (expected, tables / expected.name) if path.is_file()), None)
    if path is None:
        raise UserError(
            f"{where}: no table {expected}; unpack the data set's tables.zip there, or name its folder with --tables"
        )
    return path


@lru_cache(maxsize=32)  # a table's questions stand together
def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None


def _is_matrix(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, list) for row in rows)


def _cell(text: Any) -> str:
    return "" if text is None else " ".join(str(text).split()).replace("|", "\\|")
