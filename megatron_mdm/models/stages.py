"""The model as a list of stages: Embed, Block …, Head. What runs between them is a Packet of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import VocabParallelEmbedding, gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.cross_entropy import weighted_cross_entropy
from megatron_mdm.models.initialize import initialize_weights
from megatron_mdm.models.norms import RMSNorm
from megatron_mdm.models.sharding import mark_shards
from megatron_mdm.models.spec import layer_spec, transformer_config
from megatron_mdm.parallel import platform
from megatron_mdm.parallel.groups import ParallelContext


class Packet(NamedTuple):
    """A micro-batch on its way through the stages. R rows (samples × views) of length S."""

    hidden: Tensor  # before Embed: token ids [R, S]; after it: [S, R, H]
    attention: Tensor  # [R, 1, 1, S] bool, True at real positions; empty where no row is padded
    selected: Tensor  # [R, S] bool: the positions that reach the vocabulary (masked ones, in training)
    labels: Tensor  # [R, S] int64: clean token ids
    token_weight: Tensor  # [R, S] float32: a row's loss is Σ token_weight · CE over its selected positions
    row_weight: Tensor  # [R] float32: the total is Σ row_weight · (row's loss)

    def to_device(self) -> Packet:
        if not platform.is_cuda():
            return self
        return Packet(*(tensor.to(platform.device(), non_blocking=True) for tensor in self))


class RowStatistics(NamedTuple):
    """Per row [R], float32, detached."""

    loss: Tensor  # Σ token_weight · CE
    ce_sum: Tensor  # Σ CE
    ce_square_sum: Tensor  # Σ CE²
    num_selected: Tensor


class Embed(nn.Module):
    def __init__(self, model: ModelConfig, config: TransformerConfig) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            padded_vocab_size(model, config.tensor_model_parallel_size),
            model.hidden_size,
            init_method=config.init_method,
            config=config,
        )

    def forward(self, packet: Packet) -> Packet:
        return packet._replace(hidden=self.word_embeddings(packet.hidden).transpose(0, 1).contiguous())


class Block(nn.Module):
    def __init__(self, model: ModelConfig, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.layer = TransformerLayer(config, layer_spec(), layer_number=index + 1)
        self.rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
        )

    def forward(self, packet: Packet) -> Packet:
        hidden, _ = self.layer(
            packet.hidden,
            attention_mask=packet.attention if packet.attention.numel() else None,
            rotary_pos_emb=self.rotary(packet.hidden.shape[0]),
        )
        return packet._replace(hidden=hidden)


class Head(nn.Module):
    """Final norm and vocabulary projection, of the selected positions only: [R, S, V] never exists."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        degree = config.tensor_model_parallel_size
        self.vocab_size, self.group = model.vocab_size, group
        self.final_norm = RMSNorm(config, model.hidden_size, eps=model.norm_eps)
        rows = padded_vocab_size(model, degree) // degree
        self.vocabulary_weight = nn.Parameter(torch.empty(rows, model.hidden_size))

    def forward(self, packet: Packet, want_logits: bool = False) -> tuple[Tensor, RowStatistics] | Tensor:
        """(total loss with its gradient, row statistics), or the selected positions' logits [N, V], position-major
        in each row (the order of packet.selected.nonzero())."""
        order = packet.selected if want_logits else packet.selected.t()  # hidden is [S, R, H]: pick along its memory
        places = order.reshape(-1).nonzero().squeeze(1)
        hidden = packet.hidden.transpose(0, 1) if want_logits else packet.hidden
        rows = self.final_norm(hidden.reshape(-1, hidden.shape[-1]).index_select(0, places))
        if want_logits:
            logits = gather_from_tensor_model_parallel_region(rows @ self.vocabulary_weight.t())
            return logits[:, : self.vocab_size]
        token_weight = packet.token_weight.t()  # [S, R], as everything below
        weights = (token_weight * packet.row_weight).reshape(-1)[places]
        total, cross_entropy = weighted_cross_entropy(
            rows, self.vocabulary_weight, packet.labels.t().reshape(-1)[places], weights, self.vocab_size, self.group
        )
        # A dense grid and a plain sum: deterministic on every device, unlike a scattered addition.
        grid = torch.zeros(order.numel(), device=rows.device).index_put_((places,), cross_entropy).view(order.shape)
        statistics = RowStatistics(
            (grid * token_weight).sum(0), grid.sum(0), grid.square().sum(0), order.sum(0).to(torch.float32)
        )
        return total, statistics


class MaskedDiffusionModel(nn.Sequential):
    """All stages in one process; parameters are named by stage index, as in a pipeline."""

    def forward(self, packet: Packet, want_logits: bool = False) -> tuple[Tensor, RowStatistics] | Tensor:
        *body, head = self
        for stage in body:
            packet = stage(packet)
        return head(packet, want_logits)


def build_model(model: ModelConfig, context: ParallelContext, seed: int) -> MaskedDiffusionModel:
    """Build the stages and give them initial weights that are the same on every layout."""
    degree = context.layout.tensor
    config = transformer_config(model, degree)
    stages = MaskedDiffusionModel(
        Embed(model, config),
        *(Block(model, config, index) for index in range(model.num_layers)),
        Head(model, config, context.tensor_group),
    )
    initialize_weights(stages, model, seed, context.tensor_rank, degree)
    if model.tie_embeddings:
        stages[-1].vocabulary_weight = stages[0].word_embeddings.weight
    mark_shards(stages)
    return stages


def padded_vocab_size(model: ModelConfig, degree: int) -> int:
    """Rows of the vocabulary tables: a multiple of vocab_divisor × tensor-parallel degree."""
    multiple = model.vocab_divisor * degree
    return (model.vocab_size + multiple - 1) // multiple * multiple
