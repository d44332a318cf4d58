"""Where the variance comes from and what methods leave of it, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mdm.cli.report_variance import designs_of
from megatron_mdm.config.schema import DiffusionConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.t_samplers import CENTRES, TabulatedSampler, TSampler, UniformSampler
from megatron_mdm.reports.variance import FULL, SKETCH_SIZE, Draws, Sketch, decompose, variances

NUM_DRAWS = 4000


def test_decomposition_is_unbiased() -> None:
    """Random effects of known variances on samples, rates and masks: each term's mean over many data sets."""
    generator = np.random.default_rng(0)
    num = 4000
    parts = []
    for _ in range(num):
        data = generator.normal(0.0, 1.0, (6, 1, 1))
        rate = generator.normal(0.0, 0.7, (6, 4, 1))
        parts.append(decompose(data + rate + generator.normal(0.0, 1.5, (6, 4, 3))))
    mean = np.mean(parts, axis=0)
    error = np.std(parts, axis=0) / num**0.5
    assert (np.abs(mean - [1.5**2, 0.7**2, 1.0]) < 4 * error).all()


def draws_on_a_grid(value: Floats, t: Floats) -> Draws:
    """Losses that t determines, at evenly spaced t; the gradient is a vector of two parts, (loss, 2 loss)."""
    vectors = np.stack([value, 2.0 * value], axis=1)
    return Draws(t, value, np.square(vectors).sum(1), vectors.astype(np.float32), views=1)


def exact_variance(sampler: TSampler, num_strata: int, bounds: tuple[float, float]) -> float:
    """The variance of w · t² under strata of the quantile, by quadrature over the quantile."""
    quantile = (np.arange(200_000) + 0.5) / 200_000
    t, weight = sampler.quantile(quantile)
    values = (t**2 * (weight if bounds == FULL else 1.0)).reshape(num_strata, -1)
    return float(values.var(1).mean())


@pytest.mark.parametrize("num_strata", [1, 4, 10])
@pytest.mark.parametrize("kind", ["uniform", "rising"])
def test_variance_under_strata(kind: str, num_strata: int) -> None:
    sampler = UniformSampler() if kind == "uniform" else TabulatedSampler(0.25 + 1.5 * CENTRES)
    t = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    expected = exact_variance(sampler, num_strata, FULL)
    found = variances(draws_on_a_grid(t**2, t), sampler, num_strata, FULL, np.ones(NUM_DRAWS))
    # Strata's borders lie between draws of a grid: their shares are off by up to a draw.
    assert found.loss == pytest.approx(expected, rel=0.01, abs=2e-4)
    assert found.gradient == pytest.approx(5.0 * expected, rel=0.01, abs=1e-3)


def test_draws_that_count_twice_are_two_draws() -> None:
    t = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    twice = np.where(np.arange(NUM_DRAWS) % 3 == 0, 2, 1)
    repeated = np.repeat(t, twice)
    weighted = variances(draws_on_a_grid(t**2, t), UniformSampler(), 4, FULL, twice.astype(float))
    listed = variances(draws_on_a_grid(repeated**2, repeated), UniformSampler(), 4, FULL, np.ones(len(repeated)))
    assert weighted == pytest.approx(listed, rel=1e-2)


def test_inner_products_of_sketches_are_unbiased() -> None:
    import torch

    model = torch.nn.Linear(50, 40)
    products = []
    for seed in range(200):
        sketch = Sketch(model, seed)
        vectors = []
        for number in range(2):
            generator = torch.Generator().manual_seed(number)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator) + 0.3
            vectors.append(sketch.take())
        products.append(float(vectors[0][1] @ vectors[1][1]))
    gradients = []
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        gradients.append(
            torch.cat([(torch.randn(p.shape, generator=generator) + 0.3).reshape(-1) for p in model.parameters()])
        )
    exact = float(gradients[0] @ gradients[1])
    assert len(vectors[0][1]) == SKETCH_SIZE
    assert vectors[0][0] == pytest.approx(float(gradients[0].square().sum()), rel=1e-5)
    assert abs(np.mean(products) - exact) < 4 * np.std(products) / 200**0.5


def test_methods_are_compared_at_the_runs_rates() -> None:
    run = DiffusionConfig(mask_schedule="cosine", masking="rounded_count", normalization="unweighted_masked", views=2)
    designs = designs_of(run)
    assert {(each.mask_schedule, each.normalization) for each in designs.values()} == {("cosine", "unweighted_masked")}
    assert designs["rounded count + MIRROR"] == run.model_copy(update={"t_sampler": "ppots"})
    assert designs["standard"].masking == "bernoulli"
    assert not {name for name in designs_of(DiffusionConfig()) if name.startswith("rounded")}
