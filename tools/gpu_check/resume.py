"""A run that was saved after two steps and restored takes the same next steps as the one that went on, bit for bit.

With kernels that are deterministic; what the others change, as attention's backward pass does, is a figure.
"""

from __future__ import annotations

import warnings
from typing import Any

from megatron_mdm.checkpoint.store import CheckpointStore
from tools.gpu_check.measure import deterministic_kernels
from tools.gpu_check.outcome import Outcome, Setting
from tools.gpu_check.small_runs import begin, quickstart

SAVED_AFTER = 2
NUM_STEPS = 4


def check(setting: Setting) -> Outcome:
    overrides = [
        "precision.dtype=bf16",
        "parallel.zero=1",
        "diffusion.t_sampler=uniform",
        "batch.mode=packed",
    ]
    config = quickstart(setting.folder, setting.quick, overrides)
    figures: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as told, deterministic_kernels():
        whole = begin(config)
        whole.steps(0, SAVED_AFTER)
        store = CheckpointStore(setting.folder / "checkpoints", config.checkpoint, whole.context)
        store.save(SAVED_AFTER, whole.trainer.engine, {})
        store.finish()
        saved = setting.folder / "checkpoints" / f"step-{SAVED_AFTER:08d}"
        expected = whole.steps(SAVED_AFTER, NUM_STEPS), whole.digest()
        restored = begin(config, saved, SAVED_AFTER)
        found = restored.steps(SAVED_AFTER, NUM_STEPS), restored.digest()
    without = "deterministic"
    figures["operations without a deterministic kernel"] = sorted(
        {str(warning.message).split(" does not have")[0] for warning in told if without in str(warning.message)}
    )
    figures["steps of the whole run"] = [list(step) for step in expected[0]]
    figures["steps of the restored run"] = [list(step) for step in found[0]]
    figures["weights and moments are the same bits"] = found[1] == expected[1]
    other = begin(config, saved, SAVED_AFTER).steps(SAVED_AFTER, NUM_STEPS)
    figures["without deterministic kernels: losses are off by"] = [
        abs(mine[0] / theirs[0] - 1.0) for mine, theirs in zip(other, expected[0])
    ]
    faults = []
    if found != expected:
        faults.append(f"the restored run is another: {found[0]} instead of {expected[0]} (loss, gradient norm)")
    return Outcome(figures, faults)
