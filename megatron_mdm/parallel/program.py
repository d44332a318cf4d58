"""How a program under a launcher ends: cleanly; with one clear line and exit code 1 on every rank; or with a traceback
and another code."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

from pydantic import ValidationError

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel.groups import JoinError, rank_from_environment, shut_down
from megatron_mdm.parallel.watchdog import unwatch, wait_if_hanging

_CRASHED = 70  # sysexits.h: EX_SOFTWARE; also where another rank has gone, so that a launcher may try again
_SECOND_RANK_WAITS = 1.5  # seconds; the launcher ends the other ranks as soon as the first has failed


def run_program(main: Callable[[], None]) -> None:
    """Call main; on a UserError print `error: …` and exit with code 1, without waiting for ranks that still compute.

    Most mistakes are found by every rank at once. The main rank speaks at once; another speaks, with its number, only
    if it is still alive some seconds later, that is, if it alone failed.
    """
    try:
        main()
    except UserError as error:
        _fail(f"error: {error}")
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        _fail(f"error: {where + ': ' if where else ''}{detail['msg'].removeprefix('Value error, ')}")
    except KeyboardInterrupt:
        _fail("interrupted")
    except JoinError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit_now(_CRASHED)
    except Exception:
        wait_if_hanging()
        traceback.print_exc()
        _exit_now(_CRASHED)
    unwatch()
    shut_down()


def _fail(message: str) -> None:
    rank = rank_from_environment()
    if rank:
        time.sleep(_SECOND_RANK_WAITS)
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr, flush=True)
    _exit_now(1)


def _exit_now(code: int) -> None:
    """Leave without destroying process groups, which would wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
