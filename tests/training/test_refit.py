"""Re-fitting's memory: two halves of the steps, forgotten by half in every half-life."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_mdm.config.schema import CalibrationConfig
from megatron_mdm.diffusion.calibrator import NUM_FOLDS, Calibrator
from megatron_mdm.diffusion.moments import Moments
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.refit import Refit
from megatron_mdm.training.state import TrainState

NUM_CELLS = 8
HALF_LIFE = 2.0  # steps
NUM_SAMPLES = 6  # of a step


def refit(folder: Path) -> Refit:
    settings = CalibrationConfig(refit_every=100, refit_half_life=HALF_LIFE, num_times=NUM_CELLS)
    empty = np.zeros((NUM_FOLDS, NUM_CELLS, len(Moments._fields)))
    artifact = {"cell_density": [1.0] * 16, "moments": empty.tolist(), "uniform_floor": 0.0}
    calibrator: Any = Calibrator(settings, None, 0)  # type: ignore[arg-type]  # without a fit, no exposure is asked for
    return Refit(calibrator, None, artifact, MetricsLog(folder, False, True, 0))  # type: ignore[arg-type]


def after(callback: Refit, steps: range) -> list[float]:
    """The groups that each half, and the sums since the last re-fit, count after these steps."""
    moments = np.ones((NUM_SAMPLES, len(Moments._fields))) * 0.5
    moments[:, Moments._fields.index("one")] = 1.0
    for step in steps:
        result: Any = SimpleNamespace(step=step, is_skipped=False, moments=moments)
        callback.after_step(TrainState(step=step + 1), result)
    sums = callback.state_dict()["moment_sums"]
    return [float(np.array(part)[:, Moments._fields.index("one")].sum()) for part in sums]


def test_even_and_odd_steps_make_a_half_each_and_are_forgotten(tmp_path: Path) -> None:
    kept = 0.5 ** (1.0 / HALF_LIFE)  # of a step's groups, by every later step
    counts = np.array(after(refit(tmp_path), range(4))) / NUM_SAMPLES
    np.testing.assert_allclose(counts, [kept**3 + kept, kept**2 + 1.0, 4.0])


def test_a_resumed_run_has_the_same_memory(tmp_path: Path) -> None:
    whole = refit(tmp_path)
    first = refit(tmp_path)
    resumed = refit(tmp_path)
    expected = after(whole, range(6))
    after(first, range(3))
    resumed.load_state_dict(first.state_dict())
    assert after(resumed, range(3, 6)) == expected
