"""The format of a run's config.yaml, and keys that have other names than in earlier ones.

A run's config.yaml begins with `format: 2`. One without it that names its folder $RUN was written by earlier code: it
is in format 1, and its keys are renamed as it is read. What a user writes needs no format; a key's earlier name is an
error there that tells the present one.
"""

from __future__ import annotations

from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.places import RUN
from megatron_mdm.config.yaml_core import Key

FORMAT = 2
FORMAT_KEY = "format"
RENAMED: dict[Key, Key] = {  # since format 1
    ("diffusion", "method"): ("objective", "name"),
    ("diffusion", "sampler"): ("diffusion", "t_sampler"),
}
Tree = dict[str, Any]
Places = dict[Key, str]


def in_present_format(tree: Tree, places: Places, path: str) -> None:
    """Take the format out of a file's tree and rename the keys of an earlier one, here and in places (file and line by
    key). Raises UserError where later code wrote it."""
    found = tree.pop(FORMAT_KEY, 1 if _is_of_a_run(tree) else FORMAT)
    where = places.pop((FORMAT_KEY,), path)
    if type(found) is not int or found < 1:
        raise UserError(f"{where}: 'format' {found!r} is no version; it is {FORMAT} where megatron-mdm writes it")
    if found > FORMAT:
        raise UserError(
            f"{where}: 'format' {found} was written by a later megatron-mdm; this one reads formats up to {FORMAT}"
        )
    if found < FORMAT:
        for old, new in RENAMED.items():
            _move(tree, old, new)
            if old in places:
                places[new] = places.pop(old)


def _is_of_a_run(tree: Tree) -> bool:
    section = tree.get("checkpoint")
    return isinstance(section, dict) and section.get("directory") == RUN


def _move(tree: Tree, old: Key, new: Key) -> None:
    section = tree.get(old[0])
    if isinstance(section, dict) and old[1] in section:
        tree.setdefault(new[0], {})[new[1]] = section.pop(old[1])
