"""Imported once by the server that ranks are forked from."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_mdm.parallel import platform

platform.quiet_libraries()
