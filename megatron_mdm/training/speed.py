"""How fast a run goes and where its time goes: tokens, FLOPs and phases of steps, and ranks slower than their peers."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.engine.clock import PHASES
from megatron_mdm.models.parameters import training_flops
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.training.faults import append_fault
from megatron_mdm.training.loop import StepResult, Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState

_SAMPLES_IN_A_ROW = 2  # in which a rank has to be slow before it is named
GIB = 2**30


class Speed:
    """Sums over steps. Times are this rank's."""

    def __init__(self, model: ModelConfig, peak_flops: float) -> None:
        """peak_flops: of all ranks together, per second; 0: not known."""
        self.model, self.peak_flops = model, peak_flops
        self.reset()

    def reset(self) -> None:
        self.num_steps, self.num_tokens, self.flops, self.seconds = 0, 0, 0.0, 0.0
        self.phases = dict.fromkeys(PHASES, 0.0)

    def add(self, result: StepResult) -> None:
        tokens, samples = result.num_tokens, len(result.sample_ids)
        self.num_steps += 1
        self.num_tokens += tokens
        self.flops += training_flops(self.model, tokens * result.num_views, tokens / samples, result.num_selected)
        self.seconds += result.seconds
        for phase, seconds in result.phases.items():
            self.phases[phase] += seconds

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def record(self) -> dict[str, float]:
        """Tokens of samples per second, model FLOPs utilisation, and mean seconds of a step and of its phases."""
        values = {"tokens_per_second": self.tokens_per_second, "time_step": self.seconds / self.num_steps}
        values |= {f"time_{phase}": seconds / self.num_steps for phase, seconds in self.phases.items()}
        if self.peak_flops:
            values["mfu"] = self.flops / self.seconds / self.peak_flops
        return values


class CompareRanks:
    """A hook: at sampled steps (`logging.profile_every`), every rank's times and memory, and who is slow.

    A rank is busy while it is in no collective: those that wait for a slow one are not. Its peers are the ranks of the
    same pipeline stage. They may have other numbers of tokens, and a step costs something besides: a slow rank is busy
    for longer than they are, and also for longer per token.
    """

    def __init__(self, trainer: Trainer, metrics: MetricsLog, folder: Path) -> None:
        self.trainer, self.metrics, self.folder = trainer, metrics, folder
        self.context, self.ratio = trainer.context, trainer.config.logging.straggler_ratio
        self.slow_in_a_row: dict[int, int] = {}

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if not self.trainer.is_sampled(result.step):
            return
        mine = {
            "busy": result.seconds - result.communication,
            "communication": result.communication,
            "tokens": max(1, result.num_computed),
            "memory": platform.peak_memory_bytes() / GIB,
            "phases": result.phases,
            "host": platform.host(),
        }
        ranks: list[Any] = gather_objects(mine, self.context)
        busy = [rank["busy"] for rank in ranks]
        self.metrics.write(
            state.step,
            {
                "time_busy_by_rank": busy,
                "time_communication_by_rank": [rank["communication"] for rank in ranks],
                "memory_gib_by_rank": [rank["memory"] for rank in ranks],
                "slowest_rank": int(np.argmax(busy)),
            },
        )
        if self.context.is_main:
            self._name_stragglers(state.step, ranks)

    def after_run(self, _: TrainState) -> None:
        pass

    def _name_stragglers(self, step: int, ranks: list[Any]) -> None:
        stages: dict[int, list[Any]] = defaultdict(list)
        for number, rank in enumerate(ranks):
            stages[self.context.layout.pipeline_rank(number)].append(rank)
        for number, rank in enumerate(ranks):
            peers = [other for other in stages[self.context.layout.pipeline_rank(number)] if other is not rank]
            median = float(np.median([peer["busy"] for peer in peers])) if peers else rank["busy"]
            per_token = [peer["busy"] / peer["tokens"] for peer in peers] or [np.inf]
            is_slow = rank["busy"] > self.ratio * max(median, rank["tokens"] * float(np.median(per_token)))
            self.slow_in_a_row[number] = self.slow_in_a_row.get(number, 0) + 1 if is_slow else 0
            if self.slow_in_a_row[number] == _SAMPLES_IN_A_ROW:
                self._report(step, number, rank, peers, median)

    def _report(self, step: int, number: int, rank: Any, peers: list[Any], median: float) -> None:
        excess = {
            phase: seconds - float(np.median([peer["phases"][phase] for peer in peers]))
            for phase, seconds in rank["phases"].items()
        }
        phase = max(excess, key=lambda name: excess[name])
        tqdm.write(
            f"warning: step {step}: rank {number} (host {rank['host']}) is slow: busy for {rank['busy']:.3g} s of a "
            f"step, its peers for {median:.3g} s; it loses most in '{phase}'",
            file=sys.stderr,
        )
        record = {"rank": number, "host": rank["host"], "busy": rank["busy"], "median": median, "phase": phase}
        append_fault(self.folder, {"step": step, "kind": "straggler", **record})


def job_peak_flops(dtype: str, context: ParallelContext) -> float:
    """Of all ranks together, per second, in a type of precision.dtype; 0 where a device is not known. Collective."""
    peak = platform.peak_flops(torch.float32 if dtype == "fp32" else torch.bfloat16)
    peaks: list[Any] = gather_objects(peak, context)
    return float(sum(peaks)) if all(peaks) else 0.0
