"""Imported once by the server that runs are forked from."""

import gc
import importlib
import os
import signal
import threading

from megatron_mdm.parallel.environment import STOP_SIGNALS

# Slurm and `timeout` signal every process of a job. The server has to outlive its runs, whose exit codes it passes on.
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

os.environ.setdefault("TQDM_DISABLE", "1")  # runs write to files

from tqdm import tqdm  # noqa: E402

from megatron_mdm.parallel import platform  # noqa: E402

platform.quiet_libraries()
tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a run that is ended would leave behind

for name in ("matplotlib.figure", "scipy.optimize", "megatron_mdm.study.perform"):
    importlib.import_module(name)

gc.collect()
gc.freeze()  # a full collection would look through these libraries' objects in every run
