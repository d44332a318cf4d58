"""Intervals, and the fixed validation grid."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.evaluation.exact_match import wilson_interval
from tests.ranks import run_ranks
from tests.small import small_config, write_ids


def test_wilson_interval() -> None:
    low, high = wilson_interval(81, 100)
    assert (low, high) == pytest.approx((0.7222, 0.8749), abs=1e-4)  # the textbook value
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0


def validated(config: RunConfig) -> float:
    from megatron_mdm.config.schema import EvaluationConfig
    from megatron_mdm.diffusion.mask_schedule import MaskSchedule
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.evaluation.validation import FixedGridValidation
    from megatron_mdm.models.stages import build_model
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.inputs import resolve

    config, data = resolve(config)
    context = initialize(config.parallel.tensor, 1)
    engine = InferenceEngine(build_model(config.model, config.parallel, context, 1), "fp32")
    validation = FixedGridValidation(
        data.train,
        EvaluationConfig(num_samples=7, num_times=3),
        MaskSchedule(1e-3),
        data.special_ids,
        config.batch.micro_size,
        context,
    )
    first = validation(engine)
    assert first == validation(engine)
    return first


def test_validation_loss_is_the_same_for_every_layout_seed_and_method(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 12)
    reference = run_ranks(validated, 1, small_config(tmp_path))[0]
    for num_ranks, sections in (
        (2, {}),
        (2, {"parallel": {"tensor": 2}}),
        (1, {"seed": 9, "diffusion": {"views": 2}, "batch": {"global_size": 8, "micro_size": 8}}),
    ):
        for loss in run_ranks(validated, num_ranks, small_config(tmp_path, **sections)):
            assert loss == pytest.approx(reference, rel=1e-6)
