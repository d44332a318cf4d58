"""Matrix products of the layers in FP8, by Transformer Engine: `model.fp8`. It has never run on a GPU.

Written to the sources of Transformer Engine and megatron-core 0.16, whose TransformerBlock does the same for its own
layers; tests/fp8 holds it to what a stand-in for Transformer Engine records.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.parallel.communicators import ranks_of_stage
from megatron_mdm.parallel.groups import ParallelContext, group_of

_HISTORY = 1024  # largest magnitudes that delayed scaling takes the greatest of: Transformer Engine's default


def fp8_settings(model: ModelConfig) -> dict[str, Any]:
    """megatron-core's configuration of it: E4M3 in forward, E5M2 in backward passes."""
    if not model.fp8:
        return {}
    return {
        "fp8": "hybrid",
        "fp8_recipe": model.fp8,
        "fp8_amax_history_len": _HISTORY,
        "fp8_amax_compute_algo": "max",
    }


def recompute_by(model: ModelConfig) -> Callable[..., Tensor]:
    """Activation checkpointing, (function, its arguments) → its result. Transformer Engine's own runs a layer again
    with the scales that it ran with before. Dropout of adapters draws nothing, so no random state has to be kept."""
    if model.fp8:
        from transformer_engine.pytorch.distributed import checkpoint

        return partial(checkpoint, use_reentrant=False)
    return partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)


class Fp8:
    """FP8 in the training passes of one engine; without `model.fp8` it does nothing. Passes without gradients are left
    in the model's type: they change no amax history, and measure the model as generation runs it."""

    def __init__(self, layers: nn.Module, model: ModelConfig, context: ParallelContext) -> None:
        """layers: those of this rank. Collective over the job."""
        self._layers: list[TransformerLayer] = []
        if model.fp8:
            self._layers = [module for module in layers.modules() if isinstance(module, TransformerLayer)]
            self._group = _amax_group(context)

    def begin_step(self) -> None:
        """Before a step's first forward pass. Each layer keeps FP8 copies of its weights: they are made anew in its
        next pass, and used in the step's other ones."""
        for layer in self._layers:
            layer.set_is_first_microbatch()

    def micro_batch(self) -> AbstractContextManager[None]:
        """Around the forward pass of a micro-batch through all layers here: at its end, the magnitudes that delayed
        scaling has seen are reduced, so it is to be one for all layers, not one for each."""
        if not (self._layers and torch.is_grad_enabled()):
            return nullcontext()
        from transformer_engine.pytorch import fp8_autocast

        recipe = get_fp8_recipe(self._layers[0].config)
        return fp8_autocast(enabled=True, fp8_recipe=recipe, fp8_group=self._group)


def _amax_group(context: ParallelContext) -> dist.ProcessGroup:
    """The ranks that share a stage, by tensor and data parallelism: they scale alike."""
    stages = [group_of(ranks_of_stage(context.layout, stage)) for stage in range(context.layout.pipeline)]
    return stages[context.pipeline_rank]
