"""The file of image codes that `mdm prepare images` writes, and what an interrupted one resumes from."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mdm.cli.pictures import Faults, Square
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.images.tokenizer import ImageTokenizer

_SECONDS = 5.0  # between two states that a later call can go on from


@dataclass(frozen=True)
class CodesState:
    """What the partial file holds."""

    settings: dict[str, Any]
    bytes: int = 0
    rows: int = 0
    done: int = 0  # pictures that the sources name, up to the last row
    enlarged: int = 0
    bad: int = 0  # that could not be read
    first_bad: tuple[str, ...] = ()


class CodesFile:
    """Lines as they come, in FILE.partial; FILE.progress.json says how far they go, so that the same command resumes;
    at the end, FILE."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: ImageTokenizer) -> None:
        self.path = Path(arguments.output)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.progress = self.path.with_name(f"{self.path.name}.progress.json")
        self.constants = {"codes_of": tokenizer.fingerprint(), "num_codes": tokenizer.num_codes}
        settings = {
            "pictures": list(arguments.input),
            "image tokenizer": self.constants["codes_of"],
            "resolution": arguments.resolution,
            "caption field": arguments.caption_field,
            "on error": arguments.on_error,
        }
        self.state = self._resumed(CodesState(settings))
        self.saved = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.partial.open("ab")
            self.file.truncate(self.state.bytes)
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror})") from None

    def _resumed(self, empty: CodesState) -> CodesState:
        if not self.progress.exists():
            return empty
        try:
            values = json.loads(self.progress.read_text(encoding="utf-8"))
            state = CodesState(**{**values, "first_bad": tuple(values["first_bad"])})
            size = self.partial.stat().st_size
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.progress}: cannot be used ({error}); remove it to start from scratch") from None
        for name, value in empty.settings.items():
            if state.settings.get(name) != value:
                raise UserError(
                    f"{self.partial}: begun with {name} = {state.settings.get(name)!r}, not {value!r}; go on with the "
                    f"same settings, or remove {self.progress.name} to start from scratch"
                )
        if size < state.bytes:
            raise UserError(f"{self.partial}: shorter than it was; remove {self.progress.name} to start from scratch")
        return state

    def add(self, batch: Sequence[Square], codes: Sequence[list[int]], faults: Faults) -> None:
        lines = [
            json.dumps({"caption": square.source.caption, "image_codes": row, **self.constants}, ensure_ascii=False)
            for square, row in zip(batch, codes, strict=True)
        ]
        content = "".join(f"{line}\n" for line in lines).encode()
        self._write(content)
        self.state = CodesState(
            settings=self.state.settings,
            bytes=self.state.bytes + len(content),
            rows=self.state.rows + len(batch),
            done=batch[-1].place + 1,
            enlarged=self.state.enlarged + sum(square.is_enlarged for square in batch),
            bad=faults.pictures.count,
            first_bad=tuple(faults.pictures.first),
        )
        if time.monotonic() - self.saved > _SECONDS:
            self.save()

    def _write(self, content: bytes) -> None:
        try:
            self.file.write(content)
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror}); the same command resumes") from None

    def save(self) -> None:
        """From here on the same command goes on with what follows."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            write_json(self.progress, asdict(self.state))
        except OSError as error:
            raise UserError(f"{self.partial}: cannot be written ({error.strerror}); the same command resumes") from None
        self.saved = time.monotonic()

    def finish(self) -> None:
        self.file.close()
        self.partial.replace(self.path)
        self.progress.unlink()
