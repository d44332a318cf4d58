"""The model as a list of stages: Embed, Block …, Head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_mdm.config.schema import ModelConfig, ParallelConfig
from megatron_mdm.models.attention import AttentionInputs
from megatron_mdm.models.cache import Window
from megatron_mdm.models.cross_entropy import weighted_cross_entropy
from megatron_mdm.models.initialize import initialize_weights
from megatron_mdm.models.norms import RMSNorm
from megatron_mdm.models.parameters import padded_vocab_size
from megatron_mdm.models.rotary import Rotation
from megatron_mdm.models.sharding import HEAD_NORMS, mark_shards
from megatron_mdm.models.spec import LAYER_SPECS, resolve_kernels, transformer_config
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext

NOT_PACKED = torch.empty(0, dtype=torch.int64)


class Packet(NamedTuple):
    """A micro-batch for the model. R rows (samples × views) of length S.

    Packed (engine/packets.py), its rows stand one after another in a single row of T tokens without padding; what is
    scored stays by row.
    """

    tokens: Tensor  # [R, S] int64; packed: [1, T]
    # [R] int64 without padding on the right; of no dimension where no row is padded, which kernels exploit. Packed:
    # [1, K], the segments that make the row of T, each of which sees itself only.
    lengths: Tensor
    selected: Tensor  # [R, S] bool: the positions that reach the vocabulary (masked ones, in training)
    labels: Tensor  # [R, S] int64: clean token ids
    token_weight: Tensor  # [R, S] float32: a row's loss is Σ token_weight · CE over its selected positions
    row_weight: Tensor  # [R] float32: the total is Σ row_weight · (row's loss)
    row_starts: Tensor = NOT_PACKED  # [R] int64, packed: where the rows begin among the T tokens

    @property
    def is_packed(self) -> bool:
        return self.lengths.dim() == 2

    def to_device(self) -> Packet:
        if not platform.is_cuda():
            return self
        return Packet(*(tensor.to(platform.device(), non_blocking=True) for tensor in self))


# What runs from stage to stage: before Embed (tokens [R, S], lengths), after it (hidden [S, R, H], lengths); [1, T] and
# [T, 1, H] where packed. Under sequence parallelism a rank holds 1 / tensor-parallel degree of the positions.
StageState = tuple[Tensor, Tensor]


class RowStatistics(NamedTuple):
    """Per row [R], float32, detached."""

    loss: Tensor  # Σ token_weight · CE
    square: Tensor  # Σ (token_weight · CE)²
    gradient_square: Tensor  # Σ ‖token_weight · ∂CE/∂h‖², h what the vocabulary projection reads; 0 if not computed


class Embed(nn.Module):
    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            padded_vocab_size(model, config.tensor_model_parallel_size),
            model.hidden_size,
            init_method=config.init_method,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
        )
        self.sequence_parallel = config.sequence_parallel

    def forward(self, state: StageState) -> StageState:
        tokens, lengths = state
        hidden = self.word_embeddings(tokens)
        return (hidden if self.sequence_parallel else hidden.transpose(0, 1).contiguous()), lengths


class Block(nn.Module):
    """One transformer layer. With recompute it keeps only its input and runs again in the backward pass."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, index: int, parallel: ParallelConfig) -> None:
        super().__init__()
        spec = LAYER_SPECS[resolve_kernels(model)](model, parallel.recompute == "selective")
        self.layer = TransformerLayer(config, spec, layer_number=index + 1)
        self.rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
        )
        self.config = config
        self.sequence_shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.recompute = parallel.recompute == "full" and index % parallel.recompute_interval == 0

    def forward(self, state: StageState, window: Window | None = None) -> StageState:
        """window: the state holds only these positions; the others' keys and values are in a cache."""
        hidden, lengths = state
        if window is not None:
            hidden = self._windowed_layer(hidden, window)
        elif self.recompute and torch.is_grad_enabled():
            # There is no dropout, so no random state has to be kept.
            hidden = checkpoint(self._layer, hidden, lengths, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = self._layer(hidden, lengths)
        return hidden, lengths

    def _layer(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        length = hidden.shape[0] * self.sequence_shards
        angles = self.rotary(length)
        seen = None
        if lengths.dim() == 1:
            seen = attention_mask(lengths, length)
        elif lengths.dim() == 2:  # packed: attention takes the segments' lengths for its mask
            seen, angles = lengths, angles.index_select(0, segment_positions(lengths, length))
        return self._run(hidden, seen, angles)

    def _windowed_layer(self, hidden: Tensor, window: Window) -> Tensor:
        angles = self.rotary(window.cache.width)[window.positions.t()].squeeze(2)  # [S, R, 1, D]
        return self._run(hidden, window, angles)

    def _run(self, hidden: Tensor, seen: Tensor | Window | None, angles: Tensor) -> Tensor:
        """angles [S, 1 or R, 1, D] of the positions."""
        inputs = AttentionInputs(seen, Rotation.of(angles, hidden.dtype))
        with get_fp8_context(self.config, self.layer.layer_number - 1):  # does nothing without FP8
            return self.layer(hidden, attention_mask=inputs)[0]


class Head(nn.Module):
    """Final norm and vocabulary projection, of the selected positions only: [R, S, V] never exists."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        degree = config.tensor_model_parallel_size
        self.vocab_size, self.group, self.z_loss = model.vocab_size, group, model.z_loss
        self.row_gradients = False  # compute RowStatistics.gradient_square without autograd, too
        self.logit_shift = model.logit_shift
        self.sequence_parallel = config.sequence_parallel
        self.final_norm = RMSNorm(config, model.hidden_size, eps=model.norm_eps)
        self.final_norm.weight.sequence_parallel = False  # it sees whole, gathered rows
        rows = padded_vocab_size(model, degree) // degree
        self.vocabulary_weight = nn.Parameter(torch.empty(rows, model.hidden_size))

    def forward(
        self, state: StageState, packet: Packet | None = None, want_logits: bool = False
    ) -> StageState | tuple[Tensor, RowStatistics] | Tensor:
        """(total loss with its gradient, row statistics), or the selected positions' logits [N, V], position-major
        in each row (the order of packet.selected.nonzero()). Without a packet, the state as it is: a pipeline calls its
        last stage twice, first as a layer, then with what the loss needs."""
        if packet is None:
            return state
        hidden, _ = state
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return self.logits(hidden, packet) if want_logits else self.loss(hidden, packet)

    @contextmanager
    def with_row_gradients(self, wanted: bool) -> Iterator[None]:
        """Inside, RowStatistics.gradient_square is computed without autograd, too, if wanted."""
        self.row_gradients = wanted
        try:
            yield
        finally:
            self.row_gradients = False

    def logits(self, hidden: Tensor, packet: Packet) -> Tensor:
        """hidden [S, R, H] or packed [T, 1, H] → [N, V]."""
        row, position = packet.selected.nonzero(as_tuple=True)
        rows = self._normed_rows(hidden, self._places_in_hidden(row, position, packet))
        logits = gather_from_tensor_model_parallel_region(rows @ self.vocabulary_weight.t())
        return logits[:, : self.vocab_size]

    def loss(self, hidden: Tensor, packet: Packet) -> tuple[Tensor, RowStatistics]:
        """hidden [S, R, H] or packed [T, 1, H]. The rest is [S, R], hidden's order where it is not packed."""
        selected, token_weight = packet.selected.t(), packet.token_weight.t()
        places, num_rows = selected.reshape(-1).nonzero().squeeze(1), len(packet.selected)
        weights = (token_weight * packet.row_weight).reshape(-1)[places]
        total, cross_entropy, gradient_square = weighted_cross_entropy(
            self._normed_rows(hidden, self._places_in_hidden(places % num_rows, places // num_rows, packet)),
            self.vocabulary_weight,
            packet.labels.t().reshape(-1)[places],
            weights,
            self.vocab_size,
            self.group,
            z_loss=self.z_loss,
            row_gradients=self.row_gradients,
        )
        # Dense grids and plain sums: deterministic on every device, unlike a scattered addition.
        grids = torch.zeros(2, selected.numel(), device=hidden.device)
        grids[0, places], grids[1, places] = cross_entropy, gradient_square
        grids = grids.view(2, *selected.shape)
        weighted = grids[0] * token_weight
        gradient = grids[1].sum(0) / packet.row_weight.square().clamp_min(1e-30)  # without the rows' weights
        return total, RowStatistics(weighted.sum(0), weighted.square().sum(0), gradient)

    def _places_in_hidden(self, row: Tensor, position: Tensor, packet: Packet) -> Tensor:
        """[N] int64: where the states that predict positions of rows, [N] each, lie along hidden's memory, [S, R] or
        packed [T]: at the positions themselves, or, with shifted logits, one before, but for a row's first."""
        if self.logit_shift:
            position = (position - 1).clamp_min(0)
        if packet.is_packed:
            return packet.row_starts[row] + position
        return position * len(packet.selected) + row

    def _normed_rows(self, hidden: Tensor, places: Tensor) -> Tensor:
        return self.final_norm(hidden.reshape(-1, hidden.shape[-1]).index_select(0, places))


class MaskedDiffusionModel(nn.Sequential):
    """All stages in one process; parameters are named by stage index, as in a pipeline."""

    def forward(
        self, packet: Packet, want_logits: bool = False, window: Window | None = None
    ) -> tuple[Tensor, RowStatistics] | Tensor:
        embed, *blocks, head = self
        state = embed((packet.tokens, packet.lengths))
        for block in blocks:
            state = block(state, window)
        return head(state, packet, want_logits)


def stage_builders(
    model: ModelConfig, parallel: ParallelConfig, group: torch.distributed.ProcessGroup
) -> list[partial[nn.Module]]:
    """One constructor per stage, so that a pipeline rank builds only its own."""
    config = transformer_config(model, parallel)
    return [
        partial(Embed, model, config),
        *(partial(Block, model, config, index, parallel) for index in range(model.num_layers)),
        partial(Head, model, config, group),
    ]


def build_model(
    model: ModelConfig, parallel: ParallelConfig, context: ParallelContext, seed: int
) -> MaskedDiffusionModel:
    """The whole model in this process, with initial weights that are the same on every layout."""
    stages = MaskedDiffusionModel(*(build() for build in stage_builders(model, parallel, context.tensor_group)))
    if model.tie_embeddings:
        stages[-1].vocabulary_weight = stages[0].word_embeddings.weight
    prepare_parameters(stages, model, context, seed)
    return stages


def prepare_parameters(stages: nn.Module, model: ModelConfig, context: ParallelContext, seed: int) -> None:
    """Initial weights, sharding attributes, and the sum of sequence-parallel gradients, for any part of the stages."""
    if not model.init_from:  # else every parameter is read
        initialize_weights(stages, model, seed, context.tensor_rank, context.layout.tensor)
    mark_shards(stages)
    for name, parameter in stages.named_parameters():
        sees_a_part = getattr(parameter, "sequence_parallel", False)  # of the positions
        if name.endswith(HEAD_NORMS):  # of the heads
            sees_a_part = context.layout.tensor > 1
        if sees_a_part:
            parameter.register_hook(partial(_sum_over_group, group=context.tensor_group))


def _sum_over_group(gradient: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """A norm inside a sequence-parallel layer has seen this rank's positions only, a norm of heads its heads."""
    gradient = gradient.contiguous()
    torch.distributed.all_reduce(gradient, group=group)
    return gradient


def attention_mask(lengths: Tensor, width: int) -> Tensor:
    """[R, 1, 1, S] bool, True at the first lengths[r] positions."""
    return (torch.arange(width, device=lengths.device)[None, :] < lengths[:, None])[:, None, None, :]


def segment_positions(lengths: Tensor, width: int) -> Tensor:
    """[T] int64: each token's position in its own segment; lengths [1, K] of the segments, which fill the width T."""
    ends = lengths[0].cumsum(0)
    begins = torch.repeat_interleave(ends - lengths[0], lengths[0], output_size=width)
    return torch.arange(width, device=lengths.device) - begins
