"""The autoregressive baseline: what is scored, on any layout, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.batch import CleanBatch
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import EvaluationConfig, RunConfig
from megatron_mdm.diffusion.objective import NORMALIZATIONS, GlobalBatch
from megatron_mdm.objectives import check_run, objective_of
from megatron_mdm.objectives.autoregressive import next_tokens
from tests.ranks import run_ranks
from tests.small import small_config, write_ids

OBJECTIVE = {"name": "autoregressive"}
NOT_FOR_IT = {"t_sampler": "ppots", "views": 2, "strata": "sqrt"}


def trained(config: RunConfig) -> dict[str, Any]:
    """On a rank: 8 steps' losses and gradient norms, the last step's per-sample losses, the validation loss."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    config, data = inputs.resolve(config)
    assert config.model.attention == "causal"
    context = initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    trainer = build.build_trainer(config, data, engine, None, context)
    steps = [trainer.train_step(step) for step in range(8)]
    batch = config.batch.model_copy(update={"micro_size": 3})
    changed = config.model_copy(update={"evaluation": EvaluationConfig(num_samples=7), "batch": batch})
    validation = objective_of(changed).validation(data.train, data.special_ids, context)
    return {
        "losses": [step.loss for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "sample_loss": steps[-1].sample_loss,
        "validation": validation(engine),
    }


def test_positions_before_eligible_tokens_are_scored() -> None:
    batch = CleanBatch(
        tokens=torch.tensor([[5, 6, 7, 8], [9, 3, 4, 0]]),
        eligible=torch.tensor([[False, False, True, True], [True, True, True, False]]),
        delimiters=torch.zeros(2, 4, dtype=torch.bool),
        lengths=torch.tensor([4, 3]),
        positions=torch.arange(2),
        sample_ids=torch.arange(2),
    )
    scored = next_tokens(batch)
    assert scored.noisy.tolist() == batch.tokens.tolist()
    assert scored.masked.tolist() == [[False, True, True, False], [True, True, False, False]]
    assert scored.clean.tokens[scored.masked].tolist() == [7, 8, 3, 4]
    weights = NORMALIZATIONS["sample"](scored, GlobalBatch(2, 5))
    assert weights.token[scored.masked].tolist() == [0.5] * 4  # 1/P
    assert weights.row.tolist() == [0.5, 0.5]


def test_a_segment_does_not_predict_the_next() -> None:
    batch = CleanBatch(
        tokens=torch.tensor([[5, 6, 7, 8, 9]]),
        eligible=torch.ones(1, 5, dtype=torch.bool),
        delimiters=torch.zeros(1, 5, dtype=torch.bool),
        lengths=torch.tensor([5]),
        positions=torch.arange(1),
        sample_ids=torch.arange(1),
        segments=torch.tensor([[2, 3, 0]]),
    )
    assert next_tokens(batch).masked.tolist() == [[True, False, True, True, False]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("autoregressive")
    write_ids(folder / "train.jsonl", 24)
    return folder, run_ranks(trained, 1, small_config(folder, objective=OBJECTIVE, parallel={"zero": 0}))[0]


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "mode"),
    [
        (2, {"zero": 3}, "bucketed"),
        (2, {"zero": 1}, "packed"),
        (4, {"tensor": 2, "pipeline": 2, "sequence": True, "zero": 1, "recompute": "full"}, "bucketed"),
    ],
    ids=str,
)
def test_every_layout_trains_alike(
    num_ranks: int, parallel: dict[str, Any], mode: str, reference: tuple[Path, dict[str, Any]]
) -> None:
    folder, expected = reference
    config = small_config(folder, objective=OBJECTIVE, parallel=parallel, batch={"mode": mode})
    for result in run_ranks(trained, num_ranks, config):
        np.testing.assert_allclose(result["losses"], expected["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norms"], expected["grad_norms"], rtol=1e-4)
        np.testing.assert_allclose(result["sample_loss"], expected["sample_loss"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result["validation"], expected["validation"], rtol=1e-5)


def test_it_learns_and_its_only_noise_is_the_data(reference: tuple[Path, dict[str, Any]]) -> None:
    _, expected = reference
    assert np.mean(expected["losses"][-2:]) < np.mean(expected["losses"][:2])
    assert expected["losses"][-1] == pytest.approx(expected["sample_loss"].mean(), rel=1e-6)


@pytest.mark.parametrize("name", NOT_FOR_IT)
def test_settings_of_noise_are_refused(name: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, objective=OBJECTIVE, diffusion={name: NOT_FOR_IT[name]})
    with pytest.raises(UserError, match=f"'diffusion.{name}'.*no meaning"):
        check_run(config, 1)


def test_causal_attention_needs_the_method(tmp_path: Path) -> None:
    config = small_config(tmp_path, model={"attention": "causal"})
    with pytest.raises(UserError, match=r"model\.attention.*autoregressive"):
        check_run(config, 1)
