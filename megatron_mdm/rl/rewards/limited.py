"""A reward function with a time limit: it runs in a process of its own, which is killed when the time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RewardConfig
from megatron_mdm.rl.rewards.function import Batch
from megatron_mdm.rl.rewards.load import load
from megatron_mdm.rl.rewards.table import REWARDS

_START_SECONDS = 300.0  # that importing a user's module may take


class Limited:
    """scores() of a reward with a timeout. The process is begun at once, and asked again and again."""

    def __init__(self, reward: RewardConfig, task: str) -> None:
        """Raises UserError as load() does."""
        self.reward = reward
        if reward.name in REWARDS:
            load(reward, task)  # its arguments are checked without a process
        self.connection, theirs = Pipe()
        self.process = _started(theirs)
        self._finalizer = weakref.finalize(self, _kill, self.process)
        self._ask((reward, task), _START_SECONDS, "loading it")

    def __call__(self, batch: Batch) -> list[float]:
        """Raises UserError as scores() does, and where the time is over."""
        count = len(batch.completions)
        values: list[float] = self._ask(batch, self.reward.timeout, f"a call with {count} completions")
        return values

    def close(self) -> None:
        self._finalizer()

    def _ask(self, question: Any, seconds: float, what: str) -> Any:
        try:
            self.connection.send(question)
            is_there = self.connection.poll(seconds)
            answer = self.connection.recv() if is_there else None
        except (EOFError, OSError):
            self.close()
            raise UserError(f"reward {self.reward.name}: its process ended in {what}{self._end()}") from None
        if not is_there:
            self.close()
            raise UserError(
                f"reward {self.reward.name}: {what} took longer than 'timeout' {seconds:g} s, and was ended"
            )
        if isinstance(answer, str):
            raise UserError(answer)
        return answer

    def _end(self) -> str:
        code = self.process.returncode
        return f" (killed by signal {-code})" if code is not None and code < 0 else f" (exit code {code})"


def _started(theirs: Connection) -> subprocess.Popen[bytes]:
    """A fresh interpreter, not a copy of this process with its threads and locks."""
    number = str(theirs.fileno())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_mdm.rl.rewards.worker", number],
        pass_fds=[theirs.fileno()],
        env=environment,
        start_new_session=True,  # so that what the function starts is ended with it
    )
    theirs.close()
    return process


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
