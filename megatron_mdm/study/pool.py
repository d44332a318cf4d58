"""A study's runs on this machine's cores or GPUs: so many at a time, each in processes of its own, until none is left.

Several machines, or jobs of an array, each run a pool of their own on the same folder: claims.py says who does which
run. Killed anywhere, the same command goes on: runs that are done are skipped, those that had begun are resumed.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel.environment import STOP_SIGNALS
from megatron_mdm.study.claims import STALE_SECONDS, Claim, claim
from megatron_mdm.study.pace import step_factor
from megatron_mdm.study.results import failure, result, write_failure
from megatron_mdm.study.runs import Recipe, Study
from megatron_mdm.study.worker import LOG, PRELOAD, Place, run_rank

_LOOK_SECONDS = 5.0  # between two looks at what others have done
_STOPS = (*STOP_SIGNALS, signal.SIGINT)


@dataclass(frozen=True)
class Machine:
    """What this pool may use."""

    workers: int  # runs at a time
    ranks: int  # of each
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them; none: the cores

    @property
    def threads(self) -> int:
        """Of each rank."""
        return max(1, len(os.sched_getaffinity(0)) // (self.workers * self.ranks))

    def environment(self, slot: int) -> dict[str, str]:
        """Of the run in a slot: its share of the GPUs."""
        if not self.gpus:
            return {"OMP_NUM_THREADS": str(self.threads)}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus[slot * self.ranks : (slot + 1) * self.ranks])}


@dataclass
class Outcome:
    done: list[str] = field(default_factory=list)  # by this pool
    failed: dict[str, str] = field(default_factory=dict)  # name → why
    stopped: bool = False  # by a signal
    elsewhere: list[str] = field(default_factory=list)  # left to processes that are doing them, or what they wait for


@dataclass
class _Running:
    recipe: Recipe
    claim: Claim
    slot: int
    processes: list[Any]
    began: float


class Pool:
    """Does runs until none is left."""

    def __init__(
        self,
        study: Study,
        recipes: Sequence[Recipe],
        machine: Machine,
        say: Callable[[str], None],
        patience: float = STALE_SECONDS,
    ) -> None:
        """say: gets a line when a run begins or ends. patience: seconds without anything to do, after which what others
        have claimed is left to them: by then they are known to live."""
        self.patience = patience
        self.idle_since = math.inf
        self.study = study
        self.waiting = {recipe.name: recipe for recipe in recipes}
        self.machine = machine
        self.say = say
        self.number = len(recipes)
        self.since = time.time()
        self.running: list[_Running] = []
        self.outcome = Outcome()
        self.context: Any = multiprocessing.get_context("spawn" if machine.gpus else "forkserver")
        if not machine.gpus:
            self.context.set_forkserver_preload(PRELOAD)

    def run(self) -> Outcome:
        """Until every run is done, here or elsewhere, has failed, or is left to others; or until a signal asks to stop:
        then those that train save and end, and the same command goes on. Raises UserError where a result belongs to
        another study."""
        before = {number: signal.signal(number, self._stop) for number in _STOPS}
        try:
            while self.running or (self.waiting and not self.outcome.stopped):
                self._start_some()
                if self._is_idle():
                    self.outcome.elsewhere = list(self.waiting)
                    break
                self._wait()
                self._end_some()
        finally:
            for running in self.running:
                for process in running.processes:
                    process.kill()
                running.claim.give_up()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.outcome

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.outcome.stopped = True
        for running in self.running:
            for process in running.processes:
                process.terminate()

    def _start_some(self) -> None:
        for name, recipe in list(self.waiting.items()):
            if len(self.running) == self.machine.workers or self.outcome.stopped:
                return
            if result(recipe) is not None:
                del self.waiting[name]
                continue
            if error := failure(recipe.folder, self.since):
                self._fail(name, error)
                continue
            factor = self._factor(recipe)
            if factor is None:
                continue
            mine = claim(self.study.folder, name)
            if mine is None:
                continue
            if result(recipe) is not None:  # done by another, between the two looks
                mine.give_up()
                del self.waiting[name]
                continue
            self._start(recipe, mine, factor)

    def _factor(self, recipe: Recipe) -> float | None:
        """Steps, to those of the configuration; None: what they depend on is not done yet."""
        try:
            return step_factor(self.study, recipe.point, self.since)
        except UserError as error:
            self._fail(recipe.name, str(error))
            return None

    def _start(self, recipe: Recipe, mine: Claim, factor: float) -> None:
        machine = self.machine
        slot = min(set(range(machine.workers)) - {running.slot for running in self.running})
        port = _free_port()
        processes = []
        for rank in range(machine.ranks):
            place = Place(rank, machine.ranks, port, machine.threads, machine.environment(slot))
            process = self.context.Process(target=run_rank, args=(recipe, factor, place))
            process.start()
            processes.append(process)
        self.running.append(_Running(recipe, mine, slot, processes, time.monotonic()))
        del self.waiting[recipe.name]

    def _is_idle(self) -> bool:
        """Whether there has been nothing to do for so long that there will not be anything."""
        if self.running:
            self.idle_since = math.inf
            return False
        self.idle_since = min(self.idle_since, time.monotonic())
        return bool(self.waiting) and time.monotonic() - self.idle_since >= self.patience

    def _wait(self) -> None:
        sentinels = [process.sentinel for running in self.running for process in running.processes]
        if sentinels:
            multiprocessing.connection.wait(sentinels, _LOOK_SECONDS)
        elif self.waiting and not self.outcome.stopped:  # for runs that others do
            time.sleep(_LOOK_SECONDS)
        for running in self.running:
            running.claim.touch()

    def _end_some(self) -> None:
        for running in list(self.running):
            processes = running.processes
            failed = [process for process in processes if process.exitcode not in (None, 0)]
            if not failed and any(process.exitcode is None for process in processes):
                continue
            for process in processes:
                if failed:
                    process.join(10)
                    process.kill()  # ranks of one that has failed would wait for it
                process.join()
            self.running.remove(running)
            self._note(running, failed[0].exitcode if failed else 0)

    def _note(self, running: _Running, code: int) -> None:
        recipe = running.recipe
        name = recipe.name
        record = result(recipe)
        if record is not None:
            self.outcome.done.append(name)
            left = len(self.waiting) + len(self.running)
            seconds = time.monotonic() - running.began
            self.say(f"{name}: {record['told']}, {seconds:.0f} s; {left} of {self.number} left")
        elif self.outcome.stopped and code in (0, -signal.SIGTERM):  # the latter before it could save
            self.say(f"{name}: stopped; the same command goes on with it")
        else:
            error = failure(recipe.folder, self.since) or _last_words(recipe.folder / LOG, code)
            write_failure(recipe.folder, error)
            self._fail(name, error)
        running.claim.give_up()

    def _fail(self, name: str, error: str) -> None:
        self.waiting.pop(name, None)
        self.outcome.failed[name] = error
        self.say(f"{name}: FAILED: {error}")


def _last_words(log: Path, code: int) -> str:
    """What is known of a run that has failed without a word of its own."""
    ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{ended}; the last line of {log}: {last[:300]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_share_first(recipes: Sequence[Recipe], index: int, number: int) -> list[Recipe]:
    """The order in which one of several pools looks for runs: every number-th from index on, then the others', for what
    they have not begun when this one is done. Runs whose steps depend on others' seconds stay last."""
    places = {recipe.name: place for place, recipe in enumerate(recipes)}
    return sorted(recipes, key=lambda recipe: (bool(recipe.point.pace), places[recipe.name] % number != index))
