"""Learning rates."""

import itertools

import pytest

from megatron_mdm.config.schema import ScheduleConfig
from megatron_mdm.training.schedules import SCHEDULES, learning_rate


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
