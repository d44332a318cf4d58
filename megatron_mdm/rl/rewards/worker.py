"""The process in which a reward function with a time limit runs: it loads the function, and answers batches."""

from __future__ import annotations

import contextlib
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RewardConfig
from megatron_mdm.rl.rewards.function import scores
from megatron_mdm.rl.rewards.load import load

_GRACE_SECONDS = 5.0  # after which the process ends itself, where whoever asked is gone and cannot end it


def serve(connection: Connection) -> None:
    """Answer until the other side closes: lists of scores, or an error's line."""
    reward, task = connection.recv()
    try:
        function = load(reward, task)
    except UserError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        batch = connection.recv()
        signal.setitimer(signal.ITIMER_REAL, reward.timeout + _GRACE_SECONDS)
        connection.send(_answer(reward, function, batch))
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _answer(reward: RewardConfig, function: Any, batch: Any) -> list[float] | str:
    try:
        return scores(reward.name, function, batch)
    except UserError as error:
        return str(error)


if __name__ == "__main__":
    with contextlib.suppress(EOFError):  # the other side is gone
        serve(Connection(int(sys.argv[1])))
