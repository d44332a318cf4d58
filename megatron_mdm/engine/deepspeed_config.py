"""Our sections → the mapping that DeepSpeed is configured with."""

from __future__ import annotations

from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import accumulation_steps


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Raw keys of the `deepspeed` section are added; validate.py has refused those that the
    stack owns."""
    raw = {key: value for key, value in config.deepspeed.items() if key not in ("zero_optimization", "data_types")}
    zero = {
        "stage": config.parallel.zero,
        "overlap_comm": False,
        "reduce_scatter": True,
        **subsection(config, "zero_optimization"),
    }
    if config.parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", **subsection(config, "zero_optimization", "offload_optimizer")}
    if config.parallel.offload == "all":
        zero["offload_param"] = {"device": "cpu", **subsection(config, "zero_optimization", "offload_param")}
    if config.parallel.zero == 3:
        # Small parameters would stay whole and be updated on every rank; one rule for all keeps layouts comparable.
        zero.setdefault("stage3_param_persistence_threshold", 0)
    return {
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        # Where clipping is ours (engine/optimizer.py), it must always be called, as it measures the norm.
        "gradient_clipping": config.optimizer.gradient_clipping or (1e30 if _plain(config) else 0.0),
        # In fp32 and fp16, DeepSpeed skips steps with infinite gradients by itself.
        "bf16": {"enabled": config.precision.dtype == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": config.precision.dtype == "fp16", "initial_scale_power": 16},
        "data_types": {
            **({"grad_accum_dtype": "fp32"} if config.precision.gradients == "fp32" else {}),
            **subsection(config, "data_types"),
        },
        "zero_optimization": zero,
        # Dynamic shapes rule out DeepSpeed's splitting of activations over the tensor-parallel ranks.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the host, too
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
        **raw,
    }


def subsection(config: RunConfig, *keys: str) -> dict[str, Any]:
    """A mapping within the section `deepspeed`, empty where it has none. Raises UserError where it is none."""
    value: Any = config.deepspeed
    for number, key in enumerate(keys, 1):
        value = value.get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"'deepspeed.{'.'.join(keys[:number])}': expected a section, got {value!r}")
    return value


def _plain(config: RunConfig) -> bool:
    return config.parallel.zero == 0 and config.precision.dtype == "fp32"
