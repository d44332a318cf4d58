"""Forward passes without an optimizer: calibration, evaluation and generation from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from megatron_mdm.engine.packets import prepared
from megatron_mdm.models.cache import Window
from megatron_mdm.models.parameters import stage_costs
from megatron_mdm.models.stages import (
    Block,
    Head,
    MaskedDiffusionModel,
    Packet,
    RowStatistics,
    prepare_parameters,
    stage_builders,
)
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
    def evaluate(self, packets: Sequence[Packet], row_gradients: bool = False) -> list[RowStatistics]:
        with self.model[-1].with_row_gradients(row_gradients):
            return [self.model(_on_device(packet))[1] for packet in packets]

    @torch.no_grad()
    def logits(self, packet: Packet, window: Window | None = None) -> Tensor:
        """Engine.logits. window: the packet's tokens are those at its positions; their keys and values are kept in its
        cache, and the cache's others take part."""
        return self.model(_on_device(packet), want_logits=True, window=window and window.to_device())


class PipelinedInferenceEngine:
    """The same over pipeline ranks, each with its stages and their part of a cache. Every pipeline rank is given the
    same packets and gets the same answers."""

    def __init__(
        self, stages: nn.ModuleDict, model: ModelConfig, dtype: str, context: ParallelContext, source: str = ""
    ) -> None:
        self.source = source
        self.stages = stages.to(device=platform.device(), dtype=DTYPES[dtype]).eval()
        self.model, self.dtype, self.context = model, DTYPES[dtype], context
        neighbour = context.layout.tensor * context.layout.data
        self.previous, self.next = context.rank - neighbour, context.rank + neighbour
        self.is_first = context.pipeline_rank == 0
        self.is_last = context.pipeline_rank == context.layout.pipeline - 1

    @torch.no_grad()
    def evaluate(self, packets: Sequence[Packet], row_gradients: bool = False) -> list[RowStatistics]:
        """Several packets at once keep the stages busy."""
        packets = [_on_device(packet) for packet in packets]
        head = next((stage for stage in self.stages.values() if isinstance(stage, Head)), None)
        with head.with_row_gradients(row_gradients) if head else nullcontext():
            answers = [self._run(packet, False, None) for packet in packets]
        results = []
        for packet, answer in zip(packets, answers):
            shape = torch.Size((len(RowStatistics._fields), len(packet.tokens)))
            results.append(RowStatistics(*self._from_last_stage(answer, shape, torch.float32)))
        return results

    @torch.no_grad()
    def logits(self, packet: Packet, window: Window | None = None) -> Tensor:
        """InferenceEngine.logits."""
        packet, window = _on_device(packet), window and window.to_device()
        shape = torch.Size((int(packet.selected.sum()), self.model.vocab_size))
        return self._from_last_stage(self._run(packet, True, window), shape, self.dtype)

    def _run(self, packet: Packet, want_logits: bool, window: Window | None) -> Tensor | None:
        """This rank's stages; the last stage's answer, there."""
        rows, length = packet.tokens.shape
        hidden = packet.tokens
        if not self.is_first:
            hidden = torch.empty(length, rows, self.model.hidden_size, dtype=self.dtype, device=platform.device())
            dist.recv(hidden, self.previous)
        state = (hidden, packet.lengths)
        for stage in self.stages.values():
            if isinstance(stage, Head):
                answer = stage(state, packet, want_logits)
                return answer if want_logits else torch.stack(list(answer[1]))
            state = stage(state, window) if isinstance(stage, Block) else stage(state)
        dist.send(state[0].contiguous(), self.next)
        return None

    def _from_last_stage(self, answer: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if answer is None:
            answer = torch.empty(shape, dtype=dtype, device=platform.device())
        answer = answer.contiguous()
        dist.broadcast(answer, src=self.context.last_stage_rank, group=self.context.pipeline_group)
        return answer


def build_stages(
    model: ModelConfig, parallel: ParallelConfig, context: ParallelContext, seed: int, length: int
) -> nn.ModuleDict:
    """This pipeline rank's stages, named by index as in the whole model. A tied head holds its own copy of the
    table: both are filled from the same tensor. length: of sequences, for balance."""
    bounds = partition(stage_costs(model, length), context.layout.pipeline)
    mine = range(bounds[context.pipeline_rank], bounds[context.pipeline_rank + 1])
    builders = stage_builders(model, parallel, context.tensor_group)
    stages = nn.ModuleDict({str(index): builders[index]() for index in mine})
    prepare_parameters(stages, model, context, seed)
    return stages


def _on_device(packet: Packet) -> Packet:
    beat()
    return prepared(packet, pack=False, multiple=1).to_device()
