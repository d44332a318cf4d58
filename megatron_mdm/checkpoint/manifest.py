"""The manifest of a checkpoint: its format, size and checksum of every file, and a checksum of itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.files import sha256, sync, write_atomically
from megatron_mdm.parallel.heartbeat import beat

MANIFEST = "manifest.json"
TENSORS = "tensors"
# Of a checkpoint. 1, which manifests do not name: parameters are named by their index in the list of layers. 2: by
# the table of parameters (models/parameters.py).
FORMAT = 2
_HASHING_THREADS = 8


def write_manifest(folder: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """Write a folder's manifest. entries: path below the folder → {"bytes": …, "sha256": …}."""
    write_atomically(folder / MANIFEST, _text(dict(sorted(entries.items())), FORMAT))


def format_of(checkpoint: Path) -> int:
    """The format of an intact checkpoint."""
    return _read(checkpoint / MANIFEST)[0]


def entry_of(path: Path) -> dict[str, Any]:
    """A file's entry. The file is on the disk, not only in its cache, when this returns."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    beat()
    return sha256(path)


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Raises UserError where it is in the format of later code."""
    try:
        version, entries = _read(checkpoint / MANIFEST)
        if version > FORMAT:
            raise UserError(
                f"{checkpoint}: is in format {version}, of a later megatron-mdm; this one reads formats up to {FORMAT}"
            )
        for name, entry in entries.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
        for path in sorted((checkpoint / TENSORS).glob("*")):  # the reader takes whatever lies there
            if str(path.relative_to(checkpoint)) not in entries:
                return f"{TENSORS}/{path.name} is not in {MANIFEST}"
        with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(lambda name: _digest(checkpoint / name), entries)
            wrong = [name for name, digest in zip(entries, digests) if digest != entries[name]["sha256"]]
    except OSError as error:
        return f"{error.filename or checkpoint} cannot be read ({error.strerror})"
    except ValueError:
        return f"{MANIFEST} is missing or unreadable"
    return f"{wrong[0]} does not match its checksum" if wrong else None


def _read(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(format, entries). Raises ValueError unless the file is, byte for byte, what write_manifest writes, or wrote."""
    if not path.is_file():
        raise ValueError("missing")
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    version, entries = (content.get("format", 1), content.get("files")) if isinstance(content, dict) else (1, None)
    if type(version) is not int or version < 1 or not isinstance(entries, dict) or _text(entries, version) != text:
        raise ValueError("damaged")
    return version, entries


def _text(entries: dict[str, dict[str, Any]], version: int) -> str:
    content: dict[str, Any] = {"format": version, "files": entries}
    signed = content if version > 1 else entries
    digest = hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()
    if version == 1:
        del content["format"]
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"
