"""What token weights amount to on average, against drawn masks: ISAD, samples of several lengths, every rule."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mdm.diffusion.exposure import SampleShapes, average_batch, exposure
from megatron_mdm.diffusion.mask_schedule import LinearSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES, MaskDesign
from megatron_mdm.diffusion.objective import NORMALIZATIONS, GlobalBatch
from tests.diffusion.toy import draw

SCHEDULE = LinearSchedule(0.1)  # bounds the weights 1/q, so that means settle
# of a data set's samples
ELIGIBLE = np.array([3, 8, 8, 8])
DELIMITERS = np.array([1, 2, 2, 2])
TIMES = np.array([0.05, 0.4, 0.9])
NUM_DRAWS = 1200


def drawn_sums(
    design: MaskDesign, batch: GlobalBatch, t: float, sample: int, generator: np.random.Generator
) -> list[list[float]]:
    """For each normalisation Σ w, Σ w², Σ_{i≠j} w w, each a mean over the rows, and Σ w w' over ordered pairs of
    different rows."""
    delimiters = np.arange(ELIGIBLE[sample]) < DELIMITERS[sample]
    masking = draw(design, generator, t, delimiters)
    eligible = np.full(len(delimiters), float(len(delimiters)))
    result = []
    for normalization in NORMALIZATIONS.values():
        weights = masking.masked * normalization.token_weight(masking.probability, eligible, batch)
        total = weights.sum(1)
        squares = np.square(weights).sum(1)
        pairs = total**2 - squares
        result.append([total.mean(), squares.mean(), pairs.mean(), total.sum() ** 2 - np.square(total).sum()])
    return result


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("rule", MASKING_RULES)
def test_exposure_agrees_with_drawn_masks(rule: str, complementary: bool) -> None:
    """Every sample counts as often as it stands in the data set, and delimiters by their own probability."""
    design = MaskDesign(MASKING_RULES[rule], SCHEDULE, complementary, repeats=2, delimiter_shift=0.2)
    shapes = SampleShapes.of(ELIGIBLE, DELIMITERS)
    generator = np.random.default_rng(0)
    batch = average_batch(design, shapes)
    known = [exposure(design, shapes, normalization, batch, TIMES) for normalization in NORMALIZATIONS.values()]
    for index, t in enumerate(TIMES):
        # Each sample as often as the others, so that means over the draws are those over the data set.
        draws = np.array([drawn_sums(design, batch, t, place % len(ELIGIBLE), generator) for place in range(NUM_DRAWS)])
        expected = [[getattr(one, name)[index] for name in ("total", "squares", "pairs", "cross")] for one in known]
        assert (np.abs(draws.mean(0) - expected) <= 4.5 * draws.std(0) / NUM_DRAWS**0.5 + 1e-9).all()
