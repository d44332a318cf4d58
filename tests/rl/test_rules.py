"""What a configuration of reinforcement learning may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.rl_rules import check_rl
from megatron_mdm.config.schema import RlConfig
from tests.small import small_config

REWARDED: dict[str, Any] = {"rewards": [{"name": "exact_match"}]}
SEQUENCE = {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize("estimator", ["one_step", "masked", "coupled", "elbo"])
def test_what_a_run_writes_is_what_it_reads(estimator: str) -> None:
    """Its config.yaml holds every key."""
    rl = RlConfig(estimator=estimator, **(SEQUENCE if estimator == "elbo" else {}))
    assert RlConfig(**rl.model_dump()) == rl
    assert rl.pairing == ("complement" if estimator == "coupled" else "mirror")
    assert rl.normalization == ("length" if estimator != "masked" else estimator)


@pytest.mark.parametrize(
    ("rl", "said"),
    [
        ({"estimator": "one_step", "normalize": "elbo"}, "normalize for estimator one_step"),
        ({"estimator": "elbo"}, "importance_sampling_level to sequence"),
        ({"estimator": "coupled", **SEQUENCE}, "needs estimator masked or elbo"),
        ({"normalize": "tokens", **SEQUENCE}, "normalize tokens"),
        ({"estimator": "coupled", "partner": "mirror"}, "partner mirror"),
        ({"estimator": "one_step", "partner": "complement"}, "partner complement"),
        ({"times": "quadrature"}, "times quadrature is for estimator elbo"),
        ({"estimator": "elbo", **SEQUENCE, "times": "quadrature", "kl": "k2_split"}, "of one kind"),
        ({"kl": "k2_split"}, "k2_split"),
        ({"mask_prompt": 0.1}, "mask_prompt"),
        ({"full_pass": True}, "full_pass"),
        ({"rate_range": (0.8, 0.2)}, "ascending"),
        ({"epsilon_high": 0.5, "delta": 1.5}, "delta 1.5 must be more than 1 \\+ epsilon_high, 1.5, or 0"),
    ],
)
def test_rules_of_the_section(rl: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RlConfig(**rl)


@pytest.mark.parametrize(
    ("rl", "diffusion", "said"),
    [
        ({"estimator": "coupled"}, {}, "needs 'diffusion.views' 2"),
        ({"partner": "complement"}, {}, "needs 'diffusion.views' 2"),
        ({"kl": "k2_split", **SEQUENCE}, {"views": 2}, "'diffusion.multisample' to 2"),
        ({"estimator": "one_step"}, {"t_sampler": "ppots"}, "no rate is drawn"),
        ({"estimator": "elbo", **SEQUENCE, "times": "quadrature"}, {"t_sampler": "ppots"}, "no rate is drawn"),
        ({}, {"t_sampler": "clipped"}, "'rl.rate_range' bounds"),
        ({}, {"strata": "full"}, "'rl.times' stratifies"),
        ({"num_generations": 6}, {}, "whole groups"),
        ({"prompts_per_rollout": 5}, {}, "whole optimizer steps"),
    ],
)
def test_rules_across_sections(rl: dict[str, Any], diffusion: dict[str, Any], said: str, tmp_path: Path) -> None:
    generation = {"gen_length": 16, "block_length": 8, "steps": 16}
    rl = {"num_generations": 4, "prompts_per_rollout": 8, "evaluate_every": 0, "generation": generation, **rl}
    sections = {"diffusion": diffusion, "batch": {"global_size": 16, "micro_size": 4}}
    check_rl(small_config(tmp_path, rl=rl, **sections))  # without rewards there is nothing to check
    with pytest.raises(UserError, match=said):
        check_rl(small_config(tmp_path, rl={**rl, **REWARDED}, data={"format": "prompts"}, **sections))
