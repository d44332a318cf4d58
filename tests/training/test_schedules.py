"""Learning rates."""

import itertools
from pathlib import Path

import pytest

from megatron_mdm.config.schema import ScheduleConfig
from megatron_mdm.training.inputs import total_steps
from megatron_mdm.training.schedules import SCHEDULES, learning_rate
from tests.small import small_config


def rates(**settings: object) -> list[float]:
    schedule = ScheduleConfig(steps=100, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, 100, 2.0, schedule) for step in range(101)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_peak_and_end(name: str) -> None:
    lr = rates(name=name, warmup_steps=10, min_lr_ratio=0.1)
    assert lr[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert lr[10] == pytest.approx(2.0)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(lr[10:]))
    assert lr[100] == pytest.approx(2.0 if name == "constant" else 0.2)


def test_shapes() -> None:
    assert rates(name="linear")[50] == pytest.approx(1.0)
    assert rates(name="cosine")[25] == pytest.approx(1.0 + 2**-0.5)
    wsd = rates(name="wsd", decay_fraction=0.2)
    assert wsd[80] == pytest.approx(2.0)
    assert wsd[90] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("epochs", "num_samples", "steps"),
    [(1, 32, 4), (1, 33, 5), (2, 33, 9), (0.5, 17, 2), (0.01, 8, 1), (0.1, 240, 3), (1e-5, 10**6, 2)],
)
def test_epochs_are_rounded_up_to_whole_batches(epochs: float, num_samples: int, steps: int, tmp_path: Path) -> None:
    """So that the last samples are seen."""
    config = small_config(tmp_path, schedule={"steps": 0, "epochs": epochs}, batch={"global_size": 8})
    assert total_steps(config, num_samples) == steps
    fixed = small_config(tmp_path, schedule={"steps": 7})
    assert total_steps(fixed, num_samples) == 7
