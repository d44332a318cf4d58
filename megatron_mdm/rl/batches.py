"""Completions of a rollout → micro-batches of their noised rows, and tokens' losses of these → completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_mdm.batch import ModelInputs, padded_rows
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.batching import computed_tokens, cut
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.generation.settings import SpecialIds
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.rl.noise import RlNoise, Rows, Shape
from megatron_mdm.rl.rollouts import Ints, Rollout


class Noised(NamedTuple):
    """A completion with its rows."""

    completion: int  # of the rollout
    shape: Shape
    rows: Rows


class MicroBatch(NamedTuple):
    """Row k·b + j of the inputs is row k of the j-th of b completions. All weights are 1."""

    completions: list[Noised]
    inputs: ModelInputs

    def log_probs(self, losses: Tensor) -> list[Floats]:
        """losses [R, S], as Forward.token_losses gives them → of each completion [K, P], 0 where unscored."""
        if not self.completions:
            return []
        by_row = losses.double().numpy().reshape(-1, len(self.completions), losses.shape[1])
        return [
            0.0 - by_row[:, place, noised.shape.prompt : noised.shape.prompt + noised.shape.scored]
            for place, noised in enumerate(self.completions)
        ]

    def weighted(self, weights: Sequence[Floats]) -> ModelInputs:
        """The inputs with a weight for each token's loss: [K, P] of each completion."""
        num_rows, width = self.inputs.tokens.shape
        by_row = np.zeros((num_rows // max(len(weights), 1), len(weights), width), dtype=np.float32)
        for place, (noised, weight) in enumerate(zip(self.completions, weights, strict=True)):
            by_row[:, place, noised.shape.prompt : noised.shape.prompt + noised.shape.scored] = weight
        return self.inputs._replace(token_weight=torch.from_numpy(by_row.reshape(num_rows, width)))


class LocalBatch(NamedTuple):
    """This data-parallel rank's part of a step's completions."""

    micro_batches: list[MicroBatch]
    num_computed: int  # tokens, padding included, one row of each completion


class Batches:
    """Cut a step's completions as `batch` says. Every rank gets the same number of micro-batches; the same completions
    make the same ones, whatever they are for: so θ, θ_old and the reference see the same bits."""

    def __init__(self, config: RunConfig, noise: RlNoise, special: SpecialIds, context: ParallelContext) -> None:
        self.rl = config.rl
        self.batch = config.batch
        self.noise = noise
        self.special = special
        self.context = context

    def __call__(self, rollout: Rollout, iteration: int, completions: Ints) -> LocalBatch:
        """completions: of the rollout, at least one."""
        shapes = {int(completion): self.shape(rollout, int(completion)) for completion in completions}
        lengths = np.array([shape.prompt + shape.length for shape in shapes.values()])
        ranks = self.context.layout.data
        of_all_ranks = cut(lengths, self.batch, self.noise.num_rows, ranks)
        mine = of_all_ranks[self.context.data_rank :: ranks]
        made = []
        for positions in mine:
            chosen = [int(completion) for completion in completions[positions]]
            made.append(self._micro_batch(rollout, iteration, {number: shapes[number] for number in chosen}))
        return LocalBatch(made, sum(computed_tokens(lengths, positions, self.batch.mode) for positions in mine))

    def shape(self, rollout: Rollout, completion: int) -> Shape:
        """Which tokens of a completion are scored, and which are in its row."""
        all_tokens = rollout.tokens.shape[1]
        scored = int(rollout.lengths[completion]) if self.rl.scope == "to_eos" else all_tokens
        prompt = int(rollout.prompt_lengths[completion // rollout.group_size])
        return Shape(prompt, scored, scored if self.rl.tail == "drop" else all_tokens)

    def _micro_batch(self, rollout: Rollout, iteration: int, shapes: dict[int, Shape]) -> MicroBatch:
        number = int(rollout.number)
        noised = []
        for completion, shape in shapes.items():
            t, weight = (of_all[iteration, completion] for of_all in (rollout.t, rollout.weight))
            rows = self.noise.rows(number, iteration, completion, shape, t, weight)
            noised.append(Noised(completion, shape, rows))
        lengths = torch.tensor([shape.prompt + shape.length for shape in shapes.values()], dtype=torch.int64)
        width = int(lengths.max()) if len(lengths) else 1
        num_rows = self.noise.num_rows
        clean = np.full((len(noised), width), self.special.pad, dtype=np.int64)
        masked, selected = np.zeros((2, num_rows, len(noised), width), dtype=np.bool_)
        for place, (completion, shape, rows) in enumerate(noised):
            end = shape.prompt + shape.length
            clean[place, : shape.prompt] = rollout.prompt_of(completion)
            clean[place, shape.prompt : end] = rollout.tokens[completion, : shape.length]
            masked[:, place, :end] = rows.masked
            selected[:, place, shape.prompt : shape.prompt + shape.scored] = rows.scored
        labels = torch.from_numpy(clean).repeat(num_rows, 1)
        chosen = torch.from_numpy(selected.reshape(-1, width))
        hidden = torch.from_numpy(masked.reshape(-1, width))
        inputs = ModelInputs(
            tokens=labels.masked_fill(hidden, self.special.mask),
            pattern=padded_rows(lengths.repeat(num_rows), width),
            selected=chosen,
            labels=labels,
            token_weight=chosen.float(),
            row_weight=torch.ones(len(chosen)),
        )
        return MicroBatch(noised, inputs)
