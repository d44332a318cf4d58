"""How many bytes a rank hands to each collective in one optimizer step, from the layout alone.

Sizes are those of the whole tensor: the reduced one, the gathered one, the one before scattering, the one sent. What a
link carries follows by the algorithm (a ring all-reduce of B bytes moves 2 (n − 1)/n · B). Traffic of a few bytes per
step (gradient norms, losses) is left out. tests/engine/test_communication.py counts the real thing.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.engine.deepspeed_config import zero_stage
from megatron_mdm.models.adapter_rows import SPLIT_BY_COLUMNS, TABLES, targets_of
from megatron_mdm.models.costs import layer_costs
from megatron_mdm.models.kernel_memory import ELEMENT_BYTES
from megatron_mdm.models.parameters import Held, held
from megatron_mdm.parallel.layout import Layout, partition

# DeepSpeed's default stage3_max_reuse_distance: a stage of fewer parameters stays gathered from forward to backward.
ZERO3_REUSE_DISTANCE = 10**9

Volume = Counter[tuple[str, str]]  # (axis: data, tensor or pipeline; collective) → bytes


@dataclass(frozen=True)
class MicroBatchShape:
    """A micro-batch of one data-parallel rank."""

    rows: int
    length: int
    selected: int  # positions that reach the vocabulary


@dataclass(frozen=True)
class Stage:
    """What a pipeline rank holds."""

    num_blocks: int
    embedding: bool
    head: bool
    first_block: int = 0  # its number in the whole model

    def num_recomputed(self, config: RunConfig) -> int:
        """Blocks that run again as a whole in the backward pass."""
        if config.parallel.recompute != "full":
            return 0
        blocks = range(self.first_block, self.first_block + self.num_blocks)
        return sum(block % config.parallel.recompute_interval == 0 for block in blocks)

    def num_parameters(self, model: ModelConfig, tensor: int) -> int:
        """The number of parameters on one tensor-parallel rank."""
        return self.held(model, tensor).total

    def held(self, model: ModelConfig, tensor: int) -> Held:
        """Parameters on one tensor-parallel rank."""
        first = 0 if self.embedding else self.first_block + 1
        last = self.first_block + self.num_blocks + self.head  # layers count from 0, the embedding
        return held(model, range(first, last + 1), tensor)


def stages(config: RunConfig) -> list[Stage]:
    """The pipeline's stages, first to last."""
    costs = layer_costs(config.model, config.data.max_length)
    bounds = _bounds(tuple(costs), config.parallel.pipeline)
    last = len(costs) - 1
    return [
        Stage(min(stop, last) - max(start, 1), start == 0, stop == last + 1, max(start, 1) - 1)
        for start, stop in itertools.pairwise(bounds)
    ]


@functools.lru_cache(maxsize=256)
def _bounds(costs: tuple[float, ...], num_stages: int) -> list[int]:
    """The stages' bounds in the list of layers; kept, since planning asks for the same again and again."""
    return partition(costs, num_stages)


def step_communication(
    config: RunConfig, layout: Layout, pipeline_rank: int, micro_batches: Sequence[MicroBatchShape]
) -> Volume:
    """Bytes by (axis, collective) of one rank of a pipeline stage in one optimizer step."""
    stage = stages(config)[pipeline_rank]
    volume = Counter[tuple[str, str]]()
    if layout.data > 1:
        volume.update(_data_parallel(config, stage, len(micro_batches)))
    if layout.tensor > 1:
        for micro_batch in micro_batches:
            volume.update(_tensor_parallel(config, stage, micro_batch))
    if layout.pipeline > 1:
        for micro_batch in micro_batches:
            hidden = _hidden_bytes(config, micro_batch) // (layout.tensor if config.parallel.sequence else 1)
            # Activations to the next stage, their gradients to the one before.
            volume["pipeline", "send"] += hidden * ((not stage.head) + (not stage.embedding))
    return +volume


def passing_communication(
    config: RunConfig, layout: Layout, pipeline_rank: int, micro_batch: MicroBatchShape, width: int
) -> Volume:
    """Bytes by (axis, collective) of one rank of a pipeline stage in a pass without gradients. width: of the logits
    that are asked for, V or fewer; 0: losses of tokens are."""
    stage = stages(config)[pipeline_rank]
    hidden = _hidden_bytes(config, micro_batch)
    size = ELEMENT_BYTES[config.precision.dtype]
    selected = micro_batch.selected
    volume = Counter[tuple[str, str]]()
    if layout.data > 1 and zero_stage(config) == 3:
        whole = stage.held(config.model, layout.tensor).total
        # A smaller stage, once gathered, stays so until the weights change: passes one after another gather nothing.
        volume["data", "all_gather"] += size * whole * (whole >= ZERO3_REUSE_DISTANCE)
    if layout.tensor > 1:
        reductions = hidden * (2 * stage.num_blocks + stage.embedding)
        if config.parallel.sequence:
            volume["tensor", "all_gather"] += hidden * (2 * stage.num_blocks + stage.head)
            volume["tensor", "reduce_scatter"] += reductions
        else:
            volume["tensor", "all_reduce"] += reductions
        volume.update(_of_adapters(config, stage, micro_batch, 0, has_backward=False))
        if stage.head and width:
            volume["tensor", "all_gather"] += selected * width * size
        elif stage.head:
            volume["tensor", "all_reduce"] += selected * 12
    if layout.pipeline > 1:
        shared = layout.tensor if config.parallel.sequence else 1
        volume["pipeline", "send"] += (not stage.head) * hidden // shared
        answer = selected * width * size if width else 4 * micro_batch.rows * micro_batch.length
        volume["pipeline", "broadcast"] += answer
    return +volume


def _data_parallel(config: RunConfig, stage: Stage, num_micro_batches: int) -> Volume:
    """Gradients and parameters over the data-parallel ranks, as DeepSpeed 0.19 exchanges them."""
    parameters = stage.held(config.model, config.parallel.tensor)
    size = parameters.trained * ELEMENT_BYTES[config.precision.dtype]
    whole = parameters.total * ELEMENT_BYTES[config.precision.dtype]  # ZeRO 3 gathers what is frozen, too
    zero = zero_stage(config)
    if zero == 0:
        return Counter({("data", "all_reduce"): size})
    if zero == 1:  # it reduces whole buckets on every rank and keeps its part
        return Counter({("data", "all_reduce"): size, ("data", "all_gather"): size})
    if zero == 2:  # likewise, after every micro-batch
        return Counter({("data", "all_reduce"): size * num_micro_batches, ("data", "all_gather"): size})
    gathers = 1 if parameters.total < ZERO3_REUSE_DISTANCE else 2
    if config.parallel.recompute == "full":
        gathers = 2
    return Counter(
        {
            ("data", "all_gather"): whole * gathers * num_micro_batches,
            ("data", "reduce_scatter"): size * num_micro_batches,
        }
    )


def _tensor_parallel(config: RunConfig, stage: Stage, micro_batch: MicroBatchShape) -> Volume:
    """Activations over the tensor-parallel ranks: two pairs of operations per block and direction."""
    hidden = _hidden_bytes(config, micro_batch)
    blocks = stage.num_blocks
    in_parts = stage.held(config.model, config.parallel.tensor).in_parts  # whose gradients are summed
    recomputed = stage.num_recomputed(config)  # their forward operations once more, but for each block's last
    targets = targets_of(config.model)
    frozen = bool(targets)
    again = 1 + ("down" in targets)  # forward reductions of a recomputed block: the last one, too, for its adapter
    # Tokens that are looked up in a frozen table have no gradient: the first matrix hands none on.
    stops = frozen and stage.embedding and "embedding" not in targets
    volume: Volume = Counter()
    if config.parallel.sequence:
        # A block gathers twice going forward and scatters twice; going back the reverse, and its two column-parallel
        # matrices gather their inputs once more for the weights' gradients.
        gathers = (4 if frozen else 6) * blocks + 2 * recomputed + (stage.embedding and not frozen) + stage.head
        volume["tensor", "all_gather"] += hidden * gathers
        volume["tensor", "reduce_scatter"] += hidden * (4 * blocks + again * recomputed + stage.embedding - stops)
        volume["tensor", "all_reduce"] += in_parts["sequence"] * ELEMENT_BYTES[config.precision.dtype]
    else:
        volume["tensor", "all_reduce"] += hidden * (4 * blocks + again * recomputed + stage.embedding - stops)
    volume.update(_of_adapters(config, stage, micro_batch, recomputed))
    volume["tensor", "all_reduce"] += in_parts["always"] * ELEMENT_BYTES[config.precision.dtype]
    if stage.head:  # rows' gradients; maxima, normalisers and label logits in fp32
        row = config.model.hidden_size * ELEMENT_BYTES[config.precision.dtype] + 12
        volume["tensor", "all_reduce"] += micro_batch.selected * row
    return volume


def _of_adapters(
    config: RunConfig, stage: Stage, micro_batch: MicroBatchShape, recomputed: int, has_backward: bool = True
) -> Volume:
    """What travels for adapters: A·x, and its gradient."""
    volume: Volume = Counter()
    targets = targets_of(config.model)
    low = config.model.lora.rank * _hidden_bytes(config, micro_batch) // config.model.hidden_size  # of one adapter
    num_columns = sum(part in targets for part in SPLIT_BY_COLUMNS)  # matrices that are split by columns
    num_rows = len(targets - TABLES.keys()) - num_columns
    forward = {"by_rows": num_rows * (stage.num_blocks + recomputed)}
    forward["by_columns"] = num_columns * (stage.num_blocks + recomputed) + (stage.embedding and "embedding" in targets)
    backward = {"by_rows": num_rows * stage.num_blocks}
    backward["by_columns"] = num_columns * stage.num_blocks + (stage.embedding and "embedding" in targets)
    if not has_backward:
        backward = dict.fromkeys(backward, 0)
    if config.parallel.sequence:
        volume["tensor", "all_gather"] += low * (forward["by_rows"] + backward["by_columns"])
        volume["tensor", "reduce_scatter"] += low * (forward["by_columns"] + backward["by_rows"])
    else:
        volume["tensor", "all_reduce"] += low * (forward["by_columns"] + backward["by_rows"])
    return volume


def _hidden_bytes(config: RunConfig, micro_batch: MicroBatchShape) -> int:
    """Bytes of one [S, R, H] tensor; sequence parallelism pads S to a multiple of the tensor-parallel degree."""
    length = micro_batch.length
    if config.parallel.sequence:
        length += -length % config.parallel.tensor
    return micro_batch.rows * length * config.model.hidden_size * ELEMENT_BYTES[config.precision.dtype]
