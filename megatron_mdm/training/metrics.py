"""A run's numbers: metrics.jsonl, tensorboard, and a line on the screen."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("loss", "reward", "validation_loss", "exact_match", "lr", "grad_norm")
_MEASURED = ("time_", "memory_", "tokens_per_second", "mfu", "slowest_rank")  # how such keys begin


def is_measured(key: str) -> bool:
    """Whether a record's value is of the clock or the machine, and so another in every run."""
    return key.startswith(_MEASURED) or key.endswith("_seconds")


class MetricsLog:
    """Writes on the main rank only; elsewhere every call does nothing."""

    def __init__(self, folder: Path, tensorboard: bool, is_main: bool, first_step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.is_main = is_main
        self.tensorboard = tensorboard
        self.writer: Any = None  # TensorBoard's, which is imported where it is wanted
        self.unwritten = b""
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self.go_back(first_step)

    def go_back(self, step: int) -> None:
        """Forget what was written of later steps, which are done again."""
        if not self.is_main:
            return
        self.unwritten = b""
        truncate_records(self.path, step)
        self.close()
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides the points of those steps.
            self.writer = SummaryWriter(str(self.path.with_name("tensorboard")), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one record; not-a-number becomes null, so that every line is JSON."""
        if not self.is_main:
            return
        values = {key: None if _is_nan(value) else value for key, value in values.items()}
        self._append(json.dumps({"step": step, **values}) + "\n")
        shown = {key: values[key] for key in SHOWN if values.get(key) is not None}
        if shown:
            tqdm.write(f"step {step:>6}  " + "  ".join(f"{key} {value:.6g}" for key, value in shown.items()))
        try:
            self._add_points(step, values)
        except OSError as error:  # of its own thread, some time ago; it cannot continue from there
            tqdm.write(f"error: tensorboard's file cannot be written ({error.strerror}); it ends here", file=sys.stderr)
            self.writer = None

    def _add_points(self, step: int, values: dict[str, Any]) -> None:
        if self.writer:
            for key, value in values.items():
                if isinstance(value, list):
                    of = "rank" if key.endswith("_by_rank") else "bin"
                    for index, item in enumerate(value):
                        if item is not None:
                            self.writer.add_scalar(f"{key}/{of}_{index}", item, step)
                elif value is not None:
                    self.writer.add_scalar(key, value, step)

    def _append(self, line: str) -> None:
        """Append a line; one that a full disk refuses is kept, and written as soon as there is room."""
        self.unwritten += line.encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                while self.unwritten:
                    self.unwritten = self.unwritten[file.write(self.unwritten) :]
        except OSError as error:
            tqdm.write(f"error: {self.path} cannot be written ({error.strerror}); training goes on", file=sys.stderr)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        if self.writer:
            self.writer.add_figure(name, figure, step)

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """An RGB picture for tensorboard."""
        if self.writer:
            self.writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def records(self) -> list[dict[str, Any]]:
        """What was written; nothing where a run is shorter than logging.every."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self.writer:
                self.writer.close()


def truncate_records(path: Path, last_step: int) -> None:
    """Drop the records of steps that a resumed run will do again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that was being written when the run died
            continue
        if record["step"] <= last_step:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
