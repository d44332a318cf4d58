"""Noised micro-batches → the packets that the model's stages pass on."""

import torch
from torch import Tensor

from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.diffusion.objective import LossWeights
from megatron_mdm.models.stages import Packet


def loss_packet(noised: NoisedBatch, weights: LossWeights) -> Packet:
    """A packet whose masked positions are scored against the clean tokens."""
    clean = noised.clean
    lengths = _shortened(clean.lengths.repeat(noised.views), noised.noisy.shape[1])
    return Packet(
        tokens=noised.noisy,
        lengths=lengths if clean.segments is None else clean.segments.repeat(noised.views, 1),
        selected=noised.masked,
        labels=noised.clean.tokens.repeat(noised.views, 1),
        token_weight=weights.token,
        row_weight=weights.row,
    )


def logits_packet(tokens: Tensor, lengths: Tensor, selected: Tensor) -> Packet:
    """A packet for Engine.logits: tokens [R, S], lengths [R] without padding, selected [R, S]."""
    nothing = torch.empty(0)
    return Packet(tokens, _shortened(lengths, tokens.shape[1]), selected, nothing, nothing, nothing)


def prepared(packet: Packet, *, pack: bool, multiple: int) -> Packet:
    """The packet as the model takes it: packed, where that is asked for or needed, and as long as sequence parallelism
    wants it. Samples of several segments, and a micro-batch of no samples, only exist packed."""
    if pack or packet.lengths.dim() == 2 or not len(packet.tokens):
        packet = packed(packet)
    return padded_to_multiple(packet, multiple)


def packed(packet: Packet) -> Packet:
    """The same rows one after another, without padding. Scores, weights and statistics stay by row.

    packet.lengths [R, K] are the segments of each row, 0 behind the last; else each row is one segment.
    """
    num_rows, width = packet.selected.shape
    lengths = packet.lengths.expand(num_rows) if packet.lengths.dim() == 0 else packet.lengths
    rows = lengths.sum(1) if lengths.dim() == 2 else lengths
    segments = lengths.reshape(-1)
    segments = segments[segments > 0]
    tokens = packet.tokens[torch.arange(width)[None, :] < rows[:, None]]
    if not len(tokens):  # no rank may sit a forward pass out: one token that nothing is asked of
        tokens, segments = packet.tokens.new_zeros(1), segments.new_ones(1)
    starts = rows.cumsum(0) - rows
    return packet._replace(tokens=tokens[None], lengths=segments[None], row_starts=starts)


def padded_to_multiple(packet: Packet, multiple: int) -> Packet:
    """The packet with padding on the right until S (packed: T) is a multiple, as sequence parallelism needs."""
    extra = -packet.tokens.shape[1] % multiple
    if not extra:
        return packet
    tokens = torch.nn.functional.pad(packet.tokens, (0, extra))
    if packet.is_packed:  # the padding is a segment of its own
        return packet._replace(tokens=tokens, lengths=torch.nn.functional.pad(packet.lengths, (0, 1), value=extra))
    lengths = packet.lengths if packet.lengths.dim() else packet.lengths.expand(len(packet.tokens))

    def widened(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, extra)) if tensor.dim() == 2 else tensor

    return Packet(*(widened(tensor) for tensor in packet))._replace(lengths=lengths)


def _shortened(lengths: Tensor, width: int) -> Tensor:
    """Without a dimension where no row is padded."""
    return torch.tensor(width) if bool((lengths == width).all()) else lengths
