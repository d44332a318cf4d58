"""The plan of one run on one cluster."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import accumulation_steps
from megatron_mdm.engine.communication import MicroBatchShape, Volume, stages, step_communication
from megatron_mdm.engine.memory import RankMemory, longest_micro_batch, rank_memory
from megatron_mdm.models.parameters import checkpoint_bytes
from megatron_mdm.objectives import check_run, objective_of
from megatron_mdm.parallel.layout import Layout
from megatron_mdm.training.plan.cluster import GIB, Cluster
from megatron_mdm.training.plan.memory import run_memory
from megatron_mdm.training.plan.rollouts import RolloutTime, rollout_time
from megatron_mdm.training.plan.timing import ASSUMPTIONS, StepTime, forward_flops, step_flops, step_time

SECONDS_PER_DAY = 86400.0
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Samples:
    """What the data are like; a plan reads none."""

    number: int = 0  # of the training set; 0: unknown
    mean_length: float = 0.0  # tokens; 0: data.max_length
    eligible: float = 0.0  # share of the tokens that are targets; 0: image.num_tokens a sample, or all


@dataclass(frozen=True)
class Plan:
    """Memory in bytes per pipeline stage, time in seconds."""

    config: RunConfig
    layout: Layout
    cluster: Cluster
    memory: list[RankMemory]
    activations: dict[str, float]  # of the fullest stage, by parallel.recompute
    communication: list[dict[str, int]]  # bytes per step of one rank, by "axis collective"
    num_parameters: int
    num_micro_batches: int
    tokens_per_step: float
    flops_per_step: float
    step: StepTime
    views_factor: float  # time of a step, relative to one row per sample
    calibration: tuple[float, float]  # seconds: least and most; zeros without one
    validation: float  # seconds of all validations
    saving: float  # seconds that training waits for checkpoints in all
    num_steps: int  # 0: unknown
    rollout: RolloutTime | None  # of reinforcement learning

    @property
    def seconds_per_step(self) -> float:
        """Of an optimizer step, with its share of a rollout."""
        return self.rollout.total / self.rollout.num_updates if self.rollout else self.step.total

    @property
    def fullest(self) -> RankMemory:
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def host_bytes(self) -> float:
        """Host memory of one node: offloaded states, and the copies that checkpoints are written from."""
        copies = checkpoint_bytes(self.config.model) / self.cluster.nodes
        return max(memory.host for memory in self.memory) * self.cluster.gpus_per_node + copies

    @property
    def is_feasible(self) -> bool:
        return not self.obstacle

    @property
    def obstacle(self) -> str:
        """Why it does not fit; empty: it does."""
        if self.fullest.total > self.cluster.usable_bytes:
            number = self.memory.index(self.fullest)
            need = self.fullest.total / GIB
            have = self.cluster.usable_bytes / GIB
            return f"stage {number} needs {need:.1f} GiB of the {have:.1f} GiB that a rank may fill"
        if self.host_bytes > self.cluster.host_memory_gib * GIB:
            need = self.host_bytes / GIB
            return f"states and their copies need {need:.0f} GiB of a host's {self.cluster.host_memory_gib:.0f} GiB"
        return ""

    @property
    def mfu(self) -> float:
        peak = self.cluster.peak_tflops * 1e12 * self.layout.world_size
        return self.flops_per_step / (self.step.total * peak)

    @property
    def bubble(self) -> float:
        """Share of a pipeline's time that a stage waits."""
        return (self.layout.pipeline - 1) / (self.num_micro_batches + self.layout.pipeline - 1)

    @property
    def days(self) -> float:
        """Days of the whole run; NaN where the number of steps is unknown."""
        if not self.num_steps:
            return math.nan
        extra = self.calibration[1] + self.validation + self.saving
        return (self.num_steps * self.seconds_per_step + extra) / SECONDS_PER_DAY

    def as_json(self) -> dict[str, Any]:
        derived = ("is_feasible", "obstacle", "mfu", "bubble", "host_bytes")
        left_out = ("config", "cluster", "layout", "memory", "step", "rollout")
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        result = {name: value for name, value in values.items() if name not in left_out}
        result |= {name: getattr(self, name) for name in derived}
        result["layout"] = dataclasses.asdict(self.layout) | self.config.parallel.model_dump()
        result["memory_bytes_by_stage"] = [
            dataclasses.asdict(memory) | {"total": memory.total} for memory in self.memory
        ]
        result["step_seconds"] = dataclasses.asdict(self.step) | {"total": self.step.total}
        if self.rollout:
            of_rollout = dataclasses.asdict(self.rollout) | {"total": self.rollout.total}
            of_rollout["communication"] = by_name(self.rollout.communication)
            result["rollout_seconds"] = of_rollout
        result["days"] = None if math.isnan(self.days) else self.days
        result["cluster"] = self.cluster.model_dump()
        result["batch"] = self.config.batch.model_dump()
        result["assumptions"] = list(ASSUMPTIONS)
        return result


def make_plan(config: RunConfig, cluster: Cluster, samples: Samples) -> Plan:
    """The plan of a run. Raises UserError where the configuration does not fit the ranks, or is not complete."""
    config = prepared(config)
    check_run(config, cluster.world_size)
    layout = Layout.of(cluster.world_size, config.parallel)
    longest = longest_micro_batch(config)
    number = accumulation_steps(config, cluster.world_size)
    memory = run_memory(config, layout, "cuda")
    fullest = max(range(layout.pipeline), key=lambda rank: memory[rank].total)
    usual, usual_number = _usual(config, layout, samples)
    step = step_time(config, layout, cluster, usual, usual_number)
    num_steps = _num_steps(config, samples)
    rows = config.rows_per_sample
    volumes = [
        step_communication(config, layout, rank, [_whole(usual)] * usual_number) for rank in range(layout.pipeline)
    ]
    return Plan(
        config=config,
        layout=layout,
        cluster=cluster,
        memory=memory,
        activations={
            choice: rank_memory(_recomputing(config, choice), layout, fullest, longest, number, "cuda").activations
            for choice in RECOMPUTE
        },
        communication=[by_name(volume) for volume in volumes],
        num_parameters=sum(stage.num_parameters(config.model, 1) for stage in stages(config)),
        num_micro_batches=usual_number,
        tokens_per_step=config.batch.global_size * rows * usual.length,
        flops_per_step=step_flops(config, usual, usual_number, layout),
        step=step,
        views_factor=_views_factor(config, layout, cluster, samples, step) if rows > 1 else 1.0,
        calibration=_calibration_seconds(config, layout, cluster, usual),
        validation=_validation_seconds(config, layout, cluster, usual, num_steps),
        saving=_saving_seconds(config, cluster, num_steps, step.total),
        num_steps=num_steps,
        rollout=rollout_time(config, layout, cluster, usual, usual_number, step) if config.rl.is_used else None,
    )


def by_name(volume: Volume) -> dict[str, int]:
    """Bytes by "axis collective"."""
    return {" ".join(key): int(size) for key, size in sorted(volume.items())}


def prepared(config: RunConfig) -> RunConfig:
    """The configuration as a GPU would run it: 'auto' means bf16. Raises UserError without a vocabulary's size."""
    if not isinstance(config.model.vocab_size, int):
        raise UserError("'model.vocab_size' is 'tokenizer': give the number of ids, such as model.vocab_size=126464")
    if config.precision.dtype != "auto":
        return config
    return config.model_copy(update={"precision": config.precision.model_copy(update={"dtype": "bf16"})})


def _recomputing(config: RunConfig, choice: str) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"recompute": choice})})


def _usual(config: RunConfig, layout: Layout, samples: Samples) -> tuple[MicroBatchShape, int]:
    """(a micro-batch of mean length, how many of them a data-parallel rank works on per step)."""
    length = round(min(samples.mean_length or config.data.max_length, config.data.max_length))
    views = config.rows_per_sample
    share = math.ceil(config.batch.global_size / layout.data)
    per_batch = config.batch.micro_size
    if config.batch.micro_tokens:
        per_batch = min(share, max(1, config.batch.micro_tokens // (views * length)))
    rows = views * per_batch
    of_completion = min(config.rl.gen_length, length) * config.rl.is_used
    eligible = length * samples.eligible or config.image.num_tokens or of_completion or length
    scored = rows * eligible * objective_of(config).scored_share
    return MicroBatchShape(rows, length, round(scored)), math.ceil(share / per_batch)


def _whole(shape: MicroBatchShape) -> MicroBatchShape:
    return MicroBatchShape(int(shape.rows), int(shape.length), int(shape.selected))


def _views_factor(config: RunConfig, layout: Layout, cluster: Cluster, samples: Samples, step: StepTime) -> float:
    """The time of a step relative to one with a single row per sample."""
    diffusion = config.diffusion.model_copy(update={"views": 1, "multisample": 1})
    single = config.model_copy(update={"diffusion": diffusion})
    return step.total / step_time(single, layout, cluster, *_usual(single, layout, samples)).total


def _num_steps(config: RunConfig, samples: Samples) -> int:
    if config.schedule.steps:
        return config.schedule.steps
    if config.rl.is_used:
        num_updates = config.rl.num_completions // config.batch.global_size * config.rl.num_iterations
        return math.ceil(config.schedule.epochs * samples.number / config.rl.prompts_per_rollout) * num_updates
    return math.ceil(config.schedule.epochs * samples.number / config.batch.global_size)


def _forward_seconds(config: RunConfig, layout: Layout, cluster: Cluster, shape: MicroBatchShape) -> float:
    """Seconds of one row without gradients, all ranks sharing the rows."""
    row = MicroBatchShape(1, shape.length, math.ceil(shape.selected / shape.rows))
    flops = sum(forward_flops(config, stage, row) for stage in stages(config))
    return flops / (cluster.flops_per_s() * layout.world_size)


def _calibration_seconds(
    config: RunConfig, layout: Layout, cluster: Cluster, shape: MicroBatchShape
) -> tuple[float, float]:
    settings = config.diffusion.calibration
    if config.diffusion.t_sampler != "ppots" or settings.artifact:
        return 0.0, 0.0
    most = settings.num_samples * settings.num_times * settings.num_masks
    least = most if settings.estimator == "naive" else min(settings.initial_forwards, most)
    seconds = _forward_seconds(config, layout, cluster, shape)
    return least * seconds, most * seconds


def _validation_seconds(
    config: RunConfig, layout: Layout, cluster: Cluster, shape: MicroBatchShape, num_steps: int
) -> float:
    evaluation = config.evaluation
    if not evaluation.every:
        return 0.0
    rows = evaluation.num_samples * evaluation.num_times * (num_steps // evaluation.every)
    return rows * _forward_seconds(config, layout, cluster, shape)


def _saving_seconds(config: RunConfig, cluster: Cluster, num_steps: int, step_seconds: float) -> float:
    """Seconds that training waits for checkpoints: for their writing; or, where that is done in the background, for a
    copy and for what is left of the writing when the next one is due."""
    every = config.checkpoint.save_every or max(1, num_steps)
    size = checkpoint_bytes(config.model)
    writing = size / (cluster.storage_gbytes_per_s * 1e9)
    wait = writing
    if config.checkpoint.asynchronous:
        copy = size / cluster.world_size / (cluster.host_gbytes_per_s * 1e9)
        wait = copy + max(0.0, writing - every * step_seconds)
    return math.ceil(num_steps / every) * wait
