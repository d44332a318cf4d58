"""Noised micro-batches → what the model takes."""

import math

import torch
from torch import Tensor

from megatron_mdm.batch import AttentionPattern, LossWeights, ModelInputs, Segments
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.noiser import NoisedBatch


def loss_inputs(noised: NoisedBatch, weights: LossWeights) -> ModelInputs:
    """A micro-batch whose masked positions are scored against the clean tokens."""
    return ModelInputs(
        tokens=noised.noisy,
        pattern=noised.pattern,
        selected=noised.masked,
        labels=noised.clean.tokens.repeat(noised.views, 1),
        token_weight=weights.token,
        row_weight=weights.row,
    )


def logits_inputs(tokens: Tensor, pattern: AttentionPattern, selected: Tensor) -> ModelInputs:
    """A micro-batch for Engine.logits: tokens [R, S], selected [R, S]. With a window of a cache, whose tokens are some
    of longer rows', the pattern is of the whole rows."""
    nothing = torch.empty(0)
    return ModelInputs(tokens, pattern, selected, nothing, nothing, nothing)


def length_multiple(config: RunConfig) -> int:
    """What a micro-batch's length must be a multiple of: under sequence parallelism the tensor-parallel degree, where
    blocks are compiled the token budget, so that there is one length."""
    degree = config.parallel.tensor if config.parallel.sequence else 1
    return math.lcm(degree, config.batch.micro_tokens) if config.model.compile else degree


def prepared(inputs: ModelInputs, *, pack: bool, multiple: int) -> ModelInputs:
    """The inputs, on the host, as the model takes them: packed, where that is asked for or needed, and as long as
    sequence parallelism wants them. Samples of several segments, and a micro-batch of no samples, only exist packed."""
    if pack or isinstance(inputs.pattern, Segments) or not len(inputs.tokens):
        inputs = packed(inputs)
    return padded_to_multiple(inputs, multiple)


def packed(inputs: ModelInputs) -> ModelInputs:
    """The same rows one after another, without padding. Scores, weights and statistics stay by row."""
    num_rows, width = inputs.selected.shape
    rows = inputs.pattern.row_lengths(num_rows, width)
    pattern = inputs.pattern.packed(num_rows, width)
    positions = inputs.positions
    inside = torch.arange(width)[None, :] < rows[:, None]
    tokens = inputs.tokens[inside]
    if positions is not None:
        positions = positions.expand(num_rows, -1)[inside][None]
    if not len(tokens):  # no rank may skip a forward pass: one token, whose logits nobody asks for
        tokens = inputs.tokens.new_zeros(1)
        pattern = Segments(torch.ones(1, 1, dtype=torch.int64))
    starts = rows.cumsum(0) - rows
    return inputs._replace(tokens=tokens[None], pattern=pattern, positions=positions, row_starts=starts)


def padded_to_multiple(inputs: ModelInputs, multiple: int) -> ModelInputs:
    """The inputs with padding on the right until S (packed: T) is a multiple, as sequence parallelism needs."""
    num_rows, width = inputs.tokens.shape
    extra = -width % multiple
    if not extra:
        return inputs
    of_tokens = {"tokens", "positions"}
    if not inputs.is_packed:
        of_tokens |= {"selected", "labels", "token_weight"}
    widened = {
        name: torch.nn.functional.pad(tensor, (0, extra))
        for name, tensor in inputs._asdict().items()
        if name in of_tokens and tensor is not None and tensor.dim() == 2
    }
    return inputs._replace(pattern=inputs.pattern.padded(num_rows, width, extra), **widened)
