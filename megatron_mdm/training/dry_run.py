"""What a run would be: layout, batch arithmetic and memory, without starting it."""

from __future__ import annotations

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import accumulation_steps
from megatron_mdm.engine.communication import Stage
from megatron_mdm.engine.memory import RankMemory, fullest_stage
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.layout import Layout

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def memory_estimate(config: RunConfig, layout: Layout) -> RankMemory:
    """Of a rank of the fullest stage, on the device of this process, at the longest micro-batches."""
    return fullest_stage(config, layout, "cuda" if platform.is_cuda() else "cpu")


def describe(config: RunConfig, world_size: int, num_steps: int) -> str:
    layout = Layout.of(world_size, config.parallel)
    batch, rows = config.batch, config.diffusion.rows_per_sample
    accumulation = accumulation_steps(config, world_size)
    memory, model = memory_estimate(config, layout), config.model
    number = Stage(model.num_layers, embedding=True, head=True).num_parameters(model, 1)
    parts = ", ".join(f"{kind} {getattr(memory, kind) / GIB:.2f}" for kind in KINDS)
    cut = f"{batch.micro_size} × {layout.data} ranks × {accumulation} micro-batches"
    if batch.micro_tokens:
        cut = f"{layout.data} ranks × at most {accumulation} micro-batches of {batch.micro_tokens} tokens"
    return "\n".join(
        [
            f"layout: {layout}, ZeRO {config.parallel.zero}, {config.precision.dtype}",
            f"model: {number / 1e6:.2f} M parameters, vocabulary {config.model.vocab_size}",
            f"batch: {batch.global_size} samples a step = {cut}, "
            f"{rows} row{'s' * (rows > 1)} each; {num_steps} steps, {batch.mode}",
            f"method: {objective_of(config).description.text}",
            f"memory per rank, GiB (estimate): {memory.total / GIB:.2f} = {parts}{_too_much(memory)}",
        ]
    )


def _too_much(memory: RankMemory) -> str:
    """A CPU's free memory says little about what a run may take, so only a GPU's is compared."""
    if not platform.is_cuda() or memory.total < platform.memory_bytes():
        return ""
    return f"; MORE THAN THIS GPU'S {platform.memory_bytes() / GIB:.1f} (tools/plan.py --search finds what fits)"
