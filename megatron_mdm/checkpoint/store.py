"""Checkpoints of a run: written whole or not at all, verified before they are read, the oldest removed.

Training waits while this rank's part is copied; a thread writes it, and agrees with the other ranks' threads.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.checkpoint.manifest import TENSORS, entry_of, find_fault, write_manifest
from megatron_mdm.checkpoint.tensors import Snapshot
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sync, write_json
from megatron_mdm.config.schema import CheckpointConfig
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext

if TYPE_CHECKING:
    from megatron_mdm.engine.base import Engine  # brings DeepSpeed, which single-process tools do without

STATE = "state.json"
ARRAYS = "source.npz"  # beside it, of runs whose source of batches has some
VALIDATION_LOSS = "validation_loss"  # in a state: of the saved weights; absent where they were not validated
LOSS_SCALE = "loss_scale"  # in a state: fp16's (engine/loss_scale.py); empty or, of earlier code, absent


class SaveError(Exception):
    """A checkpoint could not be written; those before it are as they were. Raised on every rank."""


class CheckpointStore:
    """The folder RUN/checkpoints with one step-… folder per checkpoint."""

    def __init__(self, folder: Path, settings: CheckpointConfig, context: ParallelContext) -> None:
        self.folder = folder
        self.settings = settings
        self.context = context
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._snapshot = Snapshot(context)

    def save(
        self, step: int, engine: Engine, state: dict[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None
    ) -> None:
        """Begin a checkpoint, which finish() ends. Collective.

        The folder appears under its name only when every file is on disk. State and arrays, which the main rank writes
        for all, must not change afterwards.
        """
        assert self._pending is None, "the checkpoint before is still being written"
        self._snapshot.take(engine.optimizer_state.fragments())
        state = {**state, LOSS_SCALE: engine.loss_scale.state()}
        self._pending = self._writer.submit(self._write, step, state, dict(arrays or {}))

    def is_writing(self) -> bool:
        return self._pending is not None and not self._pending.done()

    def finish(self) -> None:
        """Wait for what is being written. Raises SaveError where it could not be, on every rank alike."""
        pending = self._pending
        self._pending = None
        if pending:
            pending.result()

    def _write(self, step: int, state: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Write this rank's part. Runs on the writing thread of every rank."""
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            self._together(lambda: _make_empty(temporary), only_main=True)
            entries = self._together(lambda: self._snapshot.write(temporary / TENSORS))
            self._together(lambda: self._complete(temporary, entries, state, arrays, final), only_main=True)
        except SaveError:
            if self.context.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # the space may be what is missing
            self._together(lambda: None)
            raise

    def _complete(
        self,
        temporary: Path,
        entries: list[tuple[str, dict[str, Any]]],
        state: dict[str, Any],
        arrays: dict[str, NDArray[Any]],
        final: Path,
    ) -> None:
        """Write state, arrays and manifest, give the folder its name, remove what this makes superfluous."""
        write_json(temporary / STATE, state)
        files = {f"{TENSORS}/{name}": entry for name, entry in entries}
        if arrays:
            named: dict[str, Any] = dict(arrays)
            np.savez(temporary / ARRAYS, **named)
            files[ARRAYS] = entry_of(temporary / ARRAYS)
        write_manifest(temporary, {**files, STATE: entry_of(temporary / STATE)})
        for folder in (temporary / TENSORS, temporary):
            sync(folder)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(self.folder)
        unfinished = self.folder.glob(".step-*.tmp")  # of jobs that were killed while they saved
        for old in (*superfluous(self.folder, final, self.settings), *unfinished):
            shutil.rmtree(old, ignore_errors=True)  # what stays behind is removed after the next save

    def newest_intact(self) -> Path | None:
        """The newest checkpoint whose files match its manifest; None where there is no checkpoint at all. Collective.

        The main rank reads and checks the files for all. Damaged ones are named and passed over. Raises UserError where
        none is intact.
        """
        found: Any = None
        if self.context.is_main:
            try:
                found = search(self.folder)
            except UserError as error:  # a checkpoint of later code
                found = "", str(error)
        name, fault = gather_objects(found, self.context)[0]
        if fault:
            raise UserError(fault)
        return self.folder / name if name else None

    def _together(self, action: Callable[[], Any], only_main: bool = False) -> list[Any]:
        """The action's result on every rank, by rank; SaveError everywhere where it failed on one."""
        result = None
        fault = ""
        try:
            if self.context.is_main or not only_main:
                result = action()
        except OSError as error:
            fault = error.strerror or str(error)
        outcomes: list[Any] = gather_objects((result, fault), self.context, self.context.background)
        for rank, (_, fault) in enumerate(outcomes):
            if fault:
                raise SaveError(f"{self.folder}: rank {rank} cannot write a checkpoint ({fault})")
        return [result for result, _ in outcomes]


def superfluous(folder: Path, newest: Path, retention: CheckpointConfig) -> list[Path]:
    """Checkpoints that need not be kept, given the one just written.

    Later steps than that are what a resumed run passed over as damaged: they count for nothing and stay until they are
    written again.
    """
    found = [path for path in steps(folder) if path.name <= newest.name]
    kept = set(found[-retention.keep_last :])
    if retention.keep_every:
        kept |= {path for path in found if int(path.name.removeprefix("step-")) % retention.keep_every == 0}
    if retention.keep_best is True:
        losses = {path: validation_loss(path) for path in found}
        best = min(found, key=lambda path: losses[path])
        kept |= {best} if losses[best] < math.inf else set()
    return [path for path in found if path not in kept]


def validation_loss(checkpoint: Path) -> float:
    """A checkpoint's validation loss; infinity where there is none, or none that can be read."""
    try:
        return float(read_state(checkpoint).get(VALIDATION_LOSS, math.inf))
    except (OSError, ValueError):
        return math.inf


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def search(folder: Path) -> tuple[str, str]:
    """(name of the newest intact checkpoint, '' where there is none; what is wrong where none of some is intact)"""
    path, fault = first_intact(steps(folder)[::-1])
    if fault:
        return "", f"{folder}: no intact checkpoint ({fault}); start from scratch with --overwrite"
    return (path.name if path else ""), ""


def first_intact(candidates: Sequence[Path]) -> tuple[Path | None, str]:
    """(the first whose files match their checksums, what is wrong with the first where none do); damage is named."""
    first_fault = ""
    for path in candidates:
        fault = find_fault(path)
        if fault is None:
            return path, ""
        first_fault = first_fault or fault
        following = "; trying the next" if path != candidates[-1] else ""
        print(f"checkpoint {path} is damaged ({fault}){following}", flush=True)
    return None, first_fault


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def read_arrays(checkpoint: Path) -> dict[str, NDArray[Any]]:
    """The arrays of the run's source of batches by name; none where it has none."""
    if not (checkpoint / ARRAYS).is_file():
        return {}
    with np.load(checkpoint / ARRAYS, allow_pickle=False) as file:
        return dict(file)
