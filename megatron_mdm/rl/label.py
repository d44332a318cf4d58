"""What tells runs of reinforcement learning apart that are compared."""

from __future__ import annotations

from megatron_mdm.config.schema import RunConfig


def label(config: RunConfig) -> str:
    """Estimate and noise in a few words, the same for runs that differ in their seeds only."""
    rl, diffusion = config.rl, config.diffusion
    rows = diffusion.rows_per_sample + rl.full_pass
    words = [f"{rl.estimator} by {rl.importance_sampling_level}", f"{rows} row{'s' * (rows > 1)}"]
    if rl.estimator != "one_step":
        words.append(f"rates {rl.times}" + (f" ({rl.share_noise})" if rl.share_noise != "none" else ""))
        if diffusion.t_sampler != "uniform":
            words.append(diffusion.t_sampler)
        if diffusion.views > 1 and rl.estimator != "coupled":
            words.append(rl.pairing)
    if rl.beta:
        words.append(f"beta {rl.beta:g}")
    words.append(f"{rl.num_iterations} update{'s' * (rl.num_iterations > 1)}")
    return ", ".join([*words, *(reward.name for reward in rl.rewards)])
