"""Noised micro-batches → the packets that the model's stages pass on."""

import torch
from torch import Tensor

from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.diffusion.objective import LossWeights
from megatron_mdm.models.stages import Packet


def loss_packet(noised: NoisedBatch, weights: LossWeights) -> Packet:
    """A packet whose masked positions are scored against the clean tokens."""
    return Packet(
        hidden=noised.noisy,
        attention=attention_mask(noised.clean.lengths.repeat(noised.views), noised.noisy.shape[1]),
        selected=noised.masked,
        labels=noised.clean.tokens.repeat(noised.views, 1),
        token_weight=weights.token,
        row_weight=weights.row,
    )


def logits_packet(tokens: Tensor, lengths: Tensor, selected: Tensor) -> Packet:
    """A packet for Engine.logits: tokens [R, S], lengths [R] without padding, selected [R, S]."""
    nothing = torch.empty(0)
    return Packet(tokens, attention_mask(lengths, tokens.shape[1]), selected, nothing, nothing, nothing)


def attention_mask(lengths: Tensor, width: int) -> Tensor:
    """[R, 1, 1, S] bool, True at the first lengths[r] positions; empty where no row is padded, so kernels skip it."""
    if bool((lengths == width).all()):
        return torch.empty(0, dtype=torch.bool)
    return (torch.arange(width)[None, :] < lengths[:, None])[:, None, None, :]
