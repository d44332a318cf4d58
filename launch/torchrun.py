"""torchrun, less the traceback it prints when a rank has already said in one line what is wrong."""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks on one machine must not fight for its cores
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM: the agent ended it
                name = signal.Signals(-failure.exitcode).name
                print(f"error: rank {rank} was ended by {name}; the other ranks were stopped", file=sys.stderr)
        return 1  # a rank that ended with an exit code has printed its reason
    return 0


if __name__ == "__main__":
    sys.exit(main())
