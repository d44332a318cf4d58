"""What the engines that train have in common: DeepSpeed's engine of a model, and what DeepSpeed leaves undone."""

from __future__ import annotations

from typing import Any

import deepspeed
from torch import nn

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.clock import PhaseClock
from megatron_mdm.engine.deepspeed_config import zero_stage
from megatron_mdm.engine.host_norm import read_norm_once
from megatron_mdm.engine.inputs import InputLayout
from megatron_mdm.engine.loss_scale import LossScale
from megatron_mdm.engine.optimizer import PlainClipping, adamw, norm_of_step
from megatron_mdm.engine.optimizer_state import OptimizerState
from megatron_mdm.models.fp8 import Fp8
from megatron_mdm.parallel.groups import ModelParallelUnit, ParallelContext


class DeepSpeedEngine:
    """The attributes of engine.base.Engine, and a step's first and last lines."""

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        context: ParallelContext,
        settings: dict[str, Any],
        unit: ModelParallelUnit | None = None,
    ) -> None:
        """model: this rank's layers, filled: the optimizer takes its master weights from them. settings:
        deepspeed_config(). unit: tensor parallelism, where DeepSpeed does not know of it from the model."""
        self.context = context
        self.clock = PhaseClock()
        self.input_layout = InputLayout.of(config)
        optimizer = adamw(model, config, context)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=unit, config=settings)
        read_norm_once(self.engine.optimizer)
        self.clipping = None
        if zero_stage(config) == 0:
            self.clipping = PlainClipping(model, config.optimizer.gradient_clipping, context)
            self.engine.clip_fp32_gradients = self.clipping
            # Else DeepSpeed copies all gradients into one tensor and back, for a rank that has nobody to sum them with.
            sums = f"{'pipeline_' * (context.layout.pipeline > 1)}enable_backward_allreduce"
            setattr(self.engine, sums, context.layout.data > 1)
        self.optimizer_state = OptimizerState(self.engine.module, self.engine.optimizer, config.model)
        self.loss_scale = LossScale(self.engine.optimizer)
        self.fp8 = Fp8(self.engine.module, config.model, context)

    def begin_step(self, lr: float) -> None:
        """Before a step's first forward pass."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.fp8.begin_step()

    def norm(self) -> float:
        """The gradient's, in the step just taken: norm_of_step()."""
        return norm_of_step(self.engine, self.clipping)
