"""What an objective is: everything about a run that depends on what is trained.

The other packages are given its callables and values, never its name. A new objective is a class with these members in
a file of its own, and an entry in OBJECTIVES (objectives/__init__.py); masked.py and autoregressive.py are examples,
and may be subclassed, as in text_to_image.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from megatron_mdm.batch import CleanBatch, LossWeights, ModelInputs
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.sections.objective import ObjectiveOptions
from megatron_mdm.data.caption_dropout import CaptionDropout
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.diffusion.objective import Normalization
from megatron_mdm.evaluation.likelihood import Scoring
from megatron_mdm.evaluation.validation import Validation
from megatron_mdm.generation.generate import Decoder
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.parallel.groups import ParallelContext

if TYPE_CHECKING:  # megatron-core, which reports do without
    from megatron_mdm.data.splits import Dataset


class Noise(Protocol):
    """What of a clean micro-batch is hidden and scored. diffusion.noiser.Noiser is one.

    Pure in (seed, step, position in the global batch, view) and in what times() gives: the same on every layout, and in
    resumed runs. A step's noise may be drawn on another thread, while the step before is trained.
    """

    @property
    def views(self) -> int:
        """Rows of the model per sample: diffusion.rows_per_sample."""
        ...

    def times(self, step: int) -> tuple[Floats, Floats]:
        """Mask rate t and importance weight 1/p(t) of the whole global batch at a step, [n] each, by position."""
        ...

    def mask_probability(self, t: Floats) -> Floats:
        """The mask probability of an ordinary position at mask rates t, of any shape, for the moments of losses."""
        ...

    def __call__(self, batch: CleanBatch, step: int) -> NoisedBatch: ...


class Description(NamedTuple):
    """What plan, dry run and reports say of an objective."""

    label: str  # tells runs apart that are compared, and is the same for those that differ in their seeds only
    text: str  # a line
    has_rates: bool  # whether the mask rate t means anything


class Objective(Protocol):
    """What is trained. Made from a configuration; it holds no state, and what it draws is in its Noise."""

    Options: ClassVar[type[ObjectiveOptions]]  # the keys of the section `objective`
    options: ObjectiveOptions  # that section, defaults filled in

    def __init__(self, config: RunConfig, options: ObjectiveOptions) -> None: ...

    # The configuration, before anything is read

    def check(self) -> None:
        """Raise UserError, with the remedy, where other sections do not go with the objective."""
        ...

    def warnings(self) -> list[str]:
        """Combinations that are allowed but whose parts go ill together, one line each."""
        ...

    @property
    def attention(self) -> str:
        """The model's attention, bidirectional or causal: it becomes model.attention."""
        ...

    def check_data(self, train: Dataset) -> None:
        """Raise UserError where the training samples do not do."""
        ...

    # Training: clean → noised → weighted → the model's inputs

    def noise(self, cell_density: Floats, mask_id: int) -> Noise:
        """The noise of a run. cell_density: the calibration's, where the sampler of t needs one."""
        ...

    @property
    def normalization(self) -> Normalization:
        """How token losses add up to the global batch's."""
        ...

    @property
    def design(self) -> MaskDesign:
        """How the masks are drawn that p(t) is calibrated for. Raises UserError where no masks are drawn."""
        ...

    @property
    def caption_dropout(self) -> CaptionDropout | None:
        """Which images of a step training, and calibration, show without their caption."""
        ...

    def inputs(self, noised: NoisedBatch, weights: LossWeights) -> ModelInputs:
        """What the model takes of a micro-batch, on the host."""
        ...

    def validation(self, data: Dataset, special: SpecialIds, context: ParallelContext) -> Validation: ...

    # The trained model (evaluation/trained.py)

    @property
    def decoder(self) -> Decoder: ...

    @property
    def scoring(self) -> Scoring: ...

    # What people read

    @property
    def description(self) -> Description: ...

    @property
    def scored_share(self) -> float:
        """The average share of the eligible positions that reach the vocabulary: for plans."""
        ...
