"""A stand-in for Transformer Engine 2.6, which needs CUDA to be built: what megatron-core's layers use of it, in plain
operations of the model's type, with what matters for FP8 around them.

As the real one, it keeps copies of weights from a step's first micro-batch, takes only dimensions that are multiples of
16, and reduces amax histories where the outermost context ends. It records what it is given.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Pass(NamedTuple):
    """A layer's forward pass."""

    module: int
    is_first: bool | None  # is_first_microbatch
    in_fp8: bool
    context: int  # the number of the context that it was in
    with_gradients: bool
    recomputing: bool
    shape: tuple[int, ...]


class Context(NamedTuple):
    """A context that was opened from outside, not by activation checkpointing."""

    recipe: str
    group: tuple[int, ...]


class State:
    """Of FP8GlobalStateManager, and the record."""

    def __init__(self) -> None:
        self.depth = 0
        self.enabled = False
        self.recipe: Any = None
        self.group: Any = None
        self.recomputing = False
        self.passes: list[Pass] = []
        self.contexts: list[Context] = []
        self.reductions = 0  # of amax histories, at the end of a context


state = State()


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None, **_: Any) -> Iterator[None]:
    before = (state.enabled, state.recipe, state.group)
    state.enabled, state.recipe, state.group = enabled, fp8_recipe, fp8_group
    state.depth += 1
    if not state.recomputing:
        ranks = tuple(torch.distributed.get_process_group_ranks(fp8_group))
        state.contexts.append(Context(type(fp8_recipe).__mro__[-3].__name__, ranks))
    try:
        yield
    finally:
        state.enabled, state.recipe, state.group = before
        state.depth -= 1
        if enabled and state.depth == 0 and torch.is_grad_enabled() and not state.recomputing:
            state.reductions += 1


def checkpoint(function: Callable[..., Any], *arguments: Any, use_reentrant: bool = True, **_: Any) -> Any:
    """Activation checkpointing that runs a function again in the context in which it ran."""
    assert not use_reentrant
    inside = (state.enabled, state.recipe, state.group)

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        state.recomputing = True
        try:
            with fp8_autocast(*inside):
                yield
        finally:
            state.recomputing = False

    return torch.utils.checkpoint.checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), again()),
    )


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        parallel_mode: str | None = None,
        bias: bool = True,
        params_dtype: torch.dtype = torch.float32,
        device: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        self.sequence_parallel = sequence_parallel
        self.tp_group = tp_group
        self.parallel_mode = parallel_mode
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))
        self.bias = nn.Parameter(torch.empty(rows, dtype=params_dtype, device=device)) if bias else None
        self.save_original_input = False  # not that in FP8, for the backward pass
        self._kept: Tensor | None = None  # the weight's copy in FP8
        self._mark(self.weight, 1 if parallel_mode == "row" else 0)
        if self.bias is not None and parallel_mode == "column":
            self._mark(self.bias, 0)

    @staticmethod
    def _mark(tensor: Any, dim: int) -> None:
        tensor.tensor_model_parallel = True
        tensor.partition_dim = dim
        tensor.partition_stride = 1

    def forward(self, inputs: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        enters = {
            True: mappings.gather_from_sequence_parallel_region,
            False: mappings.copy_to_tensor_model_parallel_region,
        }
        leaves = {
            True: mappings.reduce_scatter_to_sequence_parallel_region,
            False: mappings.reduce_from_tensor_model_parallel_region,
        }
        self._record(inputs, is_first_microbatch)
        if self.parallel_mode == "column":
            inputs = enters[self.sequence_parallel](inputs, group=self.tp_group)
        output = inputs @ self._weight(inputs, is_first_microbatch).t()
        if self.parallel_mode == "row":
            output = leaves[self.sequence_parallel](output, group=self.tp_group)
        return output if self.bias is None else output + self.bias

    def _record(self, inputs: Tensor, is_first: bool | None) -> None:
        state.passes.append(
            Pass(
                id(self),
                is_first,
                state.enabled,
                len(state.contexts) - 1,
                torch.is_grad_enabled(),
                state.recomputing,
                tuple(inputs.shape),
            )
        )

    def _weight(self, inputs: Tensor, is_first: bool | None) -> Tensor:
        if not state.enabled:
            return self.weight
        tokens = inputs.shape[:-1].numel()
        for size in (tokens, *self.weight.shape):
            assert not size % 16, (inputs.shape, self.weight.shape)
        if is_first is None:
            return self.weight
        if is_first:
            self._kept = self.weight.detach().clone()
        assert self._kept is not None
        return self.weight + (self._kept - self.weight).detach()


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, device: Any = None, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.rms_norm(inputs, self.weight.shape, self.weight, self.eps)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, eps: float, device: Any = None, **named: Any) -> None:
        super().__init__(in_features, out_features, device=device, **named)
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features, device=device))

    def forward(self, inputs: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        normed = nn.functional.rms_norm(inputs, inputs.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, is_first_microbatch)


class _Recipe:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings


def install() -> None:
    """Before megatron-core is imported. What is not here, megatron-core does without."""
    kinds = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    recipe = {name: type(name, (_Recipe,), {}) for name in kinds}
    unused = {name: type(name, (nn.Module,), {}) for name in ("LayerNorm", "DotProductAttention", "GroupedLinear")}
    layers = {"Linear": Linear, "LayerNormLinear": LayerNormLinear, "RMSNorm": RMSNorm, **unused}
    operations = {name: type(name, (nn.Module,), {}) for name in ("Sequential", "FusibleOperation")}
    manager = SimpleNamespace(is_fp8_enabled=lambda: state.enabled)
    tree: dict[str, dict[str, Any]] = {
        "": {"__version__": "2.6.0"},
        "common": {},
        "common.recipe": {**recipe, "Format": SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID")},
        "pytorch": {**layers, "fp8_autocast": fp8_autocast},
        "pytorch.ops": operations,
        "pytorch.distributed": {
            "checkpoint": checkpoint,
            "CudaRNGStatesTracker": object,
            "activation_recompute_forward": None,
        },
        "pytorch.fp8": {"FP8GlobalStateManager": manager, "fp8_autocast": fp8_autocast},
        "pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
    }
    for path, content in tree.items():
        name = f"transformer_engine.{path}".rstrip(".")
        module: Any = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        module.__dict__.update(content)
        sys.modules[name] = module
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)
