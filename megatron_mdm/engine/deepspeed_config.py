"""Our sections → the mapping that DeepSpeed is configured with."""

from __future__ import annotations

from typing import Any

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import accumulation_steps


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Raw keys of the `deepspeed` section are added; validate.py has refused those that the stack owns."""
    raw = dict(config.deepspeed)
    zero = {
        "stage": config.parallel.zero,
        "overlap_comm": False,
        "reduce_scatter": True,
        **raw.pop("zero_optimization", {}),
    }
    if config.parallel.zero == 3:
        # Small parameters would stay whole and be updated on every rank; one rule for all keeps layouts comparable.
        zero.setdefault("stage3_param_persistence_threshold", 0)
    return {
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optimizer.gradient_clipping,
        "bf16": {"enabled": config.precision.dtype == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **raw,
    }
