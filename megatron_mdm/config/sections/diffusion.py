"""The section `diffusion`: how noise is drawn, what of it is calibrated, and how losses add up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_mdm.config.sections.section import Section


class CalibrationConfig(Section):
    """P-POTS calibration (paper, Section 4.1) and re-fitting. See megatron_mdm/diffusion/README.md."""

    artifact: str = ""  # empty: calibrate before training; else the JSON file of an earlier calibration
    num_samples: int = Field(default=15, ge=2)  # a: clean samples of the nested design
    num_times: int = Field(default=70, ge=8)  # b: grid points t_j = j/b; cells of t otherwise
    num_masks: int = Field(default=15, ge=2)  # c: masks per sample and grid point; a·b·c rows are never exceeded
    # token_moments: adaptive, stops at target_efficiency; naive: the paper's, on the whole nested design a × b × c
    estimator: Literal["token_moments", "naive"] = "token_moments"
    density: Literal["token_moments", "epr", "polynomial", "histogram"] = "token_moments"
    target: Literal["second_moment", "paper", "gradient"] = "second_moment"  # whose variance p(t) is to minimise
    initial_forwards: int = Field(default=256, ge=32)  # rows of the first round; each further round doubles them
    # of the lower bound of the efficiency on held-out losses (the density itself is usually better); 1: use all rows
    target_efficiency: float = Field(default=0.95, ge=0.0, le=1.0)
    # target gradient: backward passes of single samples, by which the floor is chosen, where it is 'auto'
    num_gradients: int = Field(default=64, ge=16)
    # lambda: p <- (1 - lambda) p + lambda, in [0.02, 1]; auto: by held-out variance, so that p does no harm
    uniform_floor: float | Literal["auto"] = "auto"
    num_restarts: int = Field(default=20, gt=0)  # of the fit of density epr
    refit_every: int = Field(default=0, ge=0)  # steps between re-fits from the training losses; 0: never
    refit_half_life: int = Field(default=200, gt=0)  # steps after which a loss counts half

    @property
    def is_judged_by_gradients(self) -> bool:
        """Whether the floor is chosen by true gradients, since the target is a proxy of them."""
        return self.target == "gradient" and self.uniform_floor == "auto"

    @model_validator(mode="after")
    def _fits_together(self) -> CalibrationConfig:
        if self.target == "paper" and self.estimator != "naive":
            raise ValueError("target 'paper' needs g and v apart, which only estimator 'naive' gives")
        if self.density == "token_moments" and self.estimator == "naive":
            raise ValueError("density 'token_moments' needs estimator 'token_moments'; choose epr for naive")
        if self.refit_every and self.estimator == "naive":
            raise ValueError("refit_every needs estimator 'token_moments'")
        if self.uniform_floor != "auto" and not 0.0 < self.uniform_floor <= 1.0:
            raise ValueError("uniform_floor must be in (0, 1], or 'auto'")
        return self


class ClippingConfig(Section):
    """t ~ U[lower, upper] (t_sampler: clipped). Biased."""

    bounds: tuple[float, float] | Literal["adaptive"] = (0.3, 0.8)  # adaptive: re-chosen at every validation

    @model_validator(mode="after")
    def _ordered(self) -> ClippingConfig:
        if self.bounds != "adaptive" and not 0.0 <= self.bounds[0] < self.bounds[1] <= 1.0:
            raise ValueError("bounds must be 0 ≤ lower < upper ≤ 1, or 'adaptive'")
        return self


class IsadConfig(Section):
    """Answer delimiters are masked more often. Each is a text, found wherever it stands, or a token id."""

    delimiters: tuple[int | str, ...] = ()  # empty: off
    shift: float = Field(default=0.2, gt=0.0, le=1.0)  # their mask probability is min(1, p_mask(t) + shift)


class SyrmConfig(Section):
    """Syntax tokens of the prompt are masked targets, too. Biased."""

    preset: Literal["none", "html_table", "pipe_table"] = "none"  # data/syntax.py
    tokens: tuple[int | str, ...] = ()  # further texts or token ids

    @property
    def enabled(self) -> bool:
        return self.preset != "none" or bool(self.tokens)


class EmaConfig(Section):
    """A control variate of the reported loss (adjusted_loss in the log). It changes no gradient."""

    enabled: bool = False
    # centred: less the running mean loss of t's bin, plus that mean's expectation: the loss's mean, less variance.
    # paper: less c·b of t's bin, which has a mean of its own: the adjusted loss is another quantity, often noisier.
    variate: Literal["centred", "paper"] = "centred"
    num_bins: int = Field(default=10, gt=0)
    rate: float = Field(default=0.01, gt=0.0, le=1.0)  # alpha


BY_MASKED_TOKENS = "masked"  # a normalisation; no objective is meant
_Weighted = Literal["sample", "token", "batch", "masked"]
_Unweighted = Literal["unweighted", "unweighted_token", "unweighted_batch", "unweighted_masked"]


class DiffusionConfig(Section):
    # p_mask(t) = (1 - epsilon) r(t) + epsilon with r(t) = t (linear), or sin(pi t / 2) (cosine: MMaDA's for images,
    # another objective than the bound that validation measures, whatever is trained).
    mask_schedule: Literal["linear", "cosine"] = "linear"
    epsilon: float = Field(default=1e-3, gt=0.0, lt=1.0)
    t_sampler: Literal["uniform", "ppots", "clipped"] = "uniform"
    views: Literal[1, 2] = 1  # 2: MIRROR, two complementary masks of each sample
    multisample: int = Field(default=1, gt=0)  # k independent masks (MIRROR: pairs of masks) of each sample
    strata: int | Literal["none", "sqrt", "full"] = "none"  # stratified t over the global batch; K or a rule
    # Of P eligible tokens: each with probability p_mask(t) (bernoulli), floor(r(t) P) + 1 (exact_count), or r(t) P
    # rounded, at least 1 (rounded_count: MMaDA's for images). Counts leave epsilon out.
    masking: Literal["bernoulli", "exact_count", "rounded_count"] = "bernoulli"
    # How token losses add up to the global batch's (megatron_mdm/diffusion/README.md says whose code each equals).
    # sample: mean over a sample's eligible tokens, then over samples; token: mean over all eligible tokens; batch: sum
    # over a sample's, then mean over samples; masked: mean over all masked tokens. unweighted…: the same without the
    # weights 1/p_mask. MMaDA's loss of images is unweighted_masked with mask_schedule cosine, masking rounded_count.
    normalization: Literal[_Weighted, _Unweighted] = "sample"
    isad: IsadConfig = IsadConfig()
    syrm: SyrmConfig = SyrmConfig()
    ema: EmaConfig = EmaConfig()
    clipping: ClippingConfig = ClippingConfig()
    calibration: CalibrationConfig = CalibrationConfig()

    @property
    def rows_per_sample(self) -> int:
        return self.views * self.multisample

    @field_validator("strata")
    @classmethod
    def _at_least_two(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 2:
            raise ValueError("must be at least 2 strata, or one of 'none', 'sqrt', 'full'")
        return value
