"""One run of a study, in a process (or several ranks) of its own: train or resume, score, write what it reached.

Nothing that needs more than the standard library is imported before the process knows its place: which devices it
sees is told by its environment.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_mdm.parallel.environment import STOP_SIGNALS

if TYPE_CHECKING:
    from megatron_mdm.study.runs import Recipe

LOG = "log.txt"
LOCK = "lock"
TRAINED = "trained.json"  # of a run that has been trained and is yet to be scored
PRELOAD = ["megatron_mdm.study.preload"]  # what every such process would spend seconds on


class Place(NamedTuple):
    """Of one rank of a run."""

    rank: int
    size: int
    port: int
    threads: int
    environment: Mapping[str, str]


def run_rank(recipe: Recipe, step_factor: float, place: Place) -> None:
    """The whole life of the process. Its exit code: 0, done or stopped by a signal; else it has failed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # which the server that it is forked from has blocked
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the study's own process passes it on
    ranks = {"RANK": place.rank, "LOCAL_RANK": place.rank, "WORLD_SIZE": place.size, "MASTER_PORT": place.port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TQDM_DISABLE="1", **place.environment)
    recipe.folder.mkdir(parents=True, exist_ok=True)
    _log_to(recipe.folder / LOG, place.rank)
    if place.rank == 0:
        lock = _locked(recipe.folder / LOCK)  # a process of an earlier start may be about to die
    import torch

    torch.set_num_threads(place.threads)
    from megatron_mdm.parallel.program import run_program

    run_program(lambda: _perform(recipe, step_factor))
    if place.rank == 0:
        os.close(lock)


def _perform(recipe: Recipe, step_factor: float) -> None:
    from megatron_mdm.config.errors import UserError
    from megatron_mdm.study.perform import PERFORM
    from megatron_mdm.study.results import write_failure

    try:
        PERFORM[recipe.kind](recipe, step_factor)
    except UserError as error:
        if os.environ["RANK"] == "0":
            write_failure(recipe.folder, str(error))
        raise


def _die_with_parent() -> None:
    """End when the study's own process is gone, however: what was not saved will be done again."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _log_to(path: Path, rank: int) -> None:
    """What libraries print, too, goes to the run's folder."""
    name = path if rank == 0 else path.with_name(f"{path.stem}-{rank}{path.suffix}")
    descriptor = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor
