"""Noised micro-batches → what the model takes."""

import torch
from torch import Tensor

from megatron_mdm.batch import LossWeights, ModelInputs
from megatron_mdm.diffusion.noiser import NoisedBatch


def loss_inputs(noised: NoisedBatch, weights: LossWeights) -> ModelInputs:
    """A micro-batch whose masked positions are scored against the clean tokens."""
    clean = noised.clean
    lengths = _shortened(clean.lengths.repeat(noised.views), noised.noisy.shape[1])
    return ModelInputs(
        tokens=noised.noisy,
        lengths=lengths if clean.segments is None else clean.segments.repeat(noised.views, 1),
        selected=noised.masked,
        labels=noised.clean.tokens.repeat(noised.views, 1),
        token_weight=weights.token,
        row_weight=weights.row,
    )


def logits_inputs(tokens: Tensor, lengths: Tensor, selected: Tensor) -> ModelInputs:
    """A micro-batch for Engine.logits: tokens [R, S], lengths [R] without padding, selected [R, S]."""
    nothing = torch.empty(0)
    return ModelInputs(tokens, _shortened(lengths, tokens.shape[1]), selected, nothing, nothing, nothing)


def prepared(inputs: ModelInputs, *, pack: bool, multiple: int) -> ModelInputs:
    """The inputs as the model takes it: packed, where that is asked for or needed, and as long as sequence parallelism
    wants it. Samples of several segments, and a micro-batch of no samples, only exist packed."""
    if pack or inputs.lengths.dim() == 2 or not len(inputs.tokens):
        inputs = packed(inputs)
    return padded_to_multiple(inputs, multiple)


def packed(inputs: ModelInputs) -> ModelInputs:
    """The same rows one after another, without padding. Scores, weights and statistics stay by row.

    inputs.lengths [R, K] are the segments of each row, 0 behind the last; else each row is one segment.
    """
    num_rows, width = inputs.selected.shape
    lengths = inputs.lengths.expand(num_rows) if inputs.lengths.dim() == 0 else inputs.lengths
    rows = lengths.sum(1) if lengths.dim() == 2 else lengths
    segments = lengths.reshape(-1)
    segments = segments[segments > 0]
    tokens = inputs.tokens[torch.arange(width)[None, :] < rows[:, None]]
    if not len(tokens):  # no rank may sit a forward pass out: one token that nothing is asked of
        tokens, segments = inputs.tokens.new_zeros(1), segments.new_ones(1)
    starts = rows.cumsum(0) - rows
    return inputs._replace(tokens=tokens[None], lengths=segments[None], row_starts=starts)


def padded_to_multiple(inputs: ModelInputs, multiple: int) -> ModelInputs:
    """The inputs with padding on the right until S (packed: T) is a multiple, as sequence parallelism needs."""
    extra = -inputs.tokens.shape[1] % multiple
    if not extra:
        return inputs
    tokens = torch.nn.functional.pad(inputs.tokens, (0, extra))
    if inputs.is_packed:  # the padding is a segment of its own
        return inputs._replace(tokens=tokens, lengths=torch.nn.functional.pad(inputs.lengths, (0, 1), value=extra))
    lengths = inputs.lengths if inputs.lengths.dim() else inputs.lengths.expand(len(inputs.tokens))

    def widened(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, extra)) if tensor.dim() == 2 else tensor

    return ModelInputs(*(widened(tensor) for tensor in inputs))._replace(lengths=lengths)


def _shortened(lengths: Tensor, width: int) -> Tensor:
    """Without a dimension where no row is padded."""
    return torch.tensor(width) if bool((lengths == width).all()) else lengths
