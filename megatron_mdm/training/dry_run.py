"""What a run would be: layout, batch arithmetic and memory, without starting it."""

from __future__ import annotations

from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.config.validate import accumulation_steps
from megatron_mdm.engine.communication import Stage
from megatron_mdm.models.cross_entropy import CHUNK_ELEMENTS
from megatron_mdm.parallel.layout import Layout

GIB = 2**30


def num_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """Parameters on one tensor-parallel rank, all stages together."""
    return Stage(model.num_layers, embedding=True, head=True).num_parameters(model, tensor)


def memory_estimate(config: RunConfig, layout: Layout) -> dict[str, float]:
    """GiB per rank by kind. Activations assume full length and no recomputation."""
    model, zero = config.model, config.parallel.zero
    parameters = num_parameters(model, layout.tensor)
    size = 2 if config.precision.dtype == "bf16" else 4
    optimizer = 12 if config.precision.dtype == "bf16" else 8  # fp32 moments, and fp32 weights beside bf16 ones
    share = {stage: 1 / layout.data if zero >= stage else 1.0 for stage in (1, 2, 3)}
    per_batch = config.batch.micro_size * config.diffusion.rows_per_sample * config.data.max_length
    places = config.batch.micro_tokens or per_batch
    heads = model.num_heads + 2 * model.num_kv_heads
    split = (2 * heads + model.num_heads) * model.kv_channels + 4 * model.ffn_hidden_size
    per_layer = 5 * model.hidden_size + split / layout.tensor
    return {
        "weights": parameters * size * share[3] / GIB,
        "gradients": parameters * size * share[2] / GIB,
        "optimizer": parameters * optimizer * share[1] / GIB,
        "activations": places * per_layer * model.num_layers * size / GIB,
        "logits": CHUNK_ELEMENTS * (4 + size) / GIB,
    }


def describe(config: RunConfig, world_size: int, num_steps: int) -> str:
    layout = Layout.of(world_size, config.parallel.tensor, config.parallel.pipeline)
    batch, diffusion = config.batch, config.diffusion
    rows = diffusion.rows_per_sample
    accumulation = accumulation_steps(config, world_size)
    memory = memory_estimate(config, layout)
    parts = ", ".join(f"{kind} {value:.2f}" for kind, value in memory.items())
    cut = f"{batch.micro_size} × {layout.data} ranks × {accumulation} micro-batches"
    if batch.micro_tokens:
        cut = f"{layout.data} ranks × at most {accumulation} micro-batches of {batch.micro_tokens} tokens"
    return "\n".join(
        [
            f"layout: {layout}, ZeRO {config.parallel.zero}, {config.precision.dtype}",
            f"model: {num_parameters(config.model) / 1e6:.2f} M parameters, vocabulary {config.model.vocab_size}",
            f"batch: {batch.global_size} samples a step = {cut}, "
            f"{rows} row{'s' * (rows > 1)} each; {num_steps} steps, {batch.mode}",
            "method: autoregressive"
            if diffusion.method == "autoregressive"
            else f"method: t {diffusion.sampler}, strata {diffusion.strata}, masking {diffusion.masking}",
            f"memory per rank, GiB (estimate): {sum(memory.values()):.2f} = {parts}",
        ]
    )
