"""Noised micro-batches → the packets that the model's stages pass on."""

import torch
from torch import Tensor

from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.diffusion.objective import LossWeights
from megatron_mdm.models.stages import Packet


def loss_packet(noised: NoisedBatch, weights: LossWeights) -> Packet:
    """A packet whose masked positions are scored against the clean tokens."""
    return Packet(
        tokens=noised.noisy,
        lengths=_shortened(noised.clean.lengths.repeat(noised.views), noised.noisy.shape[1]),
        selected=noised.masked,
        labels=noised.clean.tokens.repeat(noised.views, 1),
        token_weight=weights.token,
        row_weight=weights.row,
    )


def logits_packet(tokens: Tensor, lengths: Tensor, selected: Tensor) -> Packet:
    """A packet for Engine.logits: tokens [R, S], lengths [R] without padding, selected [R, S]."""
    nothing = torch.empty(0)
    return Packet(tokens, _shortened(lengths, tokens.shape[1]), selected, nothing, nothing, nothing)


def padded_to_multiple(packet: Packet, multiple: int) -> Packet:
    """The packet with padding on the right until S is a multiple, as sequence parallelism needs."""
    extra = -packet.tokens.shape[1] % multiple
    if not extra:
        return packet
    lengths = packet.lengths if packet.lengths.dim() else packet.lengths.expand(len(packet.tokens))

    def widened(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, extra)) if tensor.dim() == 2 else tensor

    return Packet(*(widened(tensor) for tensor in packet))._replace(lengths=lengths)


def _shortened(lengths: Tensor, width: int) -> Tensor:
    """Without a dimension where no row is padded."""
    return torch.tensor(width) if bool((lengths == width).all()) else lengths
