"""The short form of tests/kill.py: one kill in each phase, of runs that train everything or adapters."""

from __future__ import annotations

import pytest

from tests.kill import run_cases


@pytest.mark.alone
def test_killed_in_every_phase_and_resumed_bit_for_bit() -> None:
    outcomes = list(run_cases(4, seed=1, layouts=["zero1_bf16", "adapters"]))
    assert [outcome.fault for outcome in outcomes] == [""] * 4, outcomes
    assert all(outcome.was_killed for outcome in outcomes), outcomes
