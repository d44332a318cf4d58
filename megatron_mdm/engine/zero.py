"""DeepSpeed's plain engine: ZeRO 0–3 over the data-parallel ranks, tensor parallelism inside the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_mdm.batch import IdRange, ModelInputs, RowStatistics
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.base import Load, TrainOutput
from megatron_mdm.engine.deepspeed_config import deepspeed_config, zero_stage
from megatron_mdm.engine.deepspeed_engine import DeepSpeedEngine
from megatron_mdm.engine.inference import DTYPES
from megatron_mdm.engine.optimizer import scaled_unless_faulty
from megatron_mdm.engine.partitioned import keep_partition
from megatron_mdm.engine.statistics import StatisticsCopy, TokenLossesCopy
from megatron_mdm.models.four_bit import quantize_frozen
from megatron_mdm.models.layers import build_model
from megatron_mdm.models.naming import rows_of
from megatron_mdm.parallel.groups import ModelParallelUnit, ParallelContext
from megatron_mdm.parallel.heartbeat import beat


class ZeroEngine(DeepSpeedEngine):
    """engine.base.Engine without pipeline stages."""

    def __init__(self, config: RunConfig, context: ParallelContext, load: Load | None = None) -> None:
        """load: fills each layer, before the optimizer takes its master weights from it."""
        settings = deepspeed_config(config, context.layout.world_size)
        unit = ModelParallelUnit(context)

        def finish(layer: nn.Module) -> None:
            if load:
                load(layer)
            quantize_frozen(layer, config.model)
            _round_base(layer, config)
            if zero_stage(config) == 3:
                keep_partition(layer, config.precision.dtype, unit, settings)

        model = build_model(config.model, config.parallel, context, None if load else config.seed, finish)
        super().__init__(model, config, context, settings, unit)

    def train_batch(self, micro_batches: Sequence[ModelInputs], lr: float) -> TrainOutput:
        engine = self.engine
        statistics: list[RowStatistics] = []
        engine.train()
        self.begin_step(lr)
        for index, inputs in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            engine.set_gradient_accumulation_boundary(is_last)
            with self.clock.measure("forward"), self.fp8.micro_batch():
                total, rows = engine(self._prepare(inputs))
                # Totals are shares of the global batch's mean; DeepSpeed averages gradients over data-parallel ranks.
                total = scaled_unless_faulty(total, self.context.layout.data)
            with self.clock.measure("backward"):
                engine.backward(total, scale_wrt_gas=False)
            statistics.append(rows)
            if is_last:  # before the optimizer's step, whose wait for the norm is then one for the copy, too
                copy = StatisticsCopy.of(statistics)
            with self.clock.measure("optimizer"):
                engine.step()
        norm = self.norm()
        return TrainOutput(copy.wait(), norm)

    def evaluate(self, micro_batches: Sequence[ModelInputs], row_gradients: bool = False) -> list[RowStatistics]:
        self.engine.eval()
        with torch.no_grad(), self.engine.module[-1].with_row_gradients(row_gradients):
            return [self.engine(self._prepare(inputs))[1] for inputs in micro_batches]

    def token_losses(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]:
        self.engine.train()  # or other kernels would run: blocks are compiled for training only
        with torch.no_grad(), self.engine.module[-1].with_token_losses():
            losses = [self.engine(self._prepare(inputs._replace(dropout_keys=None)))[1] for inputs in micro_batches]
        return TokenLossesCopy.of(losses).wait(micro_batches)

    def logits(self, inputs: ModelInputs, *, ids: IdRange | None = None) -> Tensor:
        self.engine.eval()
        with torch.no_grad():
            return self.engine(self._prepare(inputs), want_logits=True, ids=ids)

    def _prepare(self, inputs: ModelInputs) -> ModelInputs:
        beat()
        return self.input_layout.on_device(inputs)


def _round_base(layer: nn.Module, config: RunConfig) -> None:
    """Bring what stands beside adapters to the type that the model computes in, layer by layer. DeepSpeed would do it
    once all are there: in fp32, 8 B parameters take more than a GPU of 24 GB has."""
    for row, tensor in rows_of(layer, config.model):
        if row.is_base and not row.is_buffer:
            tensor.data = tensor.data.to(DTYPES[config.precision.dtype])
