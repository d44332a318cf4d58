"""How long a step takes: FLOPs at a sustained rate, collectives at the links' rates, nothing overlapped.

What is assumed is in ASSUMPTIONS; a plan prints it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.communication import (
    MicroBatchShape,
    Stage,
    Volume,
    passing_communication,
    stages,
    step_communication,
)
from megatron_mdm.engine.deepspeed_config import zero_stage
from megatron_mdm.models.costs import layer_costs, training_costs
from megatron_mdm.parallel.layout import Layout
from megatron_mdm.training.plan.cluster import Cluster

ASSUMPTIONS = (
    "a layer's operations reach the cluster's 'efficiency' of the peak; collectives 'link_efficiency' of the links",
    "a layer's forward and backward pass take no less than 'layer_ms', however few the tokens",
    "communication and computation do not overlap (but DeepSpeed overlaps some of it, on GPUs with ZeRO 3)",
    "collectives are rings; a group that leaves a node runs at the rate between nodes",
    "a backward pass takes twice a forward pass, beside adapters about once",
    "half of the eligible positions are masked; of autoregressive runs, all are scored",
    "samples have the mean length given, and micro-batches are cut without waste",
    "data loading, validation's decoding and the host's own work cost nothing",
    "of reinforcement learning, completions are of full length, none ends early, and rewards are not counted",
)
# Bytes that a ring moves over a link, per byte of the whole tensor, in a group of n.
_RING = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
    "broadcast": lambda n: 1.0,
}


AXES = ("tensor", "data", "pipeline")  # that communicate
FORWARD_SHARE = 1 / 3  # of a host's time to start the kernels of a layer, forward and backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float  # the slowest stage's, of all micro-batches
    tensor: float  # its tensor-parallel collectives
    pipeline: float  # messages between stages
    bubble: float  # waiting for the pipeline to fill and drain
    data: float  # gradients and parameters over the data-parallel ranks
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.pipeline + self.bubble + self.data + self.optimizer


def forward_flops(config: RunConfig, stage: Stage, micro_batch: MicroBatchShape) -> float:
    """Forward FLOPs of a stage, all tensor-parallel ranks together."""
    _, block, *_ = layer_costs(config.model, micro_batch.length)
    head = 2.0 * config.model.hidden_size * int(config.model.vocab_size) * micro_batch.selected
    return stage.num_blocks * block * micro_batch.rows * micro_batch.length + stage.head * head


def step_flops(config: RunConfig, micro_batch: MicroBatchShape, num_micro_batches: int, layout: Layout) -> float:
    """FLOPs of the whole job in one step, without what is computed again: what MFU counts."""
    passes = sum(passes_flops(config, stage, micro_batch) for stage in stages(config))
    return passes * num_micro_batches * layout.data


def passes_flops(config: RunConfig, stage: Stage, micro_batch: MicroBatchShape) -> float:
    """FLOPs of a stage's forward and backward passes, all tensor-parallel ranks together."""
    block, head = training_costs(config.model, micro_batch.length)
    return stage.num_blocks * block * micro_batch.rows * micro_batch.length + stage.head * head * micro_batch.selected


def recomputed_flops(config: RunConfig, stage: Stage, micro_batch: MicroBatchShape) -> float:
    """FLOPs of a stage's recomputation for one micro-batch."""
    recompute = config.parallel.recompute
    if recompute == "full":
        return forward_flops(config, Stage(stage.num_recomputed(config), False, False), micro_batch)
    if recompute == "selective":
        width = config.model.kv_channels * config.model.num_heads
        return stage.num_blocks * 4.0 * micro_batch.length * width * micro_batch.rows * micro_batch.length
    return 0.0


def stage_flops_per_s(config: RunConfig, layout: Layout, cluster: Cluster) -> float:
    """FLOP/s that the tensor-parallel ranks of a stage sustain together."""
    return cluster.flops_per_s() * layout.tensor * (cluster.fp32_share if config.precision.dtype == "fp32" else 1.0)


def passing_seconds(
    config: RunConfig,
    layout: Layout,
    cluster: Cluster,
    micro_batch: MicroBatchShape,
    num_micro_batches: int,
    width: int = 0,
) -> float:
    """Seconds of passes without gradients. width: of the logits that are asked for; 0: losses of tokens are."""
    rate = stage_flops_per_s(config, layout, cluster)
    slowest = 0.0
    for rank, stage in enumerate(stages(config)):
        volume = passing_communication(config, layout, rank, micro_batch, width)
        seconds = max(
            forward_flops(config, stage, micro_batch) / rate, stage.num_blocks * cluster.layer_ms * FORWARD_SHARE / 1e3
        )
        seconds += sum(communication_seconds(volume, axis, layout, cluster) for axis in AXES)
        slowest = max(slowest, seconds)
    return slowest * (num_micro_batches + layout.pipeline - 1)


def step_time(
    config: RunConfig, layout: Layout, cluster: Cluster, micro_batch: MicroBatchShape, num_micro_batches: int
) -> StepTime:
    rate = stage_flops_per_s(config, layout, cluster)
    shapes = [micro_batch] * num_micro_batches
    compute = 0.0
    tensor = 0.0
    pipeline = 0.0
    data = 0.0
    optimizer = 0.0
    for rank, stage in enumerate(stages(config)):
        passes = passes_flops(config, stage, micro_batch) + recomputed_flops(config, stage, micro_batch)
        volume = step_communication(config, layout, rank, shapes)
        seconds = {axis: communication_seconds(volume, axis, layout, cluster) for axis in AXES}
        busy = num_micro_batches * max(passes / rate, stage.num_blocks * cluster.layer_ms / 1e3)
        if busy + seconds["tensor"] > compute + tensor:
            compute = busy
            tensor = seconds["tensor"]
        pipeline = max(pipeline, seconds["pipeline"])
        data = max(data, seconds["data"])
        optimizer = max(optimizer, _optimizer_seconds(config, stage, layout, cluster))
    waits = (layout.pipeline - 1) / num_micro_batches
    return StepTime(compute, tensor, pipeline, (compute + tensor + pipeline) * waits, data, optimizer)


def communication_seconds(volume: Volume, axis: str, layout: Layout, cluster: Cluster) -> float:
    size = layout.degree(axis)
    rate = cluster.link_bytes_per_s(size * layout.stride(axis))  # of the ranks from the group's first to its last
    return sum(_RING[name](size) * number for (of, name), number in volume.items() if of == axis) / rate


def _optimizer_seconds(config: RunConfig, stage: Stage, layout: Layout, cluster: Cluster) -> float:
    """Seconds to read weights, gradients and moments and write them, all in fp32: 28 bytes per parameter."""
    number = stage.held(config.model, layout.tensor).trained / (layout.data if zero_stage(config) else 1)
    rate = cluster.memory_gbytes_per_s * 1e9
    if config.parallel.offload != "none":
        rate = 50e9 / cluster.gpus_per_node + 1e9  # a host's memory, shared by its GPUs
    return 28.0 * number / rate
