"""Masked diffusion: tokens are masked at a rate t and predicted from the others (the section `diffusion`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from megatron_mdm.batch import LossWeights, ModelInputs
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import DiffusionConfig, RunConfig, Section
from megatron_mdm.config.sections.objective import ObjectiveOptions
from megatron_mdm.data.caption_dropout import CaptionDropout
from megatron_mdm.diffusion.mask_schedule import Floats, LinearSchedule
from megatron_mdm.diffusion.masking import MaskDesign
from megatron_mdm.diffusion.noiser import NoisedBatch, Noiser
from megatron_mdm.diffusion.objective import NORMALIZATIONS, Normalization
from megatron_mdm.diffusion.t_samplers import (
    CALIBRATED_SAMPLERS,
    CENTRES,
    FULL_RANGE,
    T_SAMPLERS,
    SamplerInputs,
    number_of_strata,
)
from megatron_mdm.engine.inputs import loss_inputs
from megatron_mdm.evaluation.likelihood import MASK_BOUND, Scoring
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.generation.generate import Decoder
from megatron_mdm.generation.sampler import denoise
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.objectives.base import Description
from megatron_mdm.parallel.groups import ParallelContext

if TYPE_CHECKING:  # megatron-core, which reports do without
    from megatron_mdm.data.splits import Dataset


class Masked:
    """An Objective (base.py), whose settings are those of the section `diffusion`."""

    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    attention = "bidirectional"

    def __init__(self, config: RunConfig, options: ObjectiveOptions) -> None:
        self.config = config
        self.options = options

    def check(self) -> None:
        config = self.config
        diffusion = self.config.diffusion
        if config.model.attention != self.attention:
            raise UserError("'model.attention' causal is for 'objective.name' autoregressive; use bidirectional")
        strata = diffusion.strata
        if isinstance(strata, int) and strata > config.batch.global_size:
            raise UserError(f"'diffusion.strata' {strata} exceeds 'batch.global_size' {config.batch.global_size}")
        needs_prompts = {
            "diffusion.syrm": diffusion.syrm.enabled,
            "diffusion.isad.delimiters": bool(diffusion.isad.delimiters),
        }
        for name, used in needs_prompts.items():
            if used and config.data.format != "sft":
                raise UserError(f"'{name}' is for 'data.format' sft: {config.data.format} has no prompts with answers")
        if diffusion.t_sampler == "clipped" and diffusion.clipping.bounds == "adaptive" and not config.evaluation.every:
            raise UserError(
                "'diffusion.clipping.bounds' adaptive chooses its interval at validations; set 'evaluation.every'"
            )
        if diffusion.clipping.bounds == "adaptive" and diffusion.mask_schedule != "linear":
            raise UserError(
                "'diffusion.clipping.bounds' adaptive chooses t by validation losses, which are those of "
                f"'diffusion.mask_schedule' linear, not {diffusion.mask_schedule}; give two numbers"
            )
        _check_calibration(diffusion)

    def warnings(self) -> list[str]:
        diffusion = self.config.diffusion
        found = []
        if diffusion.ema.enabled and diffusion.strata != "none":
            found.append(
                "'diffusion.ema' with 'diffusion.strata': the paper advises against the two together, since stratified "
                "t leaves the control variate little to explain"
            )
        if diffusion.t_sampler in CALIBRATED_SAMPLERS and self.normalization.counts_masked:
            found.append(
                f"'diffusion.normalization' {diffusion.normalization} divides by the batch's masked tokens, which "
                f"'diffusion.t_sampler' {diffusion.t_sampler} takes to be as many as on average: p(t) is calibrated "
                "for the sum alone"
            )
        if self.config.rl.is_used and self.config.parallel.pipeline > 1:
            found.append(
                f"'parallel.pipeline' {self.config.parallel.pipeline} decodes one batch at a time: rollouts take as "
                "long as on one stage; tensor parallelism or ZeRO 3 splits a model without that"
            )
        return found

    def check_data(self, train: Dataset) -> None:
        if self.config.diffusion.t_sampler in CALIBRATED_SAMPLERS and len(train) < 2:
            raise UserError(f"{self.config.data.train}: calibration needs at least 2 training samples")

    def noise(self, cell_density: Floats, mask_id: int) -> Noiser:
        diffusion = self.config.diffusion
        global_size = self.config.batch.global_size
        bounds = diffusion.clipping.bounds
        inputs = SamplerInputs(cell_density, FULL_RANGE if bounds == "adaptive" else bounds)
        return Noiser(
            design=self.design,
            sampler=T_SAMPLERS[diffusion.t_sampler](inputs),
            num_strata=number_of_strata(diffusion.strata, global_size),
            global_size=global_size,
            mask_id=mask_id,
            seed=self.config.seed,
        )

    @property
    def normalization(self) -> Normalization:
        return NORMALIZATIONS[self.config.diffusion.normalization]

    @property
    def design(self) -> MaskDesign:
        return MaskDesign.of(self.config.diffusion)

    @property
    def caption_dropout(self) -> CaptionDropout | None:
        return None

    def inputs(self, noised: NoisedBatch, weights: LossWeights) -> ModelInputs:
        return loss_inputs(noised, weights)

    def validation(self, data: Dataset, special: SpecialIds, context: ParallelContext) -> FixedGridValidation:
        config = self.config
        diffusion = self.config.diffusion
        schedule = LinearSchedule(diffusion.epsilon)  # whatever is trained, so that runs can be compared: a bound
        rows = config.batch.micro_size * diffusion.rows_per_sample
        return FixedGridValidation(data, config.evaluation, schedule, special, rows, context, self.inputs)

    @property
    def decoder(self) -> Decoder:
        return denoise

    @property
    def scoring(self) -> Scoring:
        return MASK_BOUND

    @property
    def scored_share(self) -> float:
        return float(self.design.schedule.rate(CENTRES).mean())

    @property
    def description(self) -> Description:
        diffusion = self.config.diffusion
        own = _changed(self.options)  # a subclass's name and keys
        changed = [*own, *_changed(diffusion, but="calibration")]
        views = f"{diffusion.views} view{'s' * (diffusion.views > 1)}"
        repeats = f" × {diffusion.multisample}" * (diffusion.multisample > 1)
        text = f"{diffusion.t_sampler} t, {views}{repeats}, strata {diffusion.strata}, {diffusion.masking} masks"
        text = ", ".join([*own, text])
        return Description(", ".join(changed) or "standard", text, has_rates=True)


def _changed(section: Section, but: str = "") -> list[str]:
    """The keys of a section that have not their default, with their values."""
    fields = type(section).model_fields.items()
    return [
        f"{name} {getattr(section, name)}"
        for name, field in fields
        if name != but and getattr(section, name) != field.default
    ]


def _check_calibration(diffusion: DiffusionConfig) -> None:
    calibration = diffusion.calibration
    rows = diffusion.rows_per_sample
    if calibration.refit_every and diffusion.t_sampler not in CALIBRATED_SAMPLERS:
        raise UserError("'diffusion.calibration.refit_every' needs 'diffusion.t_sampler' ppots")
    if calibration.estimator == "naive" and calibration.num_samples * calibration.num_masks < 4 * rows:
        raise UserError(
            "'diffusion.calibration': estimator naive measures 2 samples with 2 groups of masks at least, of "
            f"{rows} rows each here: raise 'num_samples' times 'num_masks' to {4 * rows}"
        )
