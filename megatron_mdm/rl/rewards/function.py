"""One reward function: what it is given, and what it may give."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from megatron_mdm.config.errors import UserError
from megatron_mdm.data.columns import WHERE
from megatron_mdm.data.records import reason

# (prompts, completions, **columns) → a number or None a completion: TRL's reward functions
Function = Callable[..., Sequence["float | None"]]

_SHOWN = 60  # characters of a prompt or a value, in a message


class Batch(NamedTuple):
    """Completions to be scored."""

    prompts: list[str]
    completions: list[str]
    columns: Mapping[str, Sequence[Any]]  # of their records, by name
    further: Mapping[str, Sequence[Any]]  # what only a function that names it is given

    def only(self, row: int) -> Batch:
        columns, further = (
            {name: values[row : row + 1] for name, values in part.items()} for part in (self.columns, self.further)
        )
        return Batch(self.prompts[row : row + 1], self.completions[row : row + 1], columns, further)

    def place(self, row: int) -> str:
        """Where a completion's record stands."""
        if self.columns.get(WHERE):
            return str(self.columns[WHERE][row])
        return f"the record of the prompt {self.prompts[row][:_SHOWN]!r}"


def scores(name: str, function: Function, batch: Batch) -> list[float]:
    """What a function gives for every completion; NaN for None. Raises UserError naming it, and the record."""
    arguments = _arguments(name, function, batch)
    try:
        values = function(**arguments)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name}: {_faulty_record(function, batch)}{_said(function, error)}") from error
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple):
        raise UserError(
            f"reward {name}: must return a list with a number or None for each completion, not {type(values).__name__}"
        )
    if len(values) != len(batch.completions):
        raise UserError(f"reward {name}: returned {len(values)} values for {len(batch.completions)} completions")
    return [_number(name, value, batch, row) for row, value in enumerate(values)]


def _arguments(name: str, function: Function, batch: Batch) -> dict[str, Any]:
    """What of the batch the function's signature asks for; all columns where it has a parameter **kwargs. What the
    configuration's `args` give is not asked for."""
    bound = function.keywords if isinstance(function, partial) else {}
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in bound]
    texts = {"prompts": batch.prompts, "completions": batch.completions}
    known = {**batch.columns, **batch.further, **texts}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.name not in known and parameter.default is parameter.empty:
            columns = ", ".join(batch.columns) or "none"
            raise UserError(f"reward {name}: needs the column '{parameter.name}'; the data have {columns}")
    given = {parameter.name: known[parameter.name] for parameter in named if parameter.name in known}
    others = {name: column for name, column in {**batch.columns, **texts}.items() if name not in bound}
    return {**others, **given} if takes_all else given


def _faulty_record(function: Function, batch: Batch) -> str:
    """The first record for which alone the function fails, too; empty where it fails for none."""
    for row in range(len(batch.completions)):
        try:
            function(**_arguments("", function, batch.only(row)))
        except (Exception, SystemExit):
            return f"{batch.place(row)}: "
    return ""


def _said(function: Function, error: BaseException) -> str:
    """An error's message, and the line of a user's file at which it happened."""
    function = function.func if isinstance(function, partial) else function
    code = getattr(function, "__code__", None)
    is_own = str(getattr(function, "__module__", "")).startswith("megatron_mdm.")
    if code is None or is_own:
        return reason(error)
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == code.co_filename]
    return reason(error) + (f" ({code.co_filename}, line {lines[-1]})" if lines else "")


def _number(name: str, value: Any, batch: Batch, row: int) -> float:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    raise UserError(f"reward {name}: {batch.place(row)}: returned {repr(value)[:_SHOWN]}, which is no finite number")
