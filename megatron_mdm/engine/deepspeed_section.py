"""The section `deepspeed`, whose keys are DeepSpeed's, checked by DeepSpeed's own reader before anything uses it.

DeepSpeed 0.19 reads some of its sections into pydantic models, which refuse what they do not know, and asks plain
mappings for the rest, by name and with a default. So its reader is given mappings that note what they are asked for:
a key that nobody asks for is unknown, and a value is to be of its default's type.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, KeysView
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_mdm.config import field_types
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import flatten
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import OWNED_DEEPSPEED_KEYS
from megatron_mdm.engine.deepspeed_config import deepspeed_config
from megatron_mdm.parallel import platform

# Types of keys that have no default, or one that is no value of theirs.
_TYPES: dict[str, type] = {
    "steps_per_print": int,
    "vocabulary_size": int,
    "log_level": str,
    "communication_data_type": str,
    "seq_parallel_communication_data_type": str,
    "activation_checkpointing.number_checkpoints": int,
    "flops_profiler.output_file": str,
    "data_types.param_dtype": str,
    "data_types.buffer_dtype": str,
    "data_types.keep_in_fp32_modules": object,
}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a section",
}


def check_deepspeed_section(config: RunConfig) -> None:
    """Raise UserError naming the first key that DeepSpeed does not know, or cannot read. Imports DeepSpeed only where
    the section has keys."""
    if not config.deepspeed:
        return
    for key, value in flatten(config.deepspeed):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"'deepspeed.{key}': expected a finite number, got {value!r}")
    platform.quiet_libraries()
    from deepspeed.runtime.config import DeepSpeedConfig

    one_replica = config.parallel.tensor * config.parallel.pipeline
    noted = _Noted(deepspeed_config(config, one_replica), [])
    try:
        DeepSpeedConfig(noted)
    except ValidationError as error:
        raise UserError(_describe(error, config.deepspeed, noted.order[-1])) from None
    except Exception as error:  # whatever a value of a wrong type leads to
        _check(config.deepspeed, noted, is_complete=False)
        key = noted.order[-1]
        reason = " ".join(str(error).split())
        value = f".{key}': DeepSpeed cannot read {config.deepspeed[key]!r}" if key in config.deepspeed else "'"
        raise UserError(f"'deepspeed{value} ({reason})") from None
    _check(config.deepspeed, noted, is_complete=True)


class _Noted(dict[str, Any]):
    """A mapping that notes which keys it is asked for, with which default, and whether a model takes it as a whole."""

    def __init__(self, values: dict[str, Any], order: list[str]) -> None:
        super().__init__(
            {key: _Noted(value, []) if isinstance(value, dict) else value for key, value in values.items()}
        )
        self.asked: dict[str, Any] = {}
        self.order = order  # of the questions
        self.is_taken = False

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.is_taken = True
        return super().__iter__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)

    def _note(self, key: str, default: Any = None) -> None:
        self.order.append(key)
        if self.asked.get(key) is None:
            self.asked[key] = default


def _check(section: dict[str, Any], noted: _Noted, is_complete: bool, prefix: str = "") -> None:
    """Raise UserError where a value is not of its default's type; if is_complete, also for a key that is not known."""
    for key, value in section.items():
        name = f"{prefix}{key}"
        if key not in noted.asked:
            if is_complete and noted.asked and not noted.is_taken:
                raise UserError(_unknown(name, list(noted.asked)))
            continue
        expected = _TYPES.get(name, type(noted.asked[key]))
        if not _is_a(value, expected):
            raise UserError(f"'deepspeed.{name}': expected {_NAMES[expected]}, got {value!r}")
        inner = dict.get(noted, key)
        if isinstance(value, dict) and isinstance(inner, _Noted):
            _check(value, inner, is_complete, f"{name}.")


def _is_a(value: Any, expected: type) -> bool:
    """Whether a value is of a type; of those that no default is known of, any is."""
    if expected not in _NAMES or value == "auto":
        return True
    if isinstance(value, bool):
        return expected is bool
    if expected is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, int | float if expected is float else expected)


def _describe(error: ValidationError, section: dict[str, Any], last: str) -> str:
    """The first problem of a ValidationError of one of DeepSpeed's models, which was read from the key `last`."""
    detail = error.errors()[0]
    parts = [str(part) for part in detail["loc"]]
    named = parts if parts and parts[0] in section else [last, *parts]
    key = ".".join(named)
    if detail["type"] == "extra_forbidden":
        model: Any = next((model for model in _models() if model.__name__ == error.title), Any)
        for part in parts[:-1]:
            model = field_types.of_key(model, part)
        return _unknown(key, field_types.keys(model))
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"'deepspeed.{key}': {message[0].lower()}{message[1:]}, got {detail['input']!r}"


def _models() -> Iterator[type[BaseModel]]:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models = [DeepSpeedConfigModel]
    while models:
        model = models.pop()
        yield model
        models.extend(model.__subclasses__())


def _unknown(key: str, known: list[str]) -> str:
    *section, last = key.split(".")
    free = [name for name in known if ".".join([*section, name]) not in OWNED_DEEPSPEED_KEYS]
    near = difflib.get_close_matches(last, free, n=1, cutoff=0.0)
    nearest = f"; the nearest that it knows is '{'.'.join(['deepspeed', *section, *near])}'" if near else ""
    return f"'deepspeed.{key}': DeepSpeed {version('deepspeed')} has no such key{nearest}"
