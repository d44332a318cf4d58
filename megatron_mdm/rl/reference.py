"""The weights that the divergence is taken from: those that the run began with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, cast

from torch import Tensor, nn

from megatron_mdm.batch import ModelInputs
from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.base import Engine
from megatron_mdm.engine.inference import DTYPES, InferenceEngine, PipelinedInferenceEngine, build_stage
from megatron_mdm.models.adapters import without_adapters
from megatron_mdm.models.four_bit import quantize_frozen
from megatron_mdm.models.layers import build_model
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext


class TokenLosses(Protocol):
    """What is asked of the weights that train, and of the reference: engine.base.Forward.token_losses."""

    def token_losses(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]: ...


def reference_of(config: RunConfig, engine: Engine, context: ParallelContext) -> TokenLosses | None:
    """None where nothing is held to it. Collective. Raises UserError where model.init_from cannot be read."""
    if config.rl.beta == 0.0:
        return None
    lora = config.model.lora
    if lora.rank and not lora.init_from:  # the run began with adapters that did nothing
        return WithoutAdapters(engine)
    return Kept(_copy(config, context), on_host=config.rl.reference == "host")


class WithoutAdapters:
    """The engine that trains, its adapters switched off."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def token_losses(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]:
        with without_adapters(cast(Any, self.engine).engine.module):
            return self.engine.token_losses(micro_batches)


class Kept:
    """A copy of the initial weights on the layout of the run."""

    def __init__(self, engine: InferenceEngine | PipelinedInferenceEngine, on_host: bool) -> None:
        """on_host: its weights lie on the host but while they are asked."""
        self.engine = engine
        self.module: nn.Module = engine.model if isinstance(engine, InferenceEngine) else engine.layers
        self.on_host = on_host
        if on_host:
            self.module.to("cpu")

    def token_losses(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]:
        if not self.on_host:
            return self.engine.token_losses(micro_batches)
        self.module.to(platform.device())
        try:
            return self.engine.token_losses(micro_batches)
        finally:
            self.module.to("cpu")


def _copy(config: RunConfig, context: ParallelContext) -> InferenceEngine | PipelinedInferenceEngine:
    model = config.model
    parallel = config.parallel.model_copy(update={"sequence": False})
    load = partial(InitialWeights(model).load, context=context, seed=config.seed)
    if context.layout.pipeline > 1:
        stages = build_stage(model, parallel, context, None, config.data.max_length)
        load(stages)
        quantize_frozen(stages, model)
        return PipelinedInferenceEngine(stages, model, config.precision.dtype, context)

    def finish(layer: nn.Module) -> None:
        load(layer)
        quantize_frozen(layer, model)
        layer.to(DTYPES[config.precision.dtype])  # else the whole model would be there in fp32 first

    return InferenceEngine(build_model(model, parallel, context, None, finish), config.precision.dtype)
