"""Our sections → the mapping that DeepSpeed is configured with."""

from __future__ import annotations

from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import accumulation_steps
from megatron_mdm.parallel import platform


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage that runs. In 16 bit stage 0 runs as stage 1: DeepSpeed's optimizers for the former count
    tensor-parallel shards wrongly, lose the gradients of a pipeline's head and take a step when they are built."""
    return max(1, config.parallel.zero) if config.precision.dtype != "fp32" else config.parallel.zero


def zero_text(config: RunConfig) -> str:
    """The stage, for people, also where precision.dtype is open yet."""
    text = f"ZeRO {config.parallel.zero}"
    return text if zero_stage(config) == config.parallel.zero else f"{text} (in 16 bit run as {zero_stage(config)})"


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Raw keys of the `deepspeed` section are added; validate.py has refused those that the
    stack owns."""
    raw = {key: value for key, value in config.deepspeed.items() if key not in ("zero_optimization", "data_types")}
    zero = {
        "stage": zero_stage(config),
        "reduce_scatter": True,
        # DeepSpeed's default on CUDA: ZeRO 3 reduces gradients beside the backward pass. A CPU has no streams.
        **({} if platform.is_cuda() else {"overlap_comm": False}),
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
        "gradient_clipping": config.optimizer.gradient_clipping or (0.0 if zero_stage(config) else 1e30),
        # In fp32 and fp16, DeepSpeed skips steps with infinite gradients by itself. A gradient is added to its fp32 sum
        # as soon as it is there: DeepSpeed clears what it finds before a stage's backward pass, the head's included.
        "bf16": {
            "enabled": config.precision.dtype == "bf16",
            "check_grad_overflow": True,
            "immediate_grad_update": config.precision.gradients == "fp32",
        },
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
