"""Parameters that code outside the package adds to the model, and those that it freezes: adapters, experts.

Register an extension, `EXTENSIONS["mine"] = Extension(…)`, and name it in the model section, `extensions: {mine: {…}}`.
The keys in there are its own. models/README.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig

if TYPE_CHECKING:
    from megatron_mdm.models.naming import Layer
    from megatron_mdm.models.rows import Parameter


def _leave(*_: Any) -> None:
    """A hook of an extension that attaches nothing."""


@dataclass(frozen=True)
class Extension:
    """table: (rows so far, model section) → rows: further ones, others replaced, such as by `trained=False`.

    attach: (a layer that has just been constructed, its index (0: the embedding), model section, megatron-core's
    configuration): adds the modules, parameters and buffers of the rows that the layer holds, uninitialised. A buffer
    stays in fp32 where the model trains in another type. A module that stands around another says so by its attribute
    `wrapped`, the name of that child, whose parameters then keep their names.
    """

    table: Callable[[dict[str, Parameter], ModelConfig], dict[str, Parameter]]
    attach: Callable[[Layer, int, ModelConfig, Any], None] = _leave


EXTENSIONS: dict[str, Extension] = {}


def extensions_of(model: ModelConfig) -> tuple[Extension, ...]:
    """Those that the model section names, in its order. Raises UserError where no code has registered one."""
    for name in model.extensions:
        if name not in EXTENSIONS:
            known = ", ".join(EXTENSIONS) or "none"
            raise UserError(f"'model.extensions.{name}': no code has registered it (registered: {known})")
    return tuple(EXTENSIONS[name] for name in model.extensions)
