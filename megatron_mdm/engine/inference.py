"""Forward passes without an optimizer: calibration, evaluation and generation from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mdm.batch import IdRange, ModelInputs, RowStatistics
from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from megatron_mdm.engine.inputs import InputLayout
from megatron_mdm.engine.statistics import TokenLossesCopy
from megatron_mdm.models.attention import Visibility
from megatron_mdm.models.cache import Window
from megatron_mdm.models.costs import layer_costs
from megatron_mdm.models.layers import Head, MaskedDiffusionModel, layer_builders, prepare_parameters
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import beat
from megatron_mdm.parallel.layout import partition

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class InferenceEngine:
    """The forward half of engine.base.Engine, with the model whole on every data-parallel rank."""

    def __init__(self, model: MaskedDiffusionModel, dtype: str, source: str = "") -> None:
        """source: the name of the checkpoint that the weights are from."""
        self.source = source
        self.model = model.to(device=platform.device(), dtype=DTYPES[dtype]).eval()

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[ModelInputs], row_gradients: bool = False) -> list[RowStatistics]:
        with cast(Head, self.model[-1]).with_row_gradients(row_gradients):
            return [self.model(_on_device(inputs))[1] for inputs in micro_batches]

    @torch.no_grad()
    def token_losses(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]:
        with cast(Head, self.model[-1]).with_token_losses():
            losses = [self.model(_on_device(inputs))[1] for inputs in micro_batches]
        return TokenLossesCopy.of(losses).wait(micro_batches)

    @torch.no_grad()
    def logits(self, inputs: ModelInputs, window: Window | None = None, *, ids: IdRange | None = None) -> Tensor:
        """Engine.logits. window: the inputs' tokens are those at its positions of longer rows, which their pattern is
        about; their keys and values are kept in its cache, and the cache's others take part."""
        return self.model(_on_device(inputs), want_logits=True, window=window and window.to_device(), ids=ids)


class PipelinedInferenceEngine:
    """The same over pipeline ranks, each with its stage's layers and their part of a cache. Every pipeline rank
    is given the same inputs and gets the same answers."""

    def __init__(
        self, layers: nn.ModuleDict, model: ModelConfig, dtype: str, context: ParallelContext, source: str = ""
    ) -> None:
        self.source = source
        self.layers = layers.to(device=platform.device(), dtype=DTYPES[dtype]).eval()
        self.model = model
        self.dtype = DTYPES[dtype]
        self.context = context
        stride = context.layout.stride("pipeline")
        self.previous = context.rank - stride
        self.next = context.rank + stride
        self.is_first = context.pipeline_rank == 0
        self.is_last = context.pipeline_rank == context.layout.pipeline - 1

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[ModelInputs], row_gradients: bool = False) -> list[RowStatistics]:
        """Several micro-batches at once keep the stages busy."""
        micro_batches = [_on_device(inputs) for inputs in micro_batches]
        head = self._head
        with head.with_row_gradients(row_gradients) if head else nullcontext():
            answers = [self._run(inputs, False, None) for inputs in micro_batches]
        results = []
        for inputs, answer in zip(micro_batches, answers):
            shape = torch.Size((len(RowStatistics._fields), len(inputs.selected)))
            results.append(RowStatistics(*self._from_last_stage(answer, shape, torch.float32)))
        return results

    @torch.no_grad()
    def token_losses(self, micro_batches: Sequence[ModelInputs]) -> list[Tensor]:
        """Several micro-batches at once keep the stages busy."""
        prepared = [_on_device(inputs) for inputs in micro_batches]
        head = self._head
        with head.with_token_losses() if head else nullcontext():
            answers = [self._run(inputs, False, None) for inputs in prepared]
        shapes = [inputs.selected.shape for inputs in prepared]
        size = torch.Size([sum(shape.numel() for shape in shapes)])
        whole = torch.cat([answer.reshape(-1) for answer in answers if answer is not None]) if self.is_last else None
        return TokenLossesCopy(self._from_last_stage(whole, size, torch.float32), shapes).wait(micro_batches)

    @torch.no_grad()
    def logits(self, inputs: ModelInputs, window: Window | None = None, *, ids: IdRange | None = None) -> Tensor:
        """InferenceEngine.logits."""
        inputs = _on_device(inputs)
        window = window and window.to_device()
        width = ids[1] if ids else int(self.model.vocab_size)
        shape = torch.Size((len(inputs.selected_places()), width))
        return self._from_last_stage(self._run(inputs, True, window, ids), shape, self.dtype)

    @property
    def _head(self) -> Head | None:
        """On the last stage."""
        return next((layer for layer in self.layers.values() if isinstance(layer, Head)), None)

    def _run(
        self, inputs: ModelInputs, want_logits: bool, window: Window | None, ids: IdRange | None = None
    ) -> Tensor | None:
        """Run this rank's layers. Returns the answer on the last stage, None elsewhere."""
        rows, length = inputs.tokens.shape
        hidden = inputs.tokens
        visible = Visibility(inputs, window)
        if not self.is_first:
            hidden = torch.empty(length, rows, self.model.hidden_size, dtype=self.dtype, device=platform.device())
            dist.recv(hidden, self.previous)
        for layer in self.layers.values():
            if isinstance(layer, Head):
                answer = layer(hidden, inputs, want_logits, ids)
                if want_logits:
                    return answer
                return answer[1] if layer.token_losses else torch.stack(list(answer[1]))
            hidden = layer(hidden, visible)
        dist.send(hidden.contiguous(), self.next)
        return None

    def _from_last_stage(self, answer: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if answer is None:
            answer = torch.empty(shape, dtype=dtype, device=platform.device())
        answer = answer.contiguous()
        dist.broadcast(answer, src=self.context.last_stage_rank, group=self.context.pipeline_group)
        return answer


def build_stage(
    model: ModelConfig, parallel: ParallelConfig, context: ParallelContext, seed: int | None, length: int
) -> nn.ModuleDict:
    """This pipeline rank's layers, named by index as in the whole model. A tied head holds its own copy of the
    table: both are filled from the same tensor. seed: of initial weights; None: they are left unset, to be read.
    length: of sequences, for balance."""
    bounds = partition(layer_costs(model, length), context.layout.pipeline)
    mine = range(bounds[context.pipeline_rank], bounds[context.pipeline_rank + 1])
    builders = layer_builders(model, parallel, context.tensor_group)
    layers = nn.ModuleDict({str(index): builders[index]() for index in mine})
    prepare_parameters(layers, model, parallel, context, seed)
    return layers


def _on_device(inputs: ModelInputs) -> ModelInputs:
    beat()
    return InputLayout().on_device(inputs)
