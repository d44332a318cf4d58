"""The ways of drawing an update's noise whose gradients are compared: published ones, and ours a step at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_mdm.config.schema import BatchConfig, DiffusionConfig, RlConfig, RunConfig
from megatron_mdm.rl.variance import Kind


class Design(NamedTuple):
    rl: dict[str, Any]  # fields of the sections
    diffusion: dict[str, Any]
    ppots: bool = False  # rates from the density fitted to the gradients of DENSITY_FROM
    by_group: bool = False  # strata within each group in place of over groups
    exact: bool = True  # its mean is g*, the gradient of the bound

    @property
    def kind(self) -> Kind:
        over_groups = self.rl.get("times", "stratified") == "stratified" and self.rl.get("estimator") != "one_step"
        return Kind(self.exact, self.by_group or not over_groups)


_INDEPENDENT = {"share_noise": "none", "times": "iid_sorted"}
_SEQUENCE = {"estimator": "elbo", "importance_sampling_level": "sequence"}
_COUNTS = {"masking": "exact_count"}

FIRST = "independent rates"  # what noise is relative to
DENSITY_FROM = "rate shared in a group"
DESIGNS: dict[str, Design] = {
    FIRST: Design(_INDEPENDENT, _COUNTS),
    "strata over completions": Design({"share_noise": "none"}, _COUNTS),
    "strata within groups": Design({"share_noise": "none"}, _COUNTS, by_group=True),
    DENSITY_FROM: Design({"times": "iid_sorted"}, _COUNTS),
    "rate shared, strata over groups": Design({}, _COUNTS),
    "rate shared, strata, Bernoulli": Design({}, {}, exact=False),
    "rate and masks shared, strata": Design({"share_noise": "group_masks"}, _COUNTS),
    "P-POTS, independent rates": Design(_INDEPENDENT, _COUNTS, ppots=True),
    "P-POTS, no weight, independent rates": Design(
        {**_INDEPENDENT, "importance_weight": False}, _COUNTS, ppots=True, exact=False
    ),
    "P-POTS, shared, strata": Design({}, _COUNTS, ppots=True),
    "two masks, independent rates": Design(_INDEPENDENT, {**_COUNTS, "multisample": 2}),
    "MIRROR, independent rates": Design(_INDEPENDENT, {**_COUNTS, "views": 2}),
    "MIRROR, shared, strata": Design({}, {**_COUNTS, "views": 2}),
    "MIRROR, rate and masks shared, strata": Design({"share_noise": "group_masks"}, {**_COUNTS, "views": 2}),
    "P-POTS + MIRROR, shared, strata": Design({}, {**_COUNTS, "views": 2}, ppots=True),
    "complement (elbo weights), shared, strata": Design(
        {"partner": "complement", "normalize": "elbo"}, {**_COUNTS, "views": 2}
    ),
    "diffu_grpo": Design({"estimator": "one_step", "mask_prompt": 0.15}, {}, exact=False),
    "unigrpo (printed rates)": Design({"times": "paper", "importance_weight": False}, {}, exact=False),
    "coupled_grpo": Design(
        {"estimator": "coupled", "full_pass": True, "pair_weight": "rate", "rate_range": (0.2, 0.8)},
        {"views": 2},
        exact=False,
    ),
    "espo": Design(
        {**_SEQUENCE, "share_noise": "none", "partner": "complement"}, {**_COUNTS, "views": 2, "multisample": 2}
    ),
    "espo, shared, strata": Design({**_SEQUENCE, "partner": "complement"}, {**_COUNTS, "views": 2, "multisample": 2}),
    "gdpo": Design({**_SEQUENCE, "times": "quadrature"}, {**_COUNTS, "multisample": 2}, exact=False),
}


def target(rows: int) -> Design:
    """g*: the bound by many rows, in mirrored pairs."""
    return Design(_SEQUENCE, {**_COUNTS, "views": 2, "multisample": rows // 2})


def config_of(config: RunConfig, design: Design, num_groups: int) -> RunConfig:
    """A run's configuration with a design: one update with all groups, no divergence."""
    kept = config.rl.model_dump(
        include={"num_generations", "scope", "tail", "epsilon", "epsilon_high", "delta", "rewards"}
    )
    rl = RlConfig(**{**kept, "prompts_per_rollout": num_groups, "num_iterations": 1, **design.rl})
    diffusion = config.diffusion.model_dump(include={"epsilon", "mask_schedule"})
    size = rl.num_generations
    batch = BatchConfig(global_size=size if design.by_group else rl.num_completions, micro_size=size, mode="padded")
    changes = {"rl": rl, "diffusion": DiffusionConfig(**{**diffusion, **design.diffusion}), "batch": batch}
    return config.model_copy(update=changes)
