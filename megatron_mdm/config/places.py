"""Paths in a run's config.yaml, so that a run can be moved, renamed and read from anywhere.

$RUN stands for the folder that the file is in. Paths inside the run's folder are written with it; so are those that
were given relative to a folder above it, as $RUN/../../data/train.jsonl for data/train.jsonl. Such a one is looked for
from the run's folder first, which finds it where both were moved together, then as it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = "$RUN"
Tree = dict[str, Any]
PATH_KEYS = (
    ("checkpoint", "directory"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "tokenizer"),
    ("model", "init_from"),
    ("model", "lora", "init_from"),
    ("diffusion", "calibration", "artifact"),
    ("image", "tokenizer"),
    ("rl", "replay"),
    ("image", "preview"),
)


def to_run(tree: Tree, folder: Path) -> Tree:
    """A configuration's tree as it is written into a run's folder."""
    return _changed(tree, lambda path: _written(path, str(folder)))


def from_run(tree: Tree, folder: Path) -> Tree:
    """The tree of a file in a folder, with paths that hold from here."""
    return _changed(tree, lambda path: _read(path, str(folder)))


def _written(path: str, folder: str) -> str:
    inside = os.path.relpath(path, folder)
    if inside == ".":
        return RUN
    above = os.path.relpath(".", folder)
    is_below = not os.path.isabs(path) and not os.path.normpath(path).startswith("..")
    is_common = is_below and set(above.split(os.sep)) <= {"..", "."}
    is_inside = not inside.startswith("..") and (above != "." or _exists(path))  # or a name of `datasets`
    return f"{RUN}/{inside}" if is_inside or (is_common and _exists(path)) else path


def _read(path: str, folder: str) -> str:
    name, _, inside = path.partition("/")
    if name != RUN:
        return path
    from_folder = os.path.normpath(os.path.join(folder, inside)) if inside else folder
    as_given = inside
    while as_given.startswith("../"):
        as_given = as_given.removeprefix("../")
    if as_given == inside:
        return from_folder
    if not _exists(from_folder) or (_exists(as_given) and os.path.abspath(as_given) == os.path.abspath(from_folder)):
        return as_given
    return from_folder


def _exists(path: str) -> bool:
    """A file, a folder, or the beginning of files' names, as a corpus has it."""
    where = Path(path)
    return where.exists() or (where.parent.is_dir() and any(where.parent.glob(f"{_escaped(where.name)}[.-]*")))


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _changed(tree: Tree, change: Callable[[str], str]) -> Tree:
    """The tree with every path changed; a mapping has paths for keys (a blend of corpora)."""
    for section, *rest in PATH_KEYS:
        tree = _at(tree, (section, *rest), change)
    return tree


def _at(tree: Tree, key: tuple[str, ...], change: Callable[[str], str]) -> Tree:
    name, *rest = key
    if not isinstance(tree, dict) or name not in tree:
        return tree
    value = tree[name]
    if rest:
        return {**tree, name: _at(value, tuple(rest), change)}
    if isinstance(value, dict):
        return {**tree, name: {change(path) if isinstance(path, str) else path: part for path, part in value.items()}}
    return {**tree, name: change(value) if isinstance(value, str) and value else value}
