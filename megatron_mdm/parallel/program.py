"""How a program under a launcher ends: cleanly; with one clear line and exit code 1 on every rank; or with a traceback,
and a code by which a launcher tries again what may go well the next time."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel.environment import check_rank, variable
from megatron_mdm.parallel.groups import JoinError, has_joined, shut_down
from megatron_mdm.parallel.watchdog import unwatch, wait_if_hanging

_MISTAKE = 1  # a user's, or a fault that would come again
_CRASHED = 70  # sysexits.h: EX_SOFTWARE; a launcher may try again: another rank has gone, a device or a disk has failed
_MAY_PASS = (RuntimeError, OSError, MemoryError)  # gloo, NCCL and CUDA raise the first
_COMES_AGAIN = (NotImplementedError, RecursionError)  # though they are RuntimeErrors
SHOW_TRACEBACK = "MDM_TRACEBACK"  # set to see where a fault before the ranks join comes from
_PROJECT = Path(__file__).parent.parent.parent
_SECOND_RANK_WAITS = 1.5  # seconds; the launcher ends the other ranks as soon as the first has failed


def run_program(main: Callable[[], None]) -> None:
    """Call main; on a UserError print `error: …` and exit with code 1, without waiting for ranks that still compute.

    Before the ranks have joined, other faults end in the same way: they would come again. Afterwards they have their
    traceback; the exit code says whether they may pass. A ValidationError always has it: what a user wrote is checked
    where it is read and is a UserError then.

    Most mistakes are found by every rank at once. The main rank speaks at once; another speaks, with its number, only
    if it is still alive some seconds later, that is, if it alone failed.
    """
    try:
        check_rank()
        main()
    except UserError as error:
        _fail(f"error: {error}")
    except KeyboardInterrupt:
        _fail("interrupted")
    except JoinError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit_now(_CRASHED)
    except SystemExit:
        raise
    except BaseException as error:  # a panic in a Rust library is no Exception
        if not has_joined() and not isinstance(error, ValidationError):
            if os.environ.get(SHOW_TRACEBACK):
                traceback.print_exc()
            _fail(f"error: {_described(error)}; {SHOW_TRACEBACK}=1 shows where it comes from")
        wait_if_hanging()
        traceback.print_exc()
        may_pass = isinstance(error, _MAY_PASS) and not isinstance(error, _COMES_AGAIN)
        _exit_now(_CRASHED if may_pass else _MISTAKE)
    has_stopped = unwatch()
    shut_down()
    if not has_stopped:
        _exit_now(0)


def _described(error: BaseException) -> str:
    """Type, message, and the last line of this project that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PROJECT) and frame.filename != __file__]
    own = own or frames
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _fail(message: str) -> None:
    rank = variable("RANK")  # which may be what is wrong
    if rank.strip("0"):
        time.sleep(_SECOND_RANK_WAITS)
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)
    _exit_now(_MISTAKE)


def _exit_now(code: int) -> None:
    """Leave without destroying process groups, which would wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
