"""The report of all checks: a line for each, the figures, and gpu_check.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mdm.config.files import write_json
from tools.gpu_check.runner import Record


def line_of(record: Record) -> str:
    """How a check ended, in one line; below it one for each fault."""
    head = f"{record.verdict:<8}{record.name:<12}{record.seconds:>6.1f} s  {record.what}"
    if record.skipped:
        head += f": {record.skipped}"
    return "\n".join([head, *(f"        FAILED: {fault}" for fault in record.faults)])


def table(records: Sequence[Record]) -> str:
    """The figures of every check, a line each."""
    lines = []
    for record in records:
        if record.figures:
            lines.append(f"{record.name}: {record.what}")
            lines += [f"  {name:<64} {value}" for name, value in _leaves(record.figures)]
    counts = {
        verdict: sum(record.verdict == verdict for record in records) for verdict in ("passed", "failed", "skipped")
    }
    lines.append(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    return "\n".join(lines)


def write(path: Path, settings: dict[str, Any], records: Sequence[Record]) -> None:
    """settings: how the checks were run. checks: records by name."""
    write_json(path, {"settings": settings, "checks": {record.name: asdict(record) for record in records}})


def _leaves(figures: dict[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{at}{name}, ")
        else:
            yield at + name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        return ", ".join(_text(part) for part in value) or "none"
    return str(value)
