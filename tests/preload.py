"""Imported once by the server that ranks are forked from: what a rank would spend seconds on."""

import gc
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_mdm.parallel import platform

platform.quiet_libraries()

for name in (
    "encodings.idna",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pytest",  # which the modules of tests import
    "scipy.optimize",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.profiler._cupti_monitor",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "torch._subclasses.schema_check_mode",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.module_inject.auto_ep_presets.registry",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles at import
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "megatron_mdm.checkpoint.load",
    "megatron_mdm.cli.main",
    "megatron_mdm.cli.train",
    "megatron_mdm.evaluation.exact_match",
    "megatron_mdm.study.perform",
    "megatron_mdm.study.report",
    "megatron_mdm.training.layout_check",
    "megatron_mdm.training.run",
    "tests.small",
):
    importlib.import_module(name)

_ = importlib.import_module("deepspeed").ops.__compatible_ops__  # probes for compilers once

# A full collection would look through these libraries' objects, some 0.3 s, and DeepSpeed asks for several a rank.
gc.collect()
gc.freeze()
