"""A validation loss without noise of its own: a fixed stratified grid of t with common random numbers.

The same (sample, t, mask) triples at every validation, in every run and for every training method: curves of different
samplers can be compared, and the noise of t and of the masks cancels from their differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_mdm.config.schema import EvaluationConfig
from megatron_mdm.diffusion.exposure import Exposures, SampleShapes, exposures
from megatron_mdm.diffusion.mask_schedule import Floats, MaskSchedule
from megatron_mdm.diffusion.masking import MASKING_RULES, MaskDesign
from megatron_mdm.diffusion.moments import RowSums, group_moments
from megatron_mdm.diffusion.objective import NORMALIZATIONS
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.engine.base import Forward
from megatron_mdm.engine.inputs import loss_inputs
from megatron_mdm.evaluation.losses import Inputs, LossMeasurement
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.parallel.groups import ParallelContext

if TYPE_CHECKING:  # megatron-core, which reports do without
    from megatron_mdm.data.splits import Dataset

_VALIDATION_SEED = 0  # of masks and grid: not the run's seed, so that runs can be compared


class Validation(Protocol):
    def __call__(self, engine: Forward) -> float:
        """A run's validation loss, nats per target token. Collective; the same on every rank."""
        ...


class FixedGridValidation:
    """The bound on −log p(x0)/P of a sample (paper, Eq. 1), averaged over uniform t and over the samples."""

    def __init__(
        self,
        data: Dataset,
        config: EvaluationConfig,
        schedule: MaskSchedule,
        special: SpecialIds,
        micro_size: int,
        context: ParallelContext,
        inputs: Inputs = loss_inputs,
    ) -> None:
        """micro_size: rows of a forward pass. inputs: what the model takes of a noised micro-batch."""
        self.schedule = schedule
        self.design = MaskDesign(MASKING_RULES["bernoulli"], schedule)
        self.normalization = NORMALIZATIONS["sample"]
        self.measure = LossMeasurement(data, self.design, self.normalization, special, micro_size, context, inputs)
        samples = np.tile(np.arange(min(config.num_samples, len(data))), config.num_times)
        self.samples = samples[np.argsort(data.lengths()[samples], kind="stable")]
        strata = stream(_VALIDATION_SEED, Purpose.VALIDATION).permutation(len(self.samples))
        self.t = (strata + 0.5) / len(self.samples)
        self.rows = RowSums(*np.zeros((len(RowSums._fields), len(self.samples), 1)))

    def __call__(self, engine: Forward) -> float:
        """Mean loss over the grid, nats per eligible token. Collective; the same on every rank."""
        self.rows = self.measure(
            engine, self.samples, self.t, lambda place: stream(_VALIDATION_SEED, Purpose.VALIDATION, 1, place)
        )
        return float(self.losses.mean())

    @property
    def losses(self) -> Floats:
        """Losses of the last validation, at self.t."""
        return self.rows.loss[:, 0]

    def moments(self) -> tuple[Floats, Exposures]:
        """Moments of the last validation's losses (uniform t, one Bernoulli mask), for judging a density of t."""
        shapes = SampleShapes.of(self.measure.data.num_eligible(), np.zeros(len(self.measure.data), dtype=np.int64))
        q = self.schedule.mask_probability(self.t)
        return group_moments(self.t, q, self.rows), exposures(self.design, shapes, self.normalization)
