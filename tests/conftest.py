"""Shared fixtures. Every file a test needs is made here or by the test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from megatron_mdm.parallel import platform

platform.quiet_libraries()
