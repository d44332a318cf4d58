"""What Transformer Engine is told in training with FP8, by a stand-in for it, on a pretended device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.fp8.stand_in import Pass
from tests.fp8.training import LAYOUTS, NUM_MICRO_BATCHES, NUM_STEPS, Run, train_all
from tests.ranks import run_ranks
from tests.small import write_ids

# Relative. A loss is a mean over hundreds of tokens whose logits have been rounded some tens of times to 8 bits; the
# stand-in keeps its norms in another order of operations than torch's layers, and no FP8.
SAME_LOSS = 2**-7
SAME_NORM = 2**-5
RECIPES = {"delayed": "DelayedScaling", "tensorwise": "Float8CurrentScaling"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Run], Run]]:
    """By rank: layouts with FP8, and torch's layers."""
    folder = tmp_path_factory.mktemp("fp8")
    write_ids(folder / "train.jsonl", 40)
    return run_ranks(train_all, 2, folder)


@pytest.fixture(scope="module")
def trained(both: list[tuple[dict[str, Run], Run]]) -> dict[str, list[Run]]:
    """By layout and rank."""
    return {name: [of_fp8[name] for of_fp8, _ in both] for name in LAYOUTS}


def steps(run: Run) -> list[Any]:
    return [run.parts[f"step {step}"] for step in range(NUM_STEPS)]


def by_module(passes: list[Pass]) -> dict[int, list[Pass]]:
    found: dict[int, list[Pass]] = {}
    for one in passes:
        found.setdefault(one.module, []).append(one)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_torchs_layers(name: str, both: Any) -> None:
    """The stand-in would compute with the first step's weights for ever, were it not told of each step's first pass."""
    for of_fp8, expected in both:
        run = of_fp8[name]
        np.testing.assert_allclose(run.losses, expected.losses, rtol=SAME_LOSS)
        np.testing.assert_allclose(run.norms, expected.norms, rtol=SAME_NORM)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_are_renewed_in_a_steps_first_micro_batch(name: str, trained: Any) -> None:
    for run in trained[name]:
        for part in steps(run):
            assert part.passes
            for passes in by_module(part.passes).values():
                assert [one.is_first for one in passes] == [True] + [False] * (len(passes) - 1)
                assert not passes[0].recomputing
                assert sum(not one.recomputing for one in passes) == NUM_MICRO_BATCHES


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_context_is_around_all_layers_of_a_micro_batch(name: str, trained: Any) -> None:
    layout = LAYOUTS[name]
    for rank, run in enumerate(trained[name]):
        for part in steps(run):
            assert part.reductions == len(part.contexts) == NUM_MICRO_BATCHES
            assert {context.recipe for context in part.contexts} == {RECIPES[layout.recipe]}
            assert {context.group for context in part.contexts} == {layout.group[rank]}
            assert all(one.in_fp8 for one in part.passes)
            for passes in by_module(part.passes).values():
                forward = [one.context for one in passes if not one.recomputing]
                assert len(set(forward)) == NUM_MICRO_BATCHES


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if "recompute" in layout.parallel])
def test_what_runs_again_runs_in_fp8(name: str, trained: Any) -> None:
    again = [one for run in trained[name] for part in steps(run) for one in part.passes if one.recomputing]
    assert again
    assert all(one.in_fp8 and one.with_gradients and one.is_first is False for one in again)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_are_padded_to_a_multiple(name: str, trained: Any) -> None:
    """On every rank, also of what sequence parallelism leaves it."""
    lengths = {one.shape[0] for run in trained[name] for part in steps(run) for one in part.passes}
    assert lengths
    assert not [length for length in lengths if length % 16]


@pytest.mark.parametrize("name", LAYOUTS)
def test_passes_without_gradients_leave_fp8_alone(name: str, trained: Any) -> None:
    """Validation, calibration and generation change no history of magnitudes."""
    for run in trained[name]:
        parts = {part: run.parts[part] for part in run.parts if not part.startswith("step")}
        for part in parts.values():
            assert part.passes
            assert not part.contexts
            assert not part.reductions
            assert not any(one.in_fp8 or one.with_gradients for one in part.passes)
