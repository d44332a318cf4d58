"""Checkpoints of a run: written whole or not at all, verified before they are read, the oldest removed."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mdm.checkpoint.tensors import write_tensors
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256, write_json
from megatron_mdm.parallel.collectives import barrier, gather_objects
from megatron_mdm.parallel.groups import ParallelContext

if TYPE_CHECKING:
    from megatron_mdm.engine.base import Engine  # brings DeepSpeed, which single-process tools do without

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors"
_HASHING_THREADS = 8


class CheckpointStore:
    """The folder RUN/checkpoints with one step-… folder per checkpoint."""

    def __init__(self, folder: Path, keep_last: int, context: ParallelContext) -> None:
        self.folder, self.keep_last, self.context = folder, keep_last, context

    def save(self, step: int, engine: Engine, state: dict[str, Any]) -> Path:
        """Write a checkpoint. Collective. The folder appears under its name only when every file is on disk."""
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        if self.context.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        barrier()
        write_tensors(engine.master.tensors(), temporary / TENSORS, self.context)
        barrier()
        if self.context.is_main:
            write_json(temporary / STATE, state)
        self._write_manifest(temporary)
        if self.context.is_main:
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            for old in self.steps()[: -self.keep_last]:
                shutil.rmtree(old)
        barrier()
        return final

    def steps(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return steps(self.folder)

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

    def _write_manifest(self, folder: Path) -> None:
        """Every rank hashes its share of the files; the main rank writes size and sha256 of each."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        mine = files[self.context.rank :: self.context.layout.world_size]
        shares = gather_objects({str(path.relative_to(folder)): _entry(path) for path in mine}, self.context)
        if self.context.is_main:
            entries = {name: entry for share in shares for name, entry in share.items()}  # type: ignore[attr-defined]
            write_json(folder / MANIFEST, {"files": dict(sorted(entries.items()))})


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


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or unreadable"
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: sha256(checkpoint / name), entries)
        wrong = [name for name, digest in zip(entries, digests) if digest != entries[name]["sha256"]]
    return f"{wrong[0]} does not match its checksum" if wrong else None


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
