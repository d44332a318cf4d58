"""The memory of a rank of a run: of its training steps, and of what reinforcement learning does between them."""

from __future__ import annotations

import dataclasses

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import accumulation_steps
from megatron_mdm.engine.communication import MicroBatchShape
from megatron_mdm.engine.memory import (
    RankMemory,
    longest_micro_batch,
    passing_bytes,
    rank_memory,
    token_losses_bytes,
    weights_bytes,
)
from megatron_mdm.generation.memory import decoding_shape, logits_bytes
from megatron_mdm.generation.settings import GenerationConfig
from megatron_mdm.models.kernel_memory import ELEMENT_BYTES, Kernels
from megatron_mdm.models.parameters import padded_vocab_size
from megatron_mdm.parallel.layout import Layout


def run_memory(config: RunConfig, layout: Layout, kernels: Kernels) -> list[RankMemory]:
    """Of a rank of each pipeline stage, at the greatest micro-batches that the configuration allows."""
    shape = longest_micro_batch(config)
    number = accumulation_steps(config, layout.world_size)
    memory = [rank_memory(config, layout, rank, shape, number, kernels) for rank in range(layout.pipeline)]
    if not config.rl.is_used:
        return memory
    return [with_rollouts(each, config, layout, rank, shape, kernels) for rank, each in enumerate(memory)]


def with_rollouts(
    memory: RankMemory, config: RunConfig, layout: Layout, pipeline_rank: int, shape: MicroBatchShape, kernels: Kernels
) -> RankMemory:
    """A rank's memory with what reinforcement learning does without gradients. shape: of its micro-batches."""
    losses = token_losses_bytes(config, layout, pipeline_rank, shape, kernels)
    passes = [losses, _decoding(config, layout, pipeline_rank, kernels)]
    reference = weights_bytes(config, layout, pipeline_rank) if has_reference(config) else 0.0
    on_host = config.rl.reference == "host"
    if reference:
        parallel = config.parallel.model_copy(update={"sequence": False})  # which inference does without
        whole = config.model_copy(update={"parallel": parallel})
        passes.append(token_losses_bytes(whole, layout, pipeline_rank, shape, kernels) + on_host * reference)
    return dataclasses.replace(
        memory,
        rollout=max(passes),
        reference=0.0 if on_host else reference,
        host=memory.host + on_host * reference,
    )


def has_reference(config: RunConfig) -> bool:
    """Whether a second set of weights is held: adapters that began with nothing are switched off for it instead."""
    lora = config.model.lora
    return config.rl.beta > 0 and not (lora.rank and not lora.init_from)


def _decoding(config: RunConfig, layout: Layout, pipeline_rank: int, kernels: Kernels) -> float:
    """Bytes of a denoising step at its peak. Every stage of a pipeline has the logits, and draws."""
    generation = GenerationConfig.of_rollouts(config)
    size = ELEMENT_BYTES[config.precision.dtype]
    logits = logits_bytes(generation, padded_vocab_size(config.model, layout.tensor), size, layout.tensor, kernels)
    shape = decoding_shape(generation, config.data.max_length)
    return passing_bytes(config, layout, pipeline_rank, shape, kernels, logits)
