"""Masks of adapters' dropout: how many features they drop, what they depend on, that they keep expectations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_mdm.batch import ModelInputs, padded_rows
from megatron_mdm.engine.inputs import packed, padded_to_multiple
from megatron_mdm.models.adapter_dropout import AdapterDropout, with_dropout_keys

RATE = 0.3
WIDTH = 128  # features
LENGTH = 40
VIEWS = 2


def inputs_of(positions: list[int], lengths: list[int], step: int = 0, seed: int = 0) -> ModelInputs:
    """Rows of samples at places of a global batch, with keys."""
    num_rows = VIEWS * len(positions)
    tokens = torch.zeros(num_rows, max(lengths, default=0), dtype=torch.int64)
    selected = tokens > 0
    pattern = padded_rows(torch.tensor(lengths * VIEWS), tokens.shape[1])
    inputs = ModelInputs(tokens, pattern, selected, tokens, selected.float(), torch.ones(num_rows))
    return with_dropout_keys(inputs, seed, step, torch.tensor(positions, dtype=torch.int64))


def mask(inputs: ModelInputs, layer: int = 0, module: int = 0, rate: float = RATE, width: int = WIDTH) -> Tensor:
    """[S, R, in] bool: what is dropped."""
    assert inputs.dropout_keys is not None
    dropout = AdapterDropout(rate, layer, module)
    dropout.keys = inputs.dropout_keys.t()
    return dropout(torch.ones(*dropout.keys.shape, width), 0, 0) == 0


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_share_that_is_dropped(rate: float) -> None:
    """By features, by tokens, and in all, within 4 standard errors (5 for the greatest of many)."""
    dropped = mask(inputs_of([0, 5, 9], [LENGTH] * 3), rate=rate).float().flatten(0, 1)
    error = math.sqrt(rate * (1 - rate))
    assert abs(dropped.mean() - rate) < 4 * error / math.sqrt(dropped.numel())
    for dim in (0, 1):
        assert (dropped.mean(dim) - rate).abs().max() < 5 * error / math.sqrt(dropped.shape[dim])


BASE = inputs_of([0, 1], [LENGTH] * 2)
OTHERS = {
    "steps": mask(inputs_of([0, 1], [LENGTH] * 2, step=1)),
    "seeds": mask(inputs_of([0, 1], [LENGTH] * 2, seed=1)),
    "samples": mask(inputs_of([1, 2], [LENGTH] * 2)),
    "views": mask(BASE).view(LENGTH, VIEWS, 2, WIDTH).flip(1).flatten(1, 2),
    "layers": mask(BASE, layer=1),
    "linear maps": mask(BASE, module=1),
    "tokens": mask(BASE).roll(1, 0),
    "features": mask(BASE).roll(1, 2),
    "hashes": mask(BASE).roll(4, 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_masks_are_independent(name: str) -> None:
    """Two draws agree as often as independent ones, within 4 standard errors."""
    agree = (mask(BASE) == OTHERS[name]).float()
    expected = RATE**2 + (1 - RATE) ** 2
    # Two views swapped are each compared twice; so are neighbours, in part: pairs count half.
    error = math.sqrt(expected * (1 - expected) / (agree.numel() / 2))
    assert abs(agree.mean() - expected) < 4 * error


def test_a_shard_has_the_masks_of_its_features_and_positions() -> None:
    inputs = inputs_of([3], [LENGTH])
    whole = mask(inputs, width=30)
    dropout = AdapterDropout(RATE, 0, 0)
    dropout.keys = inputs.dropout_keys.t()  # type: ignore[union-attr]
    for first in (0, 5, 10, 15, 28):
        shard = dropout(torch.ones(8, VIEWS, min(15, 30 - first)), 16, first) == 0
        torch.testing.assert_close(shard, whole[16:24, :, first : first + 15], rtol=0, atol=0)


def test_a_token_keeps_its_mask_in_any_micro_batch() -> None:
    """Alone, beside longer rows, packed, and padded for sequence parallelism."""
    lengths = [7, 12, 9]
    together = inputs_of([4, 2, 6], lengths)
    expected = mask(together)
    in_one_row = mask(padded_to_multiple(packed(together), 8))[:, 0]
    padded = mask(padded_to_multiple(together, 8))
    assert len(padded) == 16
    start = 0
    for view in range(VIEWS):
        for index, (position, length) in enumerate(zip([4, 2, 6], lengths)):
            row = view * 3 + index
            alone = mask(inputs_of([position], [length]))[:, view]
            for found in (expected[:length, row], padded[:length, row], in_one_row[start : start + length]):
                torch.testing.assert_close(found, alone, rtol=0, atol=0)
            start += length


def test_a_micro_batch_of_no_samples_has_keys() -> None:
    keys = packed(inputs_of([], [])).dropout_keys
    assert keys is not None
    assert keys.shape == (1, 1)


def test_the_expectation_is_that_without_dropout() -> None:
    """A·x divided by the share that stays, over the steps, within 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(WIDTH, generator=generator)
    a = torch.randn(WIDTH, generator=generator) / WIDTH**0.5
    dropout = AdapterDropout(RATE, 0, 0)
    found = []
    for step in range(300):
        dropout.keys = inputs_of([0, 1], [4, 4], step).dropout_keys.t()  # type: ignore[union-attr]
        found.append(dropout(hidden.expand(4, 4, WIDTH), 0, 0) @ a / dropout.kept)
    products = torch.stack(found)
    assert abs(products.mean() - hidden @ a) < 4 * products.std() / math.sqrt(products.numel())
