"""From a reward's name in the configuration to its function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RewardConfig
from megatron_mdm.data.records import reason
from megatron_mdm.rl.rewards.function import Function
from megatron_mdm.rl.rewards.table import REWARDS


def load(reward: RewardConfig, task: str) -> Function:
    """The function that a reward names, with its arguments. task: what functions of our own that take one default to.

    Raises UserError naming what is wrong: the name, the file, the function, an argument.
    """
    if reward.name in REWARDS:
        return _built_in(reward, task)
    source, separator, name = reward.name.rpartition(":")
    if not separator or not source or not name:
        known = ", ".join(REWARDS)
        raise UserError(
            f"'rl.rewards': no reward {reward.name!r}; it must be one of {known}, or package.module:function, or "
            "path/file.py:function"
        )
    module = _file(source, reward.name) if source.endswith(".py") else _module(source, reward.name)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward {reward.name}: {source} has no function '{name}'")
    _check_arguments(reward.name, function, reward.args)
    return partial(function, **reward.args)


def short_name(name: str) -> str:
    """A reward's name in metrics: of a user's function, its own."""
    return name.rpartition(":")[2]


def _built_in(reward: RewardConfig, task: str) -> Function:
    maker = REWARDS[reward.name]
    known = inspect.signature(maker).parameters
    if unknown := [name for name in reward.args if name not in known]:
        allowed = ", ".join(known) or "none"
        raise UserError(f"reward {reward.name}: unknown argument '{unknown[0]}' in 'args'; it takes {allowed}")
    return maker(**{**({"task": task} if "task" in known else {}), **reward.args})


def _file(path: str, name: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"reward {name}: no file {file.absolute()}")
    module_name = f"reward_of_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None  # it has the ending .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name}: {path} cannot be loaded: {reason(error)}") from error
    return module


def _module(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        remedy = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"reward {name}: cannot import {module}: {reason(error)}{remedy}") from error


def _check_arguments(name: str, function: Any, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [argument for argument in arguments if argument not in parameters]
    if unknown and not takes_all:
        raise UserError(f"reward {name}: the function has no parameter '{unknown[0]}', which 'args' names")
    if only := [each.name for each in parameters.values() if each.kind is each.POSITIONAL_ONLY]:
        raise UserError(f"reward {name}: parameter '{only[0]}' is positional-only; all arguments are given by name")
