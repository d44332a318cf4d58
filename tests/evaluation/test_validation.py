"""The grid of (sample, t) that validations share."""

from __future__ import annotations

import numpy as np

from megatron_mdm.config.schema import EvaluationConfig
from megatron_mdm.data.sample import Sample
from megatron_mdm.data.sft import SftDataset
from megatron_mdm.diffusion.mask_schedule import LinearSchedule
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.generation.settings import SpecialIds
from tests.ranks import run_ranks


def grids() -> list[tuple[np.ndarray, np.ndarray]]:
    from megatron_mdm.parallel.groups import initialize

    generator = np.random.default_rng(0)
    samples = [Sample.of(np.arange(int(n), dtype=np.int32), 2) for n in generator.integers(4, 20, 11)]
    settings = EvaluationConfig(num_samples=7, num_times=4)
    found = []
    for _ in range(2):
        validation = FixedGridValidation(
            SftDataset(samples, 0, ""), settings, LinearSchedule(1e-3), SpecialIds(60, 0, 1), 2, initialize()
        )
        found.append((validation.samples, validation.t))
    return found


def test_t_is_an_even_grid_over_all_of_the_losses() -> None:
    """Every sample num_times times, and together the middles of as many equal strata of [0, 1] as there are losses:
    the same ones at every validation."""
    (samples, t), again = run_ranks(grids, 1)[0]
    assert np.array_equal(np.bincount(samples), np.full(7, 4))
    assert np.array_equal(np.sort(t), (np.arange(28) + 0.5) / 28)
    assert np.array_equal(samples, again[0])
    assert np.array_equal(t, again[1])
    assert abs(np.corrcoef(np.arange(28), t)[0, 1]) < 0.6  # samples are in order of length: t must not be, too
