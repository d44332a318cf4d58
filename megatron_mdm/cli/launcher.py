"""torchrun, less the traceback it prints when a rank has already said in one line what is wrong. On one node, jobs take
a free port each.

Exit code 1: a user's mistake, or a fault that would come again; 75: a rank or a node died, and another try may do.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterable

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import get_args_parser, run

from megatron_mdm.config.errors import UserError
from megatron_mdm.parallel.environment import LAUNCH_ID
from megatron_mdm.parallel.rendezvous import meeting, why_not_met

TRY_AGAIN = 75  # sysexits.h: EX_TEMPFAIL
MISTAKES = (1, 2)  # a rank's exit codes where another try would end alike; 2: unknown arguments, or no such program


def launch(options: list[str]) -> int:
    """Start ranks as torchrun would, with the same options. Returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or torchrun says that it sets this
    os.environ.setdefault(LAUNCH_ID, uuid.uuid4().hex)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = get_args_parser().parse_args(options)
    try:
        with meeting(arguments):
            run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM: the agent ended it
                name = signal.Signals(-failure.exitcode).name
                print(f"error: rank {rank} was ended by {name}; the other ranks were stopped", file=sys.stderr)
        return exit_code(failure.exitcode for failure in error.failures.values())
    except (RendezvousError, DistError) as error:
        print(f"error: {why_not_met(error, arguments)}", file=sys.stderr)
        return TRY_AGAIN
    return 0


def exit_code(of_ranks: Iterable[int]) -> int:
    """A rank that ended with a code of its own has printed its reason."""
    return 1 if any(code in MISTAKES for code in of_ranks) else TRY_AGAIN
