"""Noised micro-batches → what the model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mdm.batch import AttentionPattern, LossWeights, ModelInputs, SegmentBounds, Segments
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.config.validate import FP8_MULTIPLE
from megatron_mdm.diffusion.noiser import NoisedBatch
from megatron_mdm.parallel import platform


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


@dataclass(frozen=True)
class InputLayout:
    """How a run's engine takes its micro-batches."""

    pack: bool = False  # rows one after another, without padding
    # Of the length: the tensor-parallel degree under sequence parallelism, with FP8 16 positions on each of its ranks;
    # where blocks are compiled, the token budget, so that there is one length.
    multiple: int = 1

    @classmethod
    def of(cls, config: RunConfig) -> InputLayout:
        degree = config.parallel.tensor if config.parallel.sequence else 1
        if config.model.fp8:
            degree *= FP8_MULTIPLE
        multiple = math.lcm(degree, config.batch.micro_tokens) if config.model.compile else degree
        return cls(config.batch.mode == "packed", multiple)

    def __call__(self, inputs: ModelInputs) -> ModelInputs:
        """The inputs, on the host, as the model takes them: packed, where that is asked for or needed, as long as
        sequence parallelism wants them, and with all that would wait for the device if it were found there. Samples of
        several segments, and a micro-batch of no samples, only exist packed. What is so already stays as it is."""
        if not inputs.is_packed and (self.pack or isinstance(inputs.pattern, Segments) or not len(inputs.tokens)):
            inputs = packed(inputs)
        inputs = padded_to_multiple(inputs, self.multiple)
        segments = inputs.segments
        if isinstance(inputs.pattern, Segments) and inputs.pattern.kind == "segments" and segments is None:
            segments = SegmentBounds.of(inputs.pattern.lengths[0])
        return inputs._replace(places=inputs.selected_places(), segments=segments)

    def ahead(self, inputs: ModelInputs) -> ModelInputs:
        """The same, still on the host, where a CUDA device copies it from by itself."""
        ready = self(inputs)
        return ready.pinned() if platform.is_cuda() else ready

    def on_device(self, inputs: ModelInputs) -> ModelInputs:
        """The same on this rank's device."""
        return self(inputs).to(platform.device())


def packed(inputs: ModelInputs) -> ModelInputs:
    """The same rows one after another, without padding. Scores, weights and statistics stay by row."""
    num_rows, width = inputs.selected.shape
    rows = inputs.pattern.row_lengths(num_rows, width)
    pattern = inputs.pattern.packed(num_rows, width)
    positions = inputs.positions
    inside = torch.arange(width)[None, :] < rows[:, None]
    tokens = inputs.tokens[inside]
    keys = inputs.dropout_keys
    if keys is not None:
        keys = keys[inside][None]
    if positions is not None:
        positions = positions.expand(num_rows, -1)[inside][None]
    if not len(tokens):  # no rank may skip a forward pass: one token, whose logits nobody asks for
        tokens = inputs.tokens.new_zeros(1)
        keys = tokens[None] if keys is not None else None
        pattern = Segments(torch.ones(1, 1, dtype=torch.int64))
    starts = rows.cumsum(0) - rows
    return inputs._replace(
        tokens=tokens[None], pattern=pattern, positions=positions, row_starts=starts, dropout_keys=keys
    )


def padded_to_multiple(inputs: ModelInputs, multiple: int) -> ModelInputs:
    """The inputs with padding on the right until S (packed: T) is a multiple, as sequence parallelism needs."""
    num_rows, width = inputs.tokens.shape
    extra = -width % multiple
    if not extra:
        return inputs
    of_tokens = {"tokens", "positions", "dropout_keys"}
    if not inputs.is_packed:
        of_tokens |= {"selected", "labels", "token_weight"}
    widened: dict[str, Any] = {
        name: torch.nn.functional.pad(tensor, (0, extra))
        for name, tensor in inputs._asdict().items()
        if name in of_tokens and tensor is not None and tensor.dim() == 2
    }
    return inputs._replace(pattern=inputs.pattern.padded(num_rows, width, extra), **widened)
