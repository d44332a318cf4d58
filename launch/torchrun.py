"""torchrun, less the traceback it prints when a rank has already said in one line what is wrong."""

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks on one machine must not fight for its cores
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if 1 not in codes:  # 1: that rank printed its reason; the agent ended the others
            print(f"error: ranks ended with exit codes {sorted(codes)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
