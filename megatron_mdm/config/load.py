"""YAML files, composed by `defaults:`, and dotted overrides → a RunConfig."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig

Tree = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file and apply overrides such as `optimizer.lr=1e-5`.

    A file may begin with `defaults: [other.yaml, …]` (paths relative to itself); later files and the file's own
    keys win, section by section. Raises UserError naming the file and the key.
    """
    origins: dict[str, str] = {}
    tree = _read(Path(path), origins, ())
    _override(tree, overrides, origins)
    return _validated(RunConfig, tree, origins, str(path))


def load_section(model: type[Model], overrides: Sequence[str]) -> Model:
    """A section that no file holds, from its defaults and `key=value` arguments."""
    origins: dict[str, str] = {}
    tree: Tree = {}
    _override(tree, overrides, origins)
    return _validated(model, tree, origins, "arguments")


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that load_config reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings as ("section.key", value)."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(path: Path, origins: dict[str, str], including: tuple[Path, ...]) -> Tree:
    if path.resolve() in including:
        raise UserError(f"{path}: includes itself through 'defaults'")
    try:
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({_one_line(error)})") from None
    if not isinstance(own, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(own).__name__}")
    defaults = own.pop("defaults", [])
    if not isinstance(defaults, list) or not all(isinstance(name, str) for name in defaults):
        raise UserError(f"{path}: 'defaults' must be a list of file names")
    tree: Tree = {}
    for name in defaults:
        _merge(tree, _read(path.parent / name, origins, (*including, path.resolve())))
    _merge(tree, own)
    origins.update({key: str(path) for key, _ in flatten(own)})
    return tree


def _merge(into: Tree, other: Tree) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _override(tree: Tree, overrides: Sequence[str], origins: dict[str, str]) -> None:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}': write it as section.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"override '{override}': the value is not YAML ({_one_line(error)})") from None
        _set(tree, key.split("."), value, override)
        origins[key] = f"override '{override}'"


def _validated(model: type[Model], tree: Tree, origins: dict[str, str], where: str) -> Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(_describe(error, model, origins, where)) from None


def _set(tree: Tree, keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"override '{override}': '{key}' is a value, not a section")
    tree[keys[-1]] = value


def _describe(error: ValidationError, root: type[BaseModel], origins: dict[str, str], path: str) -> str:
    """The first problem of a ValidationError in one line: where, what, and for unknown keys the nearest known one."""
    details = error.errors()
    unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]  # often the cause of the others
    detail = (unknown or details)[0]
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    where = next((origins[known] for known in origins if known == key or known.startswith(f"{key}.")), path)
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{_suggestion(root, location)}"
    if detail["type"] == "missing":
        return f"{where}: key '{key}' is missing"
    union_tags = {"int", "str"} | {part for part in location if part.startswith("literal[")}
    key = ".".join(part for part in location if part not in union_tags)
    message = detail["msg"].removeprefix("Value error, ")
    given = f", got {detail['input']!r}" if not isinstance(detail["input"], dict | BaseModel) else ""
    return f"{where}: '{key}': {message[0].lower()}{message[1:]}{given}"


def _suggestion(root: type[BaseModel], location: list[str]) -> str:
    model: Any = root
    for part in location[:-1]:
        field = model.model_fields.get(part)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ""
    near = difflib.get_close_matches(location[-1], model.model_fields, n=1, cutoff=0.5)
    if near:
        return f" (did you mean '{'.'.join([*location[:-1], near[0]])}'?)"
    return f" (known here: {', '.join(model.model_fields)})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
