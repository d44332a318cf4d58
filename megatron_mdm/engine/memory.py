"""How much memory a rank fills, by kind, from the layout alone: what DeepSpeed 0.19 and the model's stages allocate.

tests/engine/test_memory.py counts the real allocations. The peak is reached either where the last forward pass in
flight meets its backward pass, or, without any activations, in the optimizer's step; or, in reinforcement learning, in
passes without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import accumulation_steps
from megatron_mdm.engine.communication import MicroBatchShape, Stage, stages
from megatron_mdm.engine.deepspeed_config import subsection, zero_stage
from megatron_mdm.models.adapter_rows import targets_of
from megatron_mdm.models.cross_entropy import CHUNKS
from megatron_mdm.models.kernel_memory import ELEMENT_BYTES, FOUR_BIT_BYTES, SAVED, Kernels
from megatron_mdm.models.parameters import EMBEDDING, OUTPUT, Held, padded_vocab_size, parameter_table
from megatron_mdm.parallel.communicators import communicator_bytes
from megatron_mdm.parallel.layout import Layout

# bytes of a parameter's fp32 copy and of Adam's two moments
MASTER = 4
MOMENTS = 8
# DeepSpeed's defaults, which the section `deepspeed.zero_optimization` may change.
REDUCE_BUCKET = 500_000_000  # elements of the buffer that gradients are reduced in, whatever the model's size
ZERO3_LIVE = 1_000_000_000  # parameters that stay gathered at a time


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device of one rank, and of its host."""

    weights: float
    gradients: float
    optimizer: float  # fp32 weights where those of the model are not used as such, and moments
    activations: float  # what the backward passes of all micro-batches in flight keep, and one block that runs again
    recomputed: float  # the part of it that only exists while that block runs again
    logits: float  # of one chunk, with the gradients that the head takes from it
    workspace: float  # temporary tensors of a block's backward pass
    buffers: float  # communication: buckets, gathered parameters, a pipeline's messages
    communicators: float  # NCCL's own buffers
    step: float  # what exists only behind the backward passes: copies for the optimizer, a pipeline's second bucket
    host: float  # offloaded states
    kept_gradients: float  # the part of the gradients that stays between steps
    reference: float = 0.0  # initial weights that reinforcement learning is held to
    rollout: float = 0.0  # the greatest of its passes without gradients: completions, and losses of tokens

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """The peak on the device. Logits and a block's temporary tensors do not exist at the same time."""
        passing = self.activations + max(self.logits, self.workspace)
        training = self.gradients + max(passing, self.step)
        always = self.weights + self.optimizer + self.buffers + self.communicators + self.reference
        return always + max(training, self.kept_gradients + self.rollout)


def longest_micro_batch(config: RunConfig) -> MicroBatchShape:
    """The greatest micro-batch that the configuration allows: every row of full length, every position masked; of
    reinforcement learning, every one of a completion."""
    rows = config.batch.micro_size * config.rows_per_sample
    tokens = config.batch.micro_tokens or rows * config.data.max_length
    selected = tokens
    if config.rl.is_used and not config.batch.micro_tokens:
        selected = min(tokens, rows * config.rl.gen_length)
    if config.batch.mode == "packed" or config.batch.micro_tokens:
        return MicroBatchShape(1, tokens, selected)
    return MicroBatchShape(rows, config.data.max_length, selected)


def fullest_stage(config: RunConfig, layout: Layout, kernels: Kernels) -> RankMemory:
    """The memory of a rank of the pipeline stage that takes most, at the greatest micro-batches."""
    shape = longest_micro_batch(config)
    number = accumulation_steps(config, layout.world_size)
    ranks = range(layout.pipeline)
    return max(
        (rank_memory(config, layout, rank, shape, number, kernels) for rank in ranks), key=lambda memory: memory.total
    )


def rank_memory(
    config: RunConfig,
    layout: Layout,
    pipeline_rank: int,
    micro_batch: MicroBatchShape,
    num_micro_batches: int,
    kernels: Kernels,
) -> RankMemory:
    """The memory of one rank of a pipeline stage that trains on micro-batches of this shape."""
    stage = stages(config)[pipeline_rank]
    parameters = stage.held(config.model, layout.tensor)
    in_flight = min(layout.pipeline - pipeline_rank, num_micro_batches)
    states, host = _states(config, layout, parameters)
    bucket = _bucket(config, parameters.trained, kernels)
    if layout.pipeline > 1:  # DeepSpeed allocates a second one where it reduces, behind all backward passes
        states["step"] = max(states["step"], bucket)
    saved = SAVED[kernels]
    block = saved.block(config, micro_batch)
    kept = [saved.kept(config, micro_batch, stage.first_block + index) for index in range(stage.num_blocks)]
    # While a block runs again, those behind it have been released.
    running = [sum(kept[:index]) + block for index in range(stage.num_blocks)]
    recomputed = max(0.0, max(running, default=0.0) - sum(kept)) if config.parallel.recompute == "full" else 0.0
    rotary = saved.rotary(config, micro_batch) if stage.num_blocks else 0.0
    activations = in_flight * (sum(kept) + rotary + stage.embedding * 8 * micro_batch.rows * micro_batch.length)
    head, chunk = _head(config, layout, micro_batch, kernels) if stage.head else (0.0, 0.0)
    return RankMemory(
        **states,
        activations=activations + in_flight * head + recomputed,
        recomputed=recomputed,
        logits=chunk,
        workspace=saved.workspace(config, micro_batch) if stage.num_blocks else 0.0,
        buffers=bucket * _buckets_in_turn(config, layout)
        + _buffers(config, layout, stage, parameters.total, micro_batch, in_flight),
        communicators=communicator_bytes(layout, pipeline_rank, config.model.tie_embeddings, bool(config.model.fp8))
        if kernels == "cuda"
        else 0.0,
        host=host,
    )


def token_losses_bytes(
    config: RunConfig, layout: Layout, pipeline_rank: int, micro_batch: MicroBatchShape, kernels: Kernels
) -> float:
    """Bytes that Forward.token_losses fills at its peak, beside the weights."""
    stage = stages(config)[pipeline_rank]
    size = ELEMENT_BYTES[config.precision.dtype]
    hidden = config.model.hidden_size * size
    head = 0.0
    if stage.head:
        vocabulary = padded_vocab_size(config.model, layout.tensor) // layout.tensor
        rows = min(micro_batch.selected, CHUNKS[kernels].rows(micro_batch.selected, vocabulary))
        product = size if kernels == "cpu" and size < 4 else 0  # which a CPU rounds before it is in float32
        head = micro_batch.rows * micro_batch.length * hidden + micro_batch.selected * (hidden + 8 + 12)
        head += rows * vocabulary * (4 + product)
        head += vocabulary * hidden * ("head" in targets_of(config.model))  # the matrix with its adapter
    return passing_bytes(config, layout, pipeline_rank, micro_batch, kernels, head)


def passing_bytes(
    config: RunConfig,
    layout: Layout,
    pipeline_rank: int,
    micro_batch: MicroBatchShape,
    kernels: Kernels,
    answer: float,
) -> float:
    """Bytes of a pass without gradients at its peak: a block's tensors, or what the answer takes behind the last one;
    beside the inputs (tokens, labels, what is selected)."""
    stage = stages(config)[pipeline_rank]
    saved = SAVED[kernels]
    block = saved.passing(config, micro_batch) + saved.rotary(config, micro_batch) if stage.num_blocks else 0.0
    inputs = 21 * micro_batch.rows * micro_batch.length
    message = 0.0
    if layout.pipeline > 1:  # which is received, or sent
        message = micro_batch.rows * micro_batch.length * config.model.hidden_size
        message *= ELEMENT_BYTES[config.precision.dtype] / (layout.tensor if config.parallel.sequence else 1)
    return inputs + message + max(block, answer)


def weights_bytes(config: RunConfig, layout: Layout, pipeline_rank: int) -> float:
    """Bytes of a stage's weights on a tensor-parallel rank, in the type that is computed in, whole."""
    held = stages(config)[pipeline_rank].held(config.model, layout.tensor)
    size = ELEMENT_BYTES[config.precision.dtype]
    return size * (held.total - held.four_bit) + FOUR_BIT_BYTES * held.four_bit


def _states(config: RunConfig, layout: Layout, parameters: Held) -> tuple[dict[str, float], float]:
    """(bytes by kind, bytes on the host) of a tensor-parallel rank's parameters. What is frozen is weights only."""
    number = parameters.trained
    size = ELEMENT_BYTES[config.precision.dtype]
    zero = zero_stage(config)
    data = layout.data
    weights = size * (parameters.total - parameters.four_bit) + FOUR_BIT_BYTES * parameters.four_bit
    accumulated = 4 if config.precision.gradients == "fp32" else size
    if zero == 0:  # in fp32, where torch's own optimizer updates the model's weights
        states = {"weights": weights, "gradients": size * number, "optimizer": MOMENTS * number}
        return {**states, "step": 0.0, "kept_gradients": 0.0}, 0.0
    weights /= data if zero == 3 else 1
    # ZeRO 1 sums whole gradients over the micro-batches; in fp32 beside those of the current one, unless DeepSpeed's
    # BF16_Optimizer adds each as soon as it is there and steps on the sum itself.
    gradients = float(accumulated * number / (data if zero > 1 else 1))
    in_two_types = zero == 1 and accumulated > size
    at_once = in_two_types and config.precision.dtype == "bf16" and config.parallel.offload == "none"
    if in_two_types and not at_once:
        gradients += size * number
    optimizer = (MASTER + MOMENTS) * number / data
    step = 0.0 if size == 4 or at_once else MASTER * number / data
    host = 0.0
    if config.parallel.offload != "none":
        host = optimizer + (gradients if zero > 1 else 0.0)
        optimizer = 0.0
        gradients = 0.0 if zero > 1 else gradients
        step = 0.0
    if config.parallel.offload == "all":
        host = host + weights
        weights = 0.0
    # Only ZeRO 3 and BF16_Optimizer keep their memory; the others free gradients behind the optimizer's step.
    kept = gradients if zero == 3 or at_once else 0.0
    states = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "step": step, "kept_gradients": kept}
    return states, host


def _head(config: RunConfig, layout: Layout, micro_batch: MicroBatchShape, kernels: Kernels) -> tuple[float, float]:
    """(bytes that the norm of the selected rows keeps, bytes beside them at most: while a chunk's logits exist, or when
    the head's gradient is rounded to its type)."""
    size = ELEMENT_BYTES[config.precision.dtype]
    hidden = config.model.hidden_size
    vocabulary = padded_vocab_size(config.model, layout.tensor) // layout.tensor
    adapted = "head" in targets_of(config.model)
    trained = parameter_table(config.model)[EMBEDDING if config.model.tie_embeddings else OUTPUT].trained or adapted
    head = vocabulary * hidden * 4 * trained  # its gradient's sum
    rounded = vocabulary * hidden * (0 if size == 4 else size) * trained
    gradients = head + micro_batch.selected * hidden * size
    kept = micro_batch.selected * (8 + 4 + hidden * size)
    rows = min(micro_batch.selected, CHUNKS[kernels].rows(micro_batch.selected, vocabulary))
    chunk = rows * vocabulary * (4 if size == 4 else 4 + size)
    kept += vocabulary * hidden * size * adapted  # the matrix with its adapter
    return kept, gradients + max(chunk, rounded) + micro_batch.selected * hidden * size  # the normed rows


def _bucket(config: RunConfig, number: int, kernels: Kernels) -> float:
    """Bytes of one of ZeRO's buckets: allocated whole, although on a CPU what is never written to takes no memory."""
    if zero_stage(config) == 0:
        return 0.0
    elements = _zero_elements(config, "reduce_bucket_size", REDUCE_BUCKET)
    if kernels == "cpu":
        elements = min(elements, number)
    return ELEMENT_BYTES[config.precision.dtype] * elements


def _buckets_in_turn(config: RunConfig, layout: Layout) -> int:
    """Buckets beside the backward pass: one is filled while the other is reduced. ZeRO 3 does with one, and DeepSpeed
    overlaps nothing in a pipeline."""
    overlaps = subsection(config, "zero_optimization").get("overlap_comm", "auto") not in (False, "auto")
    return 2 if overlaps and zero_stage(config) < 3 and layout.pipeline == 1 else 1


def _zero_elements(config: RunConfig, key: str, default: int) -> int:
    """A setting of the section `deepspeed.zero_optimization`, which DeepSpeed has read (deepspeed_section.py)."""
    value = subsection(config, "zero_optimization").get(key, "auto")
    return default if value == "auto" else int(value)


def _buffers(
    config: RunConfig, layout: Layout, stage: Stage, number: int, micro_batch: MicroBatchShape, in_flight: int
) -> float:
    size = ELEMENT_BYTES[config.precision.dtype]
    buffers = 0.0
    if zero_stage(config) == 3:
        buffers += size * min(number, _zero_elements(config, "stage3_max_live_parameters", ZERO3_LIVE))
    hidden = micro_batch.rows * micro_batch.length * config.model.hidden_size * size
    if config.parallel.sequence:
        buffers += hidden  # megatron-core keeps what a column-parallel matrix gathers
    if layout.pipeline > 1:  # received and sent activations of each micro-batch in flight, and their gradients
        each = hidden / (layout.tensor if config.parallel.sequence else 1)
        buffers += each * ((in_flight + 1) * (not stage.head) + 2 * max(2, in_flight) * (not stage.embedding))
    return buffers
