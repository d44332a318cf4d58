"""Real ranks for tests: processes forked from a server that has imported torch, DeepSpeed and megatron-core once.

A forked rank starts in milliseconds with clean library state; importing again would cost seconds of CPU for each.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

_PRELOAD = ["tests.preload"]
_TIMEOUT = 240.0  # seconds for one group of ranks


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call function(*arguments) on world_size ranks of one job; return what each returned, in rank order.

    function stands at module level and finds RANK, WORLD_SIZE and MASTER_PORT in the environment, as under torchrun. It
    returns numpy arrays, not tensors, whose shared memory would end with the rank.
    """
    context = _server()
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        connections = []
        processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main, args=(theirs, function, arguments, rank, world_size, port, f"{folder}/{rank}.log")
            )
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        results = [_receive(connection, rank, folder) for rank, connection in enumerate(connections)]
        failed = [result.text for result in results if isinstance(result, _Failure)]
        for connection in connections:
            connection.close()  # every rank has answered: none is needed by another any more
        for process in processes:
            if failed:
                process.terminate()
            process.join(30)
    if failed:
        raise AssertionError("\n".join(failed))
    return results


class ProgramResult(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


class ProgramRanks:
    """A program of launch/ or tools/ running as `python path arguments` on several ranks of one job."""

    def __init__(self, path: str, arguments: list[str], world_size: int = 1) -> None:
        context = _server()
        port = _free_port()
        self.path = path
        self.folder = tempfile.TemporaryDirectory()
        self.processes = [
            context.Process(target=_program_main, args=(path, arguments, rank, world_size, port, self.folder.name))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """SIGKILL to every rank, as when a node dies."""
        for process in self.processes:
            process.kill()
            process.join()

    def is_running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self) -> list[ProgramResult]:
        """Results in rank order. A rank that outlives the limit fails the test."""
        results = []
        for rank, process in enumerate(self.processes):
            process.join(_TIMEOUT)
            if process.is_alive():
                self.kill()
                raise AssertionError(f"rank {rank} of {self.path} hangs")
            texts = (Path(self.folder.name, f"{rank}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
            results.append(ProgramResult(int(process.exitcode or 0), *texts))
        return results


def run_program_ranks(path: str, arguments: list[str], world_size: int = 1) -> list[ProgramResult]:
    return ProgramRanks(path, arguments, world_size).wait()


class _Failure(NamedTuple):
    text: str


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _receive(connection: Any, rank: int, folder: str) -> Any:
    try:
        if not connection.poll(_TIMEOUT):
            return _Failure(f"rank {rank} did not answer in {_TIMEOUT:.0f} s")
        return connection.recv()
    except EOFError:
        log = Path(folder, f"{rank}.log")
        return _Failure(f"rank {rank} died\n{log.read_text(encoding='utf-8')[-4000:] if log.exists() else ''}")


def _join_job(rank: int, world_size: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _rank_main(connection, function, arguments, rank, world_size, port, log) -> None:
    _join_job(rank, world_size, port)
    with open(log, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            connection.send(function(*arguments))
            connection.poll(_TIMEOUT)  # rank 0 holds the store through which slower ranks may still be connecting
        except BaseException:
            connection.send(_Failure(f"rank {rank}:\n{traceback.format_exc()}"))
    os._exit(0)  # a rank whose peer failed must not wait for it


def _program_main(path, arguments, rank, world_size, port, folder) -> None:
    import runpy

    _join_job(rank, world_size, port)
    # Real file descriptors: the program may leave through os._exit.
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    code = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _free_port() -> int:
    """A port that is free, and that no other test process on this machine is given: each takes its share of them."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port // 2 % num_workers == worker:  # of those that the kernel picks, most have one parity
            return port
