"""Plans as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from megatron_mdm.engine.deepspeed_config import zero_text
from megatron_mdm.generation.settings import GenerationConfig
from megatron_mdm.training.plan.cluster import GIB
from megatron_mdm.training.plan.plan import Plan, by_name
from megatron_mdm.training.plan.rollouts import RolloutTime
from megatron_mdm.training.plan.search import describe_layout
from megatron_mdm.training.plan.timing import ASSUMPTIONS


def plan_text(plan: Plan) -> str:
    """One plan in full."""
    cluster = plan.cluster
    step = plan.step
    shares = ", ".join(f"{name} {seconds:.2f}" for name, seconds in dataclasses.asdict(step).items() if seconds)
    lines = [
        f"model: {plan.num_parameters / 1e9:.3f} B parameters; {plan.layout}, {zero_text(plan.config)}, "
        f"{plan.config.precision.dtype}; {plan.num_micro_batches} micro-batches a step",
        "",
        "memory per rank, GiB, at its peak:",
        *_memory_lines(plan),
        f"a rank may fill {cluster.usable_bytes / GIB:.1f} GiB: "
        + ("it fits" if plan.is_feasible else f"DOES NOT FIT: {plan.obstacle}"),
        "activations by parallel.recompute: "
        + ", ".join(f"{choice} {size / GIB:.2f}" for choice, size in plan.activations.items()),
        f"on each host, offloaded states and the copy for checkpoints: {plan.host_bytes / GIB:.0f} GiB",
        "",
        "communication per step and rank, GB: " + _communication(plan),
        f"step: {step.total:.2f} s ({shares}); {plan.tokens_per_step / step.total:,.0f} tokens/s; "
        f"{plan.flops_per_step:.2e} FLOPs; MFU {plan.mfu:.1%}; bubble {plan.bubble:.1%}",
    ]
    rows = plan.config.rows_per_sample
    if rows > 1:
        lines.append(f"{rows} rows a sample: a step takes {plan.views_factor:.2f} times one with a single row")
    if plan.calibration[1]:
        least, most = plan.calibration
        share = f", at most {most / plan.step.total:.0f} steps' worth"
        lines.append(f"calibration: {least:.0f} to {most:.0f} s, depending on when it is good enough{share}")
    if plan.rollout:
        lines += _rollout_lines(plan, plan.rollout)
    return "\n".join([*lines, _duration(plan), "", "assumed:", *(f"  - {line}" for line in ASSUMPTIONS)])


def search_text(plans: Sequence[Plan]) -> str:
    """The best layouts, a line each, then the first as overrides."""
    header = ("tensor", "pipeline", "data", "ZeRO", "recompute", "micro", "GiB", "step s", "tokens/s", "MFU", "bubble")
    rows = [header, *(_search_row(plan) for plan in plans)]
    best = plans[0]
    return "\n".join(
        [
            f"{best.num_parameters / 1e9:.3f} B parameters on {best.cluster.world_size} GPUs; a rank may fill "
            f"{best.cluster.usable_bytes / GIB:.1f} GiB",
            *_aligned(rows),
            f"first: {describe_layout(best)}",
            _duration(best),
        ]
    )


def _search_row(plan: Plan) -> tuple[str, ...]:
    parallel = plan.config.parallel
    return (
        f"{parallel.tensor}{' + sequence' * parallel.sequence}",
        str(parallel.pipeline),
        str(plan.layout.data),
        str(parallel.zero),
        parallel.recompute,
        str(plan.config.batch.micro_tokens or plan.config.batch.micro_size),
        f"{plan.fullest.total / GIB:.1f}",
        f"{plan.seconds_per_step:.2f}",
        f"{plan.tokens_per_step / plan.seconds_per_step:,.0f}",
        f"{plan.mfu:.1%}",
        f"{plan.bubble:.1%}",
    )


def _rollout_lines(plan: Plan, rollout: RolloutTime) -> list[str]:
    generation = GenerationConfig.of_rollouts(plan.config)
    parts = {
        "completions": rollout.generation,
        "old values": rollout.old,
        "the reference's": rollout.reference,
        "weights": rollout.weights,
        "updates": rollout.updates,
        "validations": rollout.validation,
    }
    shares = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds)
    shared = math.ceil(rollout.num_completions / plan.layout.data / rollout.num_turns)
    better = ""
    if shared < generation.batch_size:
        better = f"; rl.generation.batch_size {shared} would share the completions out evenly"
    sent = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in by_name(rollout.communication).items())
    return [
        f"rollout: {rollout.num_completions} completions, a rank's in {rollout.num_turns} × {generation.batch_size} of "
        f"at most {rollout.num_passes} passes; {rollout.num_updates} updates; {rollout.total:.1f} s beside rewards "
        f"({shares}){better}",
        f"communication of a rollout's passes without gradients, GB: {sent or 'none'}",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    left_out = ["recomputed", "host", "kept_gradients"]
    if not plan.rollout:
        left_out += ["reference", "rollout"]
    kinds = [field.name for field in dataclasses.fields(plan.memory[0]) if field.name not in left_out]
    rows = [("stage", *kinds, "total")]
    for number, memory in enumerate(plan.memory):
        rows.append((str(number), *(f"{getattr(memory, kind) / GIB:.2f}" for kind in (*kinds, "total"))))
    return _aligned(rows)


def _communication(plan: Plan) -> str:
    """What the stage that communicates most sends, as text."""
    volume = max(plan.communication, key=lambda volume: sum(volume.values()))
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in volume.items()) or "none"


def _duration(plan: Plan) -> str:
    if math.isnan(plan.days):
        return "total: unknown; give the number of samples or 'schedule.steps'"
    steps = f"{plan.num_steps:,} steps"
    hours = plan.days * 24
    gpu_hours = hours * plan.cluster.world_size
    price = plan.cluster.price_per_gpu_hour * gpu_hours
    cost = f", {price:,.0f} at {plan.cluster.price_per_gpu_hour:g} per GPU hour" if price else ""
    return f"total: {steps} in {plan.days:.2f} days ({hours:.1f} hours, {gpu_hours:,.0f} GPU hours{cost})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
