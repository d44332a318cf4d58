"""How fast a run goes and where its time goes: tokens, FLOPs and phases of steps, and ranks slower than their peers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.engine.clock import PHASES
from megatron_mdm.models.costs import training_flops
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.collectives import gather_objects
from megatron_mdm.parallel.cores import CoreUse, core_use, own_seconds, unfit_hosts
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.training.callbacks.base import Callback, Order
from megatron_mdm.training.faults import append_fault
from megatron_mdm.training.loop import StepResult, Trainer
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState

_SAMPLES_IN_A_ROW = 2  # in which a rank has to be slow before it is named
GIB = 2**30


class Speed:
    """How fast a run goes: sums over steps. Times are this rank's."""

    def __init__(self, model: ModelConfig, peak_flops: float) -> None:
        """peak_flops: of all ranks together, per second; 0: not known."""
        self.model = model
        self.peak_flops = peak_flops
        self.reset()

    def reset(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.flops = 0.0
        self.seconds = 0.0
        self.phases = dict.fromkeys(PHASES, 0.0)

    def add(self, result: StepResult) -> None:
        tokens = result.num_tokens
        samples = max(1, len(result.sample_ids))
        self.num_steps += 1
        self.num_tokens += tokens
        self.flops += training_flops(self.model, tokens * result.num_views, tokens / samples, result.num_selected)
        self.seconds += result.seconds
        for phase, seconds in result.phases.items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds

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


class RankTimes(NamedTuple):
    """What one rank has measured of a step. JSON-able."""

    stage: int  # of the pipeline
    tokens: int  # that it computed
    cores: CoreUse  # over the seconds in which it was in no collective
    phases: dict[str, float]  # seconds
    communication: float  # seconds
    memory: float  # GiB, at most


def stragglers(ranks: Sequence[RankTimes], ratio: float) -> list[int]:
    """Ranks that are busy for more than `ratio` times their peers' median, also per token.

    A rank is busy while it is in no collective, those that wait for a slow one are not, and while it has a core. Its
    peers are the ranks of the same pipeline stage. They may have other numbers of tokens, and a step costs something
    besides: a slow rank is busy for longer than they are, and also for longer per token. Ranks of hosts on which ranks
    go without cores are not compared (parallel/cores.py).
    """
    unfit = unfit_hosts([rank.cores for rank in ranks])
    slow = []
    for number, rank in enumerate(ranks):
        peers = [other for other in peers_of(ranks, number) if other.cores.host not in unfit]
        if not peers or rank.cores.host in unfit:
            continue
        busy = float(np.median([own_seconds(peer.cores) for peer in peers]))
        per_token = float(np.median([own_seconds(peer.cores) / peer.tokens for peer in peers]))
        if own_seconds(rank.cores) > ratio * max(busy, rank.tokens * per_token):
            slow.append(number)
    return slow


def peers_of(ranks: Sequence[RankTimes], number: int) -> list[RankTimes]:
    """The other ranks of a rank's stage."""
    return [rank for other, rank in enumerate(ranks) if other != number and rank.stage == ranks[number].stage]


class CompareRanks(Callback):
    """At sampled steps (`logging.profile_every`), every rank's times and memory, and who is slow."""

    order = Order.RANKS

    def __init__(self, trainer: Trainer, metrics: MetricsLog, folder: Path) -> None:
        self.trainer = trainer
        self.metrics = metrics
        self.folder = folder
        self.context = trainer.context
        self.ratio = trainer.config.logging.straggler_ratio
        self.slow_in_a_row: Counter[int] = Counter()
        self.unfit_in_a_row: Counter[str] = Counter()
        self.told: set[str] = set()  # hosts whose ranks are not compared

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if not self.trainer.is_sampled(result.step):
            return
        mine = RankTimes(
            stage=self.context.pipeline_rank,
            tokens=max(1, result.num_computed),
            cores=core_use(result.seconds - result.communication, result.core_wait),
            phases=result.phases,
            communication=result.communication,
            memory=platform.peak_memory_bytes() / GIB,
        )
        ranks: list[Any] = gather_objects(mine, self.context)
        busy = [rank.cores.seconds for rank in ranks]
        self.metrics.write(
            state.step,
            {
                "time_busy_by_rank": busy,
                "time_communication_by_rank": [rank.communication for rank in ranks],
                "memory_gib_by_rank": [rank.memory for rank in ranks],
                "slowest_rank": int(np.argmax(busy)),
            },
        )
        if self.context.is_main:
            self._name_stragglers(state.step, ranks)

    def _name_stragglers(self, step: int, ranks: list[RankTimes]) -> None:
        unfit = unfit_hosts([rank.cores for rank in ranks])
        slow = stragglers(ranks, self.ratio)
        self.unfit_in_a_row = Counter({host: self.unfit_in_a_row[host] + 1 for host in unfit})
        self.slow_in_a_row = Counter({number: self.slow_in_a_row[number] + 1 for number in slow})
        for host, reason in unfit.items():
            if self.unfit_in_a_row[host] == _SAMPLES_IN_A_ROW and host not in self.told:
                self.told.add(host)
                tqdm.write(f"step {step}: slow ranks are not named: {reason}", file=sys.stderr)
        for number in slow:
            if self.slow_in_a_row[number] == _SAMPLES_IN_A_ROW:
                self._report(step, number, ranks)

    def _report(self, step: int, number: int, ranks: list[RankTimes]) -> None:
        rank = ranks[number]
        peers = peers_of(ranks, number)
        busy = rank.cores.seconds
        median = float(np.median([peer.cores.seconds for peer in peers]))
        excess = {
            phase: seconds - float(np.median([peer.phases[phase] for peer in peers]))
            for phase, seconds in rank.phases.items()
        }
        phase = max(excess, key=lambda name: excess[name])
        tqdm.write(
            f"warning: step {step}: rank {number} (host {rank.cores.host}) is slow: busy for {busy:.3g} s of a step, "
            f"its peers for {median:.3g} s; it loses most in '{phase}'",
            file=sys.stderr,
        )
        record = {"rank": number, "host": rank.cores.host, "busy": busy, "median": median, "phase": phase}
        append_fault(self.folder, {"step": step, "kind": "straggler", **record})


def job_peak_flops(dtype: str, context: ParallelContext) -> float:
    """Peak FLOP/s of all ranks together in a type of precision.dtype; 0 where a device is not known. Collective."""
    peak = platform.peak_flops(torch.float32 if dtype == "fp32" else torch.bfloat16)
    peaks: list[Any] = gather_objects(peak, context)
    return float(sum(peaks)) if all(peaks) else 0.0
