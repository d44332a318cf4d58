"""Training on a pretended CUDA device: no mixing of devices, the CPU's results, and how often a step waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cuda.layouts import DATA, LAYOUTS, Layout, generate_all, train_all
from tests.ranks import run_ranks
from tests.small import write_ids

# Relative. fp32: sums of fp32 numbers in another order, as between layouts (tests/training/test_layouts.py). 16 bit: a
# loss is a mean over hundreds of tokens whose logits have been rounded some tens of times, by half of 2^-8 or 2^-11.
SAME_LOSS = {"fp32": 1e-5, "bf16": 2**-7, "fp16": 2**-10}
SAME_NORM = {"fp32": 1e-4, "bf16": 2**-5, "fp16": 2**-8}
OF_THE_NORM = 1  # waits of a step: for the gradient's norm, which decides whether it is taken
# DeepSpeed's own, on the rank that waits most.
OF_DEEPSPEED = {
    "DP 2, ZeRO 3": 2 + 2,  # a micro-batch's reductions, twice; a number to mark an infinite norm by, for two groups
    "DP 2, ZeRO 3, fp16": 2 + 2,
    "TP 2, fp16": 1,
    "TP 2": 1,  # the zero of a group of parameters whose norm counts on another rank
    "TP 2, PP 2, tied": 1,
    "offload": 93,  # gradients on their way to the host, one by one, and their norms
}
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each layout gave, by rank."""
    folder = tmp_path_factory.mktemp("cuda")
    write_data(folder)
    results: dict[str, list[dict[str, Any]]] = {}
    for num_ranks in sorted({layout.num_ranks for layout in LAYOUTS.values()}):
        mine = {name: layout for name, layout in LAYOUTS.items() if layout.num_ranks == num_ranks}
        ranks = run_ranks(train_all, num_ranks, mine, folder, True)
        results |= {name: [rank[name] for rank in ranks] for name in mine}
    return results


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """In fp32, one process, by reference()."""
    folder = tmp_path_factory.mktemp("cpu")
    write_data(folder)
    layouts = {
        reference(layout): Layout(method=layout.method, model=layout.model, data=layout.data)
        for layout in LAYOUTS.values()
    }
    (results,) = run_ranks(train_all, 1, layouts, folder, False)
    return results


def reference(layout: Layout) -> str:
    """The name of the run on the CPU that trains the same."""
    return " ".join([layout.method, layout.data, *layout.model])


def write_data(folder: Path) -> None:
    for name, length in DATA.items():
        write_ids(folder / f"{name}.jsonl", 40, length=length)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_the_cpu(name: str, trained: Any, on_cpu: Results) -> None:
    layout = LAYOUTS[name]
    expected = on_cpu[reference(layout)]
    for found in trained[name]:
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=SAME_LOSS[layout.precision])
        norms = np.array(found["norms"])
        taken = np.isfinite(norms)
        assert taken[:-1].all()
        assert taken[-1] or layout.precision == "fp16"  # whose first loss scale is too large for a step, and is lowered
        np.testing.assert_allclose(norms[taken], np.array(expected["norms"])[taken], rtol=SAME_NORM[layout.precision])
        if taken[-1]:
            np.testing.assert_allclose(found["went on"][0], expected["went on"][0], rtol=SAME_LOSS[layout.precision])


@pytest.mark.parametrize("name", LAYOUTS)
def test_resumed_equals_uninterrupted(name: str, trained: Any) -> None:
    for found in trained[name]:
        (loss, norm), (expected_loss, expected_norm) = found["resumed"], found["went on"]
        assert loss == expected_loss
        assert norm == expected_norm
        scales = found["loss scales"]
        assert scales["resumed"] == scales["went on"]
        assert bool(scales["resumed"]) == (LAYOUTS[name].precision == "fp16")


def test_segments_of_one_length_are_rows_of_a_batch(trained: Any) -> None:
    """For cuDNN, with one plan for all steps, in bf16; waits and results are those of the tests above."""
    for name, layout in LAYOUTS.items():
        assert {found["equal segments"] for found in trained[name]} == {int(layout.data == "one_length")}, name


def test_zero_3_reduces_gradients_beside_the_backward_pass(trained: Any, on_cpu: Results) -> None:
    """DeepSpeed's default, which is left to it on CUDA alone."""
    for name, layout in LAYOUTS.items():
        assert {found["overlaps"] for found in trained[name]} == {layout.parallel["zero"] == 3}, name
    assert not any(found["overlaps"] for found in on_cpu.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_waits_for_the_device_once(name: str, trained: Any) -> None:
    for rank, found in enumerate(trained[name]):
        counted = found["synchronisations"]
        listed = "\n".join(f"{number:4d} {site}" for site, number in counted.items())
        assert sum(counted.values()) <= OF_THE_NORM + OF_DEEPSPEED.get(name, 0), f"rank {rank} of {name}:\n{listed}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_signed_weights_from_tokens_losses(name: str, trained: Any) -> None:
    """The pass that measures losses waits for them, once; the one that trains on their weights waits as any other."""
    allowed = [1, OF_THE_NORM + OF_DEEPSPEED.get(name, 0)]
    for found in trained[name]:
        step = found["of signed weights"]
        for counted, most in zip(step["waits"], allowed, strict=True):
            listed = "\n".join(f"{number:4d} {site}" for site, number in counted.items())
            assert sum(counted.values()) <= most, f"{name}:\n{listed}"
        rounding = SAME_LOSS[LAYOUTS[name].precision]
        np.testing.assert_allclose(step["found"], step["expected"], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", LAYOUTS)
def test_batches_are_copied_from_pinned_memory(name: str, trained: Any) -> None:
    for found in trained[name]:
        assert not found["unpinned"]


def test_generation_equals_the_cpu() -> None:
    (pretended,) = run_ranks(generate_all, 1, True)
    (expected,) = run_ranks(generate_all, 1, False)
    assert pretended == expected
