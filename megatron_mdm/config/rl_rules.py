"""What reinforcement learning needs of the sections diffusion, batch and rl together."""

from __future__ import annotations

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig


def check_rl(config: RunConfig) -> None:
    """Of a run that names rewards. Raises UserError with the remedy."""
    if not config.rl.is_used:
        if config.data.format == "prompts":
            raise UserError("'data.format' prompts is for reinforcement learning: name its 'rl.rewards', or use sft")
        return
    _check_counts(config)
    _check_prompts(config)
    rl, diffusion = config.rl, config.diffusion
    has_no_rate = rl.estimator == "one_step" or rl.times == "quadrature"
    for broken, message in (
        (
            rl.pairing == "complement" and diffusion.views == 1,
            f"'rl.estimator' {rl.estimator} with complementary rows needs 'diffusion.views' 2",
        ),
        (
            rl.kl == "k2_split" and diffusion.multisample == 1,
            "'rl.kl' k2_split averages over independent rows or pairs: set 'diffusion.multisample' to 2 or more",
        ),
        (
            has_no_rate and diffusion.t_sampler != "uniform",
            f"'diffusion.t_sampler' {diffusion.t_sampler}: with 'rl.estimator' one_step and 'rl.times' quadrature no "
            "rate is drawn; set it to uniform",
        ),
        (
            diffusion.t_sampler == "clipped",
            "'diffusion.t_sampler' clipped: in reinforcement learning, 'rl.rate_range' bounds the rates",
        ),
        (
            diffusion.strata != "none",
            "'diffusion.strata': in reinforcement learning, 'rl.times' stratifies the rates; set it to none",
        ),
    ):
        if broken:
            raise UserError(message)


def _check_counts(config: RunConfig) -> None:
    """A rollout is whole optimizer steps, and these are whole groups."""
    rl, size = config.rl, config.batch.global_size
    if size % rl.num_generations:
        raise UserError(
            f"'batch.global_size' {size} completions are not whole groups of 'rl.num_generations' {rl.num_generations}"
        )
    if rl.num_completions % size:
        raise UserError(
            f"'rl.prompts_per_rollout' × 'rl.num_generations' = {rl.num_completions} completions are not whole "
            f"optimizer steps of 'batch.global_size' {size}"
        )


def _check_prompts(config: RunConfig) -> None:
    rl, data = config.rl, config.data
    if data.too_long == "truncate":
        raise UserError("'data.too_long' truncate would ask another question: use drop or error for 'rl'")
    if rl.gen_length >= data.max_length:
        raise UserError(
            f"'rl.generation.gen_length' {rl.gen_length} leaves no room for prompts in 'data.max_length' "
            f"{data.max_length}; change one of them"
        )
    if rl.evaluate_every and not data.validation and not data.validation_fraction:
        raise UserError(
            "'rl.evaluate_every' is set, but neither 'data.validation' nor 'data.validation_fraction' is; name "
            "held-out prompts, or set it to 0"
        )
