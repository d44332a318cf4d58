"""The section `rl`: reinforcement learning with verifiable rewards. Names are TRL's where it has them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_mdm.config.sections.section import Section

Normalization = Literal["auto", "masked", "length", "tokens", "elbo"]
Partner = Literal["auto", "mirror", "complement"]
MASKED = "masked"  # an estimator, and a normalisation; no objective is meant

# By rl.estimator: the normalisations that mean something, auto's first (rl/README.md has the table of constants).
NORMALIZATIONS_OF: dict[str, tuple[str, ...]] = {
    "one_step": ("length", "tokens"),
    "masked": ("masked", "length", "tokens", "elbo"),
    "coupled": ("length", "tokens"),
    "elbo": ("length",),
}


GEN_LENGTH = 128  # tokens of a completion, where rl.generation does not say it: generation's own default


class RewardConfig(Section):
    """One reward function, and what it counts."""

    name: str  # of rl/rewards/, or package.module:function, or path/file.py:function
    weight: float = 1.0
    args: dict[str, Any] = Field(default_factory=dict)  # more keyword arguments of the function
    timeout: float = Field(default=0.0, ge=0)  # seconds that one call may take, in a process of its own; 0: no limit


class RlConfig(Section):
    """A step of reinforcement learning: groups of completions of a prompt, their rewards and advantages, and several
    updates on them. It is used where `rewards` names any. rl/README.md has the formulas."""

    rewards: tuple[RewardConfig, ...] = ()
    task: str = "gsm8k"  # whose rule finds the final answer, for the reward exact_match and the validations
    # The estimate of a completion's log-likelihood. one_step: everything masked, the prompt in part (diffu-GRPO);
    # masked: the masked tokens of rows at rate t (UniGRPO); coupled: each token in one of two complementary rows
    # (coupled-GRPO); elbo: the bound of the whole completion (ESPO, GDPO)
    estimator: Literal["one_step", "masked", "coupled", "elbo"] = "masked"
    importance_sampling_level: Literal["token", "sequence"] = "token"  # one ratio a token, or a completion
    num_generations: int = Field(default=8, ge=2)  # completions of a prompt: a group
    prompts_per_rollout: int = Field(default=32, gt=0)
    num_iterations: int = Field(default=4, gt=0)  # updates with every completion of a rollout
    scale_rewards: Literal["none", "group", "batch"] = "group"  # advantages are divided by the standard deviation of
    baseline: Literal["mean", "leave_one_out"] = "mean"  # of the group: what is subtracted from a reward
    mask_truncated_completions: bool = False  # completions without an end count neither in losses nor in their number
    epsilon: float = Field(default=0.2, ge=0)  # the ratio is clipped at 1 − epsilon …
    epsilon_high: float = Field(default=0.0, ge=0)  # … and 1 + epsilon_high; 0: epsilon, too
    # Two-sided clipping: the ratio of what is to become less likely counts as delta at most; 0: without bound
    delta: float = Field(default=0.0, ge=0)
    beta: float = Field(default=0.0, ge=0)  # weight of the divergence from the initial weights; 0: these are not needed
    kl: Literal["k2", "k2_split", "k3"] = "k3"  # its estimate
    # Mask rates of the updates. stratified: of each prompt over its updates, and of each update over its prompts;
    # systematic: one for all prompts, evenly spaced over updates; paper: UniGRPO's formula as printed; iid_sorted:
    # independent draws in ascending order (the paper's appendix A.9); quadrature: the rows of a completion are at the
    # nodes of Gauss–Legendre's rule, of which there are diffusion.multisample (GDPO; estimator elbo)
    times: Literal["stratified", "systematic", "paper", "iid_sorted", "quadrature"] = "stratified"
    importance_weight: bool = True  # 1/p(t) weights a row
    # What the completions of a group have in common: nothing, the mask rate, or the masks by position, too
    share_noise: Literal["none", "group_time", "group_masks"] = "group_time"
    # masked: 1/|M|; length: 1/P; tokens: 1/Σ P of the step; elbo: 1/(P q); auto: masked for that estimator, else length
    normalize: Normalization = "auto"
    scope: Literal["to_eos", "all"] = "to_eos"  # which tokens of a completion are scored
    tail: Literal["noise", "keep", "drop"] = "noise"  # those behind its end: masked like others, shown, or cut off
    rate_range: tuple[float, float] = (0.0, 1.0)  # of the mask rate t
    mask_prompt: float = Field(default=0.0, ge=0, lt=1)  # one_step: each prompt token is masked with this probability
    # With diffusion.views 2, the second row of a pair masks as many tokens, others as far as possible (mirror), or
    # exactly the tokens that the first one shows (complement). auto: complement for estimator coupled, else mirror
    partner: Partner = "auto"
    full_pass: bool = False  # coupled: one more row with everything masked; each token's value is then the mean of two
    pair_weight: Literal["none", "rate"] = "none"  # coupled: rate weights a token by 1/q of the row that masks it
    # Settings of the completions: keys of generation (generation/settings.py) other than seed. Defaults differ there:
    # temperature 1.0, stop_at_eos true, noise device
    generation: dict[str, Any] = Field(default_factory=dict)
    reference: Literal["copy", "host"] = "copy"  # where the initial weights are kept between rollouts
    sync_ref_model: bool = (
        False  # every ref_model_sync_steps steps they become mixup · weights + (1 − mixup) · themselves
    )
    ref_model_sync_steps: int = Field(default=512, gt=0)
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    evaluate_every: int = Field(default=10, ge=0)  # rollouts between exact-match validations, greedy; 0: none
    num_eval_prompts: int = Field(default=256, gt=0)  # the first N of data.validation
    log_completions: int = Field(default=8, ge=0)  # of each rollout, in rollouts/samples.jsonl
    record: bool = False  # keep every rollout in the run's folder (rollouts/)
    replay: str = ""  # a folder of recorded rollouts to train on in place of new ones

    @property
    def is_used(self) -> bool:
        return bool(self.rewards)

    @property
    def num_completions(self) -> int:
        """Of a rollout."""
        return self.prompts_per_rollout * self.num_generations

    @property
    def gen_length(self) -> int:
        """Tokens of a completion, at most."""
        return int(self.generation.get("gen_length", GEN_LENGTH))

    @property
    def clip_range(self) -> tuple[float, float]:
        """The ratio's bounds."""
        return 1.0 - self.epsilon, 1.0 + (self.epsilon_high or self.epsilon)

    @field_validator("rate_range")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 <= value[0] < value[1] <= 1.0:
            raise ValueError("must be two ascending numbers in [0, 1]")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> RlConfig:
        allowed = ("auto", *NORMALIZATIONS_OF[self.estimator])
        if self.normalize not in allowed:
            raise ValueError(
                f"normalize for estimator {self.estimator} is one of {', '.join(allowed)}, not {self.normalize}"
            )
        if self.normalize == "tokens" and self.importance_sampling_level == "sequence":
            raise ValueError("normalize tokens is for importance_sampling_level token, not sequence")
        if (self.estimator, self.partner) in (("coupled", "mirror"), ("one_step", "complement")):
            raise ValueError(f"partner {self.partner} is not for estimator {self.estimator}: leave it at auto")
        if self.times == "quadrature" and self.estimator != "elbo":
            raise ValueError(f"times quadrature is for estimator elbo, not {self.estimator}")
        if self.times == "quadrature" and self.kl == "k2_split":
            raise ValueError("kl k2_split averages over rows of one kind, which times quadrature does not have")
        if self.importance_sampling_level == "sequence" and self.estimator not in ("masked", "elbo"):
            raise ValueError(f"importance_sampling_level sequence needs estimator masked or elbo, not {self.estimator}")
        if self.importance_sampling_level == "token" and self.estimator == "elbo":
            raise ValueError("estimator elbo is of whole completions: set importance_sampling_level to sequence")
        if self.delta and self.delta <= self.clip_range[1]:
            raise ValueError(f"delta {self.delta} must be more than 1 + epsilon_high, {self.clip_range[1]:g}, or 0")
        if self.mask_prompt and self.estimator != "one_step":
            raise ValueError(f"mask_prompt is for estimator one_step, not {self.estimator}")
        for name, unset in (("full_pass", False), ("pair_weight", "none")):
            if getattr(self, name) != unset and self.estimator != "coupled":
                raise ValueError(f"{name} is for estimator coupled, not {self.estimator}")
        if self.kl == "k2_split" and self.importance_sampling_level == "token":
            raise ValueError("kl k2_split averages over rows: it needs importance_sampling_level sequence")
        return self

    @property
    def normalization(self) -> str:
        """normalize, with the estimator's own for auto."""
        return NORMALIZATIONS_OF[self.estimator][0] if self.normalize == "auto" else self.normalize

    @property
    def pairing(self) -> str:
        """partner, with the estimator's own for auto."""
        if self.partner != "auto":
            return self.partner
        return "complement" if self.estimator == "coupled" else "mirror"
