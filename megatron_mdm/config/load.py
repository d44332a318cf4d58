"""YAML files, composed by `defaults:`, and dotted overrides → a RunConfig."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from megatron_mdm.config import field_types
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.format import FORMAT, FORMAT_KEY, RENAMED, in_present_format
from megatron_mdm.config.places import from_run, to_run
from megatron_mdm.config.schema import ObjectiveConfig, RunConfig
from megatron_mdm.config.sections.objective import ObjectiveOptions
from megatron_mdm.config.yaml_core import Key, dump_yaml, read_override, read_yaml

Tree = dict[str, Any]
Origins = dict[Key, str]  # where each leaf was set, the last one last
Model = TypeVar("Model", bound=BaseModel)
Options = TypeVar("Options", bound=ObjectiveOptions)


def load_config(path: str | Path, overrides: Sequence[str] = (), further: Sequence[Path] = ()) -> RunConfig:
    """Read a configuration file and apply overrides such as `optimizer.lr=1e-5`.

    A file may begin with `defaults: [other.yaml, …]` (paths relative to itself); later files and the file's own
    keys win, section by section. further: files whose keys win over the first one's. Raises UserError naming the file,
    the line and the key.
    """
    origins: Origins = {}
    tree = _compose(Path(path), origins, ())
    for other in further:
        _merge(tree, _compose(other, origins, ()))
    _override(tree, overrides, RunConfig, origins)
    config = validated(RunConfig, tree, origins, str(path))
    config.objective.written_at({key: place for key, place in origins.items() if key[0] == "objective"})
    return config


def load_section(model: type[Model], overrides: Sequence[str]) -> Model:
    """A section that no file holds, from its defaults and `key=value` arguments."""
    origins: Origins = {}
    tree: Tree = {}
    _override(tree, overrides, model, origins)
    return validated(model, tree, origins, "arguments")


def objective_options(section: ObjectiveConfig, model: type[Options]) -> Options:
    """The section `objective` as the objective's own model has it. Raises UserError as load_config does."""
    tree = {"objective": section.model_dump()}
    options: Options = validated(_around(model), tree, section.places, "objective").objective
    return options


@cache
def _around(model: type[Options]) -> Any:
    """A configuration of that section alone, so that its keys are told by their whole names."""
    return create_model("RunConfig", objective=(model, ...))


def read_mapping(path: Path, model: type[BaseModel]) -> tuple[Tree, Origins]:
    """A YAML file's keys and values, which a section's schema is to fit, not validated. Raises UserError."""
    try:
        tree, lines = read_yaml(path.read_text(encoding="utf-8"), str(path), model)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise UserError(f"{path}: expected a mapping of sections, found {found}")
    return tree, {key: f"{path}, line {lines[key]}" for key, _ in _leaves(tree)}


def validated(model: type[Model], tree: Tree, origins: Origins, where: str) -> Model:
    """The section that a tree describes. Raises UserError with the origin of the first wrong value; else, where."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(_describe(error, model, tree, origins, where)) from None


def dump_config(config: RunConfig, folder: Path | None = None) -> str:
    """The configuration, with its format, as YAML that load_config reads back to an equal value. folder: a run's, in
    which it is to lie; then the run can be moved (places.py)."""
    tree = {FORMAT_KEY: FORMAT, **config.model_dump(mode="json")}
    return dump_yaml(to_run(tree, folder) if folder else tree)


def flatten(tree: Tree) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings as ("section.key", value)."""
    for key, value in _leaves(tree):
        yield ".".join(key), value


def _leaves(value: Any, at: Key = ()) -> Iterator[tuple[Key, Any]]:
    """What is no mapping, and mappings without keys, save the whole."""
    if not isinstance(value, dict) or (at and not value):
        yield at, value
        return
    for key, part in value.items():
        yield from _leaves(part, (*at, key))


def _compose(path: Path, origins: Origins, including: tuple[Path, ...]) -> Tree:
    if path.resolve() in including:
        raise UserError(f"{path}: includes itself through 'defaults'")
    own, places = read_mapping(path, RunConfig)
    in_present_format(own, places, str(path))
    defaults = own.pop("defaults", [])
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise UserError(f"{path}: 'defaults' must be a list of file names")
    own = from_run(own, path.parent)
    tree: Tree = {}
    for name in defaults:
        _merge(tree, _compose(path.parent / name, origins, (*including, path.resolve())))
    _merge(tree, own)
    for key, _ in _leaves(own):
        _place(origins, key, places.get(key, str(path)))
    return tree


def _merge(into: Tree, other: Tree) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _override(tree: Tree, overrides: Sequence[str], model: type[BaseModel], origins: Origins) -> None:
    for override in overrides:
        dotted, separator, text = override.partition("=")
        name = f"override '{override}'"
        if not separator or not dotted:
            raise UserError(f"{name}: write it as section.key=value")
        key = tuple(dotted.split("."))
        annotation: Any = model
        for part in key:
            annotation = field_types.of_key(annotation, part)
        value = read_override(text, name, annotation)
        _set(tree, key, value, name)
        for leaf, _ in _leaves(value, key):
            _place(origins, leaf, name)


def _set(tree: Tree, key: Key, value: Any, name: str) -> None:
    for part in key[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"{name}: '{part}' is a value, not a section")
    tree[key[-1]] = value


def _place(origins: Origins, key: Key, where: str) -> None:
    """A value replaces those below its key, and one that was in place of the section around it."""
    for known in [known for known in origins if known[: len(key)] == key or key[: len(known)] == known]:
        del origins[known]
    origins[key] = where


def _origin(key: Key, origins: Origins, default: str) -> str:
    """The origin of a value, of the section around it, or of what was set last in a section."""
    around = [key[:length] for length in range(len(key), 0, -1)]
    below = [known for known in origins if known[: len(key)] == key]
    return next((origins[known] for known in [*around, *reversed(below)] if known in origins), default)


def _describe(error: ValidationError, root: type[BaseModel], tree: Tree, origins: Origins, default: str) -> str:
    """The first problem of a ValidationError in one line: where, what, and for unknown keys the nearest known one."""
    details = error.errors()
    unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]  # often the cause of the others
    first = _key((unknown or details)[0]["loc"], tree)
    # A value that fits no member of a union fails once for each. What fails deeper is of the right kind.
    same = [detail for detail in unknown or details if _key(detail["loc"], tree)[: len(first)] == first]
    detail = max(same, key=lambda detail: len(_key(detail["loc"], tree)))
    key = _key(detail["loc"], tree)
    where = _origin(key, origins, default)
    if key in RENAMED:
        return f"{where}: '{'.'.join(key)}' is now '{'.'.join(RENAMED[key])}'"
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key '{'.'.join(key)}'{_suggestion(root, key)}"
    if detail["type"] == "missing":
        return f"{default}: key '{'.'.join((*key, str(detail['loc'][-1])))}' is missing"
    messages = [_message(other["msg"]) for other in same if _key(other["loc"], tree) == key]
    given = f", got {detail['input']!r}" if not isinstance(detail["input"], dict | BaseModel) else ""
    named = f"'{'.'.join(key)}': " if key else ""
    return f"{where}: {named}{' or '.join(dict.fromkeys(messages))}{given}"


def _key(location: tuple[int | str, ...], tree: Tree) -> Key:
    """A problem's location without the names of a union's members, which stand in it, too."""
    key = []
    value = tree
    for part in location:
        if isinstance(value, dict) and part in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue
        key.append(str(part))
    return tuple(key)


def _message(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _suggestion(root: Any, key: Key) -> str:
    for part in key[:-1]:
        root = field_types.of_key(root, part)
    known = field_types.keys(root)
    near = difflib.get_close_matches(key[-1], known, n=1, cutoff=0.5)
    if near:
        return f" (did you mean '{'.'.join([*key[:-1], near[0]])}'?)"
    return f" (known here: {', '.join(known)})" if known else ""
