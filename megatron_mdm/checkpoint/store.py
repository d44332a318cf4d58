"""Checkpoints of a run: written whole or not at all, verified before they are read, the oldest removed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint.manifest import TENSORS, entry_of, find_fault, write_manifest
from megatron_mdm.checkpoint.tensors import write_tensors
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import write_json
from megatron_mdm.config.schema import CheckpointConfig
from megatron_mdm.parallel.collectives import barrier, gather_objects
from megatron_mdm.parallel.groups import ParallelContext

if TYPE_CHECKING:
    from megatron_mdm.engine.base import Engine  # brings DeepSpeed, which single-process tools do without

STATE = "state.json"
VALIDATION_LOSS = "validation_loss"  # in a state: of the saved weights; absent where they were not validated


class SaveError(Exception):
    """A checkpoint could not be written; those before it are as they were. Raised on every rank at once."""


class CheckpointStore:
    """The folder RUN/checkpoints with one step-… folder per checkpoint."""

    def __init__(self, folder: Path, retention: CheckpointConfig, context: ParallelContext) -> None:
        self.folder, self.retention, self.context = folder, retention, context

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> Path:
        """Write a checkpoint. Collective. The folder appears under its name only when every file is on disk.

        Raises SaveError on every rank where one of them cannot write.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            self._together(lambda: _make_anew(temporary), only_main=True)
            self._together(lambda: write_tensors(engine.master.tensors(), temporary / TENSORS, self.context))
            self._together(lambda: write_json(temporary / STATE, state), only_main=True)
            self._write_manifest(temporary)
            self._together(lambda: self._publish(temporary, final), only_main=True)
        except SaveError:
            if self.context.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # the space may be what is missing
            barrier()
            raise
        return final

    def newest_intact(self) -> Path | None:
        """The newest checkpoint whose files match its manifest; None where there is no checkpoint at all. Collective.

        The main rank reads and checks the files for all. Damaged ones are named and passed over. Raises UserError where
        none is intact.
        """
        found = search(self.folder) if self.context.is_main else None
        name, fault = gather_objects(found, self.context)[0]  # type: ignore[misc]
        if fault:
            raise UserError(f"{self.folder}: no intact checkpoint ({fault}); start anew with --overwrite")
        return self.folder / name if name else None

    def _together(self, action: Callable[[], Any], only_main: bool = False) -> list[Any]:
        """The action's result on every rank, by rank; SaveError everywhere where it failed on one."""
        result, fault = None, ""
        try:
            if self.context.is_main or not only_main:
                result = action()
        except OSError as error:
            fault = error.strerror or str(error)
        outcomes: list[Any] = gather_objects((result, fault), self.context)
        for rank, (_, fault) in enumerate(outcomes):
            if fault:
                raise SaveError(f"{self.folder}: rank {rank} cannot write a checkpoint ({fault})")
        return [result for result, _ in outcomes]

    def _write_manifest(self, folder: Path) -> None:
        """Every rank hashes its share of the files; the main rank writes size and sha256 of each."""

        def of_my_share() -> dict[str, Any]:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            mine = files[self.context.rank :: self.context.layout.world_size]
            return {str(path.relative_to(folder)): entry_of(path) for path in mine}

        shares = self._together(of_my_share)
        entries = {name: entry for share in shares for name, entry in share.items()}
        self._together(lambda: write_manifest(folder, entries), only_main=True)

    def _publish(self, temporary: Path, final: Path) -> None:
        """The checkpoint under its name, then what it makes superfluous away."""
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        for old in superfluous(self.folder, final, self.retention):
            shutil.rmtree(old, ignore_errors=True)  # what stays behind is removed after the next save


def superfluous(folder: Path, newest: Path, retention: CheckpointConfig) -> list[Path]:
    """Checkpoints that need not be kept, given the one just written.

    Later steps than that are what a resumed run passed over as damaged: they count for nothing and stay until they are
    written again.
    """
    found = [path for path in steps(folder) if path.name <= newest.name]
    kept = set(found[-retention.keep_last :])
    if retention.keep_every:
        kept |= {path for path in found if int(path.name.removeprefix("step-")) % retention.keep_every == 0}
    if retention.keep_best:
        losses = {path: _validation_loss(path) for path in found}
        best = min(found, key=lambda path: losses[path])
        kept |= {best} if losses[best] < math.inf else set()
    return [path for path in found if path not in kept]


def _validation_loss(checkpoint: Path) -> float:
    """Infinity where there is none, or none that can be read."""
    try:
        return float(read_state(checkpoint).get(VALIDATION_LOSS, math.inf))
    except (OSError, ValueError):
        return math.inf


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def search(folder: Path) -> tuple[str, str]:
    """(name of the newest intact checkpoint, what is wrong with the newest where none is intact)"""
    first_fault = ""
    for path in reversed(steps(folder)):
        fault = find_fault(path)
        if fault is None:
            return path.name, ""
        first_fault = first_fault or fault
        print(f"checkpoint {path} is damaged ({fault}); trying the one before", flush=True)
    return "", first_fault


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
