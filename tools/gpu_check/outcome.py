"""What a check is given, and what it gives back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_mdm.config.files import write_json

OUTCOME = "outcome.json"  # in a check's folder


@dataclass(frozen=True)
class Setting:
    """Where and at which size a check runs."""

    device: Literal["cuda", "cpu"]
    quick: bool  # at a size that takes a CPU a second or two; the figures then mean little
    folder: Path  # the check's own


@dataclass(frozen=True)
class Outcome:
    """Figures of a check, and its verdict. JSON-able."""

    figures: dict[str, Any]
    faults: list[str] = field(default_factory=list)  # why it failed, a line each; none: it passed
    skipped: str = ""  # why it cannot run here

    def write(self, folder: Path) -> None:
        write_json(folder / OUTCOME, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        return cls(**json.loads((folder / OUTCOME).read_text(encoding="utf-8")))


def skipped(reason: str) -> Outcome:
    return Outcome({}, skipped=reason)
