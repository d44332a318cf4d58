"""What a run would be: layout, batch arithmetic and memory, without starting it."""

from __future__ import annotations

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import accumulation_steps
from megatron_mdm.engine.communication import Stage
from megatron_mdm.engine.deepspeed_config import zero_text
from megatron_mdm.engine.memory import RankMemory
from megatron_mdm.objectives import objective_of
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.layout import Layout
from megatron_mdm.training.plan.memory import run_memory

GIB = 2**30
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def memory_estimate(config: RunConfig, layout: Layout) -> RankMemory:
    """The memory of a rank of the fullest stage, on the device of this process, at the longest micro-batches."""
    memory = run_memory(config, layout, "cuda" if platform.is_cuda() else "cpu")
    return max(memory, key=lambda stage: stage.total)


def describe(config: RunConfig, world_size: int, num_steps: int) -> str:
    layout = Layout.of(world_size, config.parallel)
    memory = memory_estimate(config, layout)
    model = config.model
    number = Stage(model.num_layers, embedding=True, head=True).num_parameters(model, 1)
    kinds = (*KINDS, *(("reference", "rollout") if config.rl.is_used else ()))
    parts = ", ".join(f"{kind} {getattr(memory, kind) / GIB:.2f}" for kind in kinds)
    return "\n".join(
        [
            _layout_line(config, layout),
            f"model: {number / 1e6:.2f} M parameters, vocabulary {config.model.vocab_size}",
            _batch_line(config, layout, f"{num_steps} steps"),
            *_method_lines(config),
            f"memory per rank, GiB (estimate): {memory.total / GIB:.2f} = {parts}{_too_much(memory)}",
        ]
    )


def describe_without_data(config: RunConfig, world_size: int) -> str:
    """What can be said of a run whose tokenizer and data are not there yet, before any 'auto' has its value."""
    layout = Layout.of(world_size, config.parallel)
    schedule = config.schedule
    model = config.model
    length = f"{schedule.steps} steps" if schedule.steps else f"{schedule.epochs} epochs"
    return "\n".join(
        [
            _layout_line(config, layout),
            f"model: {model.num_layers} layers × {model.hidden_size}, vocabulary {model.vocab_size}",
            _batch_line(config, layout, length),
            *_method_lines(config),
        ]
    )


def _method_lines(config: RunConfig) -> list[str]:
    lines = [f"method: {objective_of(config).description.text}"]
    rl = config.rl
    if rl.is_used:
        num_steps = rl.num_completions // config.batch.global_size * rl.num_iterations
        lines.append(
            f"rollouts: {rl.prompts_per_rollout} prompts × {rl.num_generations} completions of at most {rl.gen_length} "
            f"tokens; {num_steps} step{'s' * (num_steps > 1)} with each"
        )
    return lines


def _layout_line(config: RunConfig, layout: Layout) -> str:
    return f"layout: {layout}, {zero_text(config)}, {config.precision.dtype}"


def _batch_line(config: RunConfig, layout: Layout, length: str) -> str:
    batch = config.batch
    rows = config.rows_per_sample
    accumulation = accumulation_steps(config, layout.world_size)
    cut = f"{batch.micro_size} × {layout.data} ranks × {accumulation} micro-batches"
    if batch.micro_tokens:
        cut = f"{layout.data} ranks × at most {accumulation} micro-batches of {batch.micro_tokens} tokens"
    return (
        f"batch: {batch.global_size} samples a step = {cut}, {rows} row{'s' * (rows > 1)} each; {length}, {batch.mode}"
    )


def _too_much(memory: RankMemory) -> str:
    """A CPU's free memory says little about what a run may take, so only a GPU's is compared."""
    if not platform.is_cuda() or memory.total < platform.memory_bytes():
        return ""
    return f"; MORE THAN THIS GPU'S {platform.memory_bytes() / GIB:.1f} (tools/plan.py --search finds what fits)"
