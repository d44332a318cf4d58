"""DeepSpeed's plain engine: ZeRO 0–3 over the data-parallel ranks, tensor parallelism inside the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.utils import get_flattened_grad_norm, is_model_parallel_parameter
from torch import Tensor

from megatron_mdm.config.schema import OptimizerConfig, RunConfig
from megatron_mdm.engine.base import TrainOutput
from megatron_mdm.engine.deepspeed_config import deepspeed_config
from megatron_mdm.engine.unpickling import safe_unpickling
from megatron_mdm.engine.weights import save_weights
from megatron_mdm.models.stages import MaskedDiffusionModel, Packet, RowStatistics
from megatron_mdm.parallel.groups import ParallelContext

CHECKPOINT_TAG = "engine"


class ZeroEngine:
    """engine.base.Engine without pipeline stages."""

    def __init__(self, model: MaskedDiffusionModel, config: RunConfig, context: ParallelContext) -> None:
        self.context = context
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(model, config.optimizer),
            mpu=context.mpu,
            config=deepspeed_config(config, context.layout.world_size),
        )
        # DeepSpeed keeps no gradient norm where it wraps no optimizer (ZeRO 0 in fp32).
        self._norm_is_ours = config.parallel.zero == 0 and config.precision.dtype == "fp32"

    def train_batch(self, packets: Sequence[Packet], lr: float) -> TrainOutput:
        engine, statistics = self.engine, []
        engine.train()
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        for index, packet in enumerate(packets):
            engine.set_gradient_accumulation_boundary(index == len(packets) - 1)
            total, rows = engine(packet.to_device())
            # Totals are shares of the global batch's mean; DeepSpeed averages gradients over data-parallel ranks.
            engine.backward(total * self.context.layout.data, scale_wrt_gas=False)
            statistics.append(rows)
            if index == len(packets) - 1 and self._norm_is_ours:
                norm = get_flattened_grad_norm(self._counted_parameters(), mpu=self.context.mpu)
            engine.step()
        if not self._norm_is_ours:
            norm = engine.get_global_grad_norm()
        return TrainOutput(statistics, float(norm))

    def evaluate(self, packet: Packet) -> RowStatistics:
        self.engine.eval()
        with torch.no_grad():
            _, rows = self.engine(packet.to_device())
        return rows

    def logits(self, packet: Packet) -> Tensor:
        self.engine.eval()
        with torch.no_grad():
            return self.engine(packet.to_device(), want_logits=True)

    def _counted_parameters(self) -> list[torch.nn.Parameter]:
        """This rank's part of the gradient norm: what every tensor-parallel rank holds counts on the first only."""
        first = self.context.tensor_rank == 0
        return [p for p in self.engine.module.parameters() if first or is_model_parallel_parameter(p)]

    def save(self, directory: Path) -> None:
        self.engine.save_checkpoint(str(directory), tag=CHECKPOINT_TAG, save_latest=False)
        save_weights(self.engine.module, directory / "weights", self.context)

    def load(self, directory: Path) -> None:
        with safe_unpickling():
            self.engine.load_checkpoint(str(directory), tag=CHECKPOINT_TAG)


def _adamw(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only. The fused kernel exists on CPU and CUDA."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
