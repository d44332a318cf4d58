"""Random numbers of denoising: uniform, independent, a function of what they are for; drawn by them, tokens follow the
softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from megatron_mdm.diffusion.hashing import DISTANCE, mixed, uniforms
from megatron_mdm.diffusion.randomness import Purpose
from megatron_mdm.generation.candidates import ELEMENTS, draw, gumbel_noise
from megatron_mdm.generation.noise import NOISES, DeviceNoise, StepNoise
from megatron_mdm.generation.settings import GenerationConfig, Response
from tests.generation.test_sampler import SPECIAL, built_engine
from tests.ranks import run_ranks

CPU = torch.device("cpu")
LEAST_P = 1e-4  # of some fifty tests of fixed numbers


def of(kind: str, ids: Sequence[int], counter: int, masked: Tensor, num_tokens: int, seed: int = 0) -> StepNoise:
    return NOISES[kind](seed, Purpose.ROLLOUT, ids).at(counter, masked, num_tokens, CPU)


def numbers(
    num_rows: int = 4, num_places: int = 8, num_tokens: int = 64, counters: Sequence[int] = range(8)
) -> dict[str, Tensor]:
    """Of a device: uniform numbers for tokens [counters, rows, places, V] and for orders [counters, rows, places]."""
    masked = torch.ones(num_rows, num_places, dtype=torch.bool)
    steps = [of("device", range(num_rows), counter, masked, num_tokens) for counter in counters]
    shape = (len(counters), num_rows, num_places)
    return {
        "tokens": torch.stack([step.tokens(slice(None)) for step in steps]).view(*shape, num_tokens),
        "orders": torch.stack([step.orders for step in steps]).view(shape),
    }


def test_published_splitmix64() -> None:
    """The first numbers of seed 1234567, as https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64 lists them,
    and the extremes of uniform numbers."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    hashes = mixed(1234567 + DISTANCE * torch.arange(1, 5))
    assert [value % (1 << 64) for value in hashes.tolist()] == expected
    least, most = uniforms(torch.tensor([0, -1])).tolist()
    assert (least, 1.0 - most) == (2.0**-53, 2.0**-53)
    assert torch.isfinite(gumbel_noise(torch.tensor([least, most], dtype=torch.float64))).all()
    assert uniforms(torch.tensor([1 << 63 - 1, 5 << 12])).tolist() == [0.25 + 2.0**-53, 5.5 * 2.0**-52]


@pytest.mark.parametrize("kind", ["tokens", "orders"])
def test_uniform(kind: str) -> None:
    """By a chi-square of 256 bins, and of the 256 finest ones, whose digits the logarithm of small numbers shows."""
    values = numbers(8, 16, 64, range(16))[kind].reshape(-1)
    for digits in (8, 30):
        bins = (values * 2.0**digits).long() % 256
        assert stats.chisquare(bins.bincount(minlength=256).numpy()).pvalue > LEAST_P


@pytest.mark.parametrize(("kind", "dim"), [("tokens", dim) for dim in range(4)] + [("orders", dim) for dim in range(3)])
def test_neighbours_are_independent(kind: str, dim: int) -> None:
    """Of steps, prompts, places and tokens: a chi-square of 8 × 8 bins of pairs at distances 1 and 2; and correlation
    in the order of memory, within 4 standard errors."""
    values = numbers(16, 16, 32, range(16))[kind]
    for distance in (1, 2):
        number = values.shape[dim] - distance
        pairs = (values.narrow(dim, start, number).reshape(-1) for start in (0, distance))
        first, second = ((each * 8).long() for each in pairs)
        assert stats.chisquare((first * 8 + second).bincount(minlength=64).numpy()).pvalue > LEAST_P
    assert abs(np.corrcoef(values.flatten()[:-1], values.flatten()[1:])[0, 1]) < 4 / len(values.flatten()) ** 0.5


def test_what_numbers_are_a_function_of() -> None:
    """Not of the other rows of a batch, nor of what else is masked; of seed, purpose, prompt, step and place."""
    masked = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    ids = [7, 10**12 + 5, 3]  # of a rollout, any
    batch = of("device", ids, 5, masked, 50)
    begin = 0
    for row, index in enumerate(ids):
        alone = of("device", [index], 5, torch.ones(1, 8, dtype=torch.bool), 50)
        mine = slice(begin, begin + int(masked[row].sum()))
        begin = mine.stop
        assert torch.equal(batch.orders[mine], alone.orders[masked[row]])
        assert torch.equal(batch.tokens(mine), alone.tokens(slice(None))[masked[row]])
    everything = torch.ones(1, 8, dtype=torch.bool)
    base = of("device", [7], 5, everything, 50)
    others = [
        of("device", [8], 5, everything, 50),
        of("device", [7], 6, everything, 50),
        of("device", [7], 5, everything, 50, seed=1),
        DeviceNoise(0, Purpose.GENERATION, [7]).at(5, everything, 50, CPU),
    ]
    for other in others:
        assert not np.intersect1d(base.tokens(slice(None)), other.tokens(slice(None))).size
        assert not np.intersect1d(base.orders, other.orders).size
    assert not np.intersect1d(base.tokens(slice(None)), base.orders).size


@pytest.mark.parametrize("kind", NOISES)
def test_tokens_follow_the_softmax(kind: str) -> None:
    """A chi-square of 40,000 draws at temperature 0.7, where the mask, the likeliest, is never drawn."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, -2.5, 3.0])
    drawn = of(kind, range(10), 3, torch.ones(10, 4000, dtype=torch.bool), 7)
    tokens = draw(logits.repeat(40_000, 1), 0.7, 1.0, 0, 6, drawn.tokens).tokens
    expected = (logits[:6].double() / 0.7).softmax(0) * 40_000
    assert stats.chisquare(tokens.bincount(minlength=6).numpy(), expected.numpy()).pvalue > LEAST_P


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("mask_id", [None, 11])
def test_large_vocabularies_are_drawn_part_by_part(kind: str, mask_id: int | None) -> None:
    vocab = 30_000
    masked = torch.ones(2, 4, dtype=torch.bool)
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0))
    assert 8 * vocab > 3 * ELEMENTS["cpu"]
    drawn = of(kind, [3, 4], 0, masked, vocab)
    found = draw(logits.clone(), 0.7, 1.0, 0, mask_id, drawn.tokens)
    noisy = logits.double() / 0.7 + gumbel_noise(drawn.tokens(slice(None)))
    if mask_id is not None:
        noisy[:, mask_id] = float("-inf")
    assert torch.equal(found.tokens, noisy.argmax(1))
    assert torch.equal(found.drawn_from, logits.double() / 0.7)
    assert torch.equal(found.logits, logits)


def by_number(noise: str, prompts: Mapping[int, Sequence[int]] | Sequence[Sequence[int]]) -> list[dict[int, Response]]:
    """On a rank: responses by number, as a rollout and as generation draw them."""
    from megatron_mdm.generation.generate import generate_by_turns
    from megatron_mdm.generation.sampler import denoise

    engine, context = built_engine(1, 1)
    config = GenerationConfig(gen_length=8, block_length=4, steps=8, temperature=1.0, batch_size=2, noise=noise)
    results = []
    for purpose in (Purpose.ROLLOUT, Purpose.GENERATION):
        decode = partial(denoise, purpose=purpose)
        found: dict[int, Response] = {}
        for share in generate_by_turns(engine, prompts, sorted(prompts), config, SPECIAL, context, decode):  # type: ignore[type-var]
            found.update(share)
        results.append(found)
    return results


def test_rollouts_are_drawn_by_their_numbers() -> None:
    """Completions of one prompt, with numbers of any size, on two ranks: unlike each other, alike on one rank alone."""
    prompts = {10**10 + number: [5, 6, 7] for number in range(5)}
    first, second = run_ranks(by_number, 2, "device", prompts)
    assert first == second
    rollouts, generated = first
    assert rollouts.keys() == prompts.keys()
    assert len({tuple(response.tokens) for response in [*rollouts.values(), *generated.values()]}) == 10
    some = {number: prompt for number, prompt in prompts.items() if number % 2}
    (alone,) = run_ranks(by_number, 1, "device", some)
    assert alone[0] == {number: rollouts[number] for number in some}
