"""A loss or gradient that is infinite or not a number on one rank: no rank's weights or moments change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.optimizer import scaled_unless_faulty
from tests.ranks import run_ranks
from tests.small import VOCAB, small_config, small_model

ENGINES: dict[str, tuple[int, dict[str, Any], str]] = {  # ranks, layout, type
    "zero0": (2, {"zero": 0}, "fp32"),
    "zero0_bf16": (2, {"zero": 0}, "bf16"),
    "zero1": (2, {"zero": 1}, "fp32"),
    "zero1_bf16": (2, {"zero": 1}, "bf16"),
    "zero2": (2, {"zero": 2}, "fp32"),
    "zero2_bf16": (2, {"zero": 2}, "bf16"),
    "zero3": (2, {"zero": 3}, "fp32"),
    "zero3_bf16": (2, {"zero": 3}, "bf16"),
    "tp2_dp2": (4, {"zero": 1, "tensor": 2}, "fp32"),
    "pp2_dp2_zero0": (4, {"zero": 0, "pipeline": 2}, "fp32"),
    "pp2_dp2_zero1": (4, {"zero": 1, "pipeline": 2}, "fp32"),
    "pp2_dp2_bf16": (4, {"zero": 1, "pipeline": 2}, "bf16"),
}


def faulty_steps(config: RunConfig) -> list[dict[str, Any]]:
    """On a rank: a healthy step, a faulty one of each kind, a healthy one; gradient norm and state after each."""
    from megatron_mdm.batch import Full, ModelInputs
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize

    context = initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    generator = torch.Generator().manual_seed(context.data_rank)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=generator)
    selected = torch.rand(2, 9, generator=generator) < 0.5
    selected[:, 0] = True
    healthy = ModelInputs(tokens, Full(), selected, tokens, selected.float(), torch.ones(2))
    last_rank = context.data_rank == context.layout.data - 1  # the only one with a fault

    def step(bad_loss: float, bad_gradient: float) -> dict[str, Any]:
        hooks = []
        if bad_gradient and last_rank:
            parameter = next(
                engine.optimizer_state.parameters[name] for name in sorted(engine.optimizer_state.parameters)
            )
            hooks.append(parameter.register_hook(lambda gradient: gradient * bad_gradient))
        faulty = healthy._replace(row_weight=torch.tensor([1.0, bad_loss])) if bad_loss and last_rank else healthy
        output = engine.train_batch([healthy, faulty], 1e-2)
        for hook in hooks:
            hook.remove()
        state = {f"{part.name}/{part.kind}": part.values.numpy().copy() for part in engine.optimizer_state.fragments()}
        return {"norm": output.grad_norm, "state": state}

    faults = [(0, 0), (float("nan"), 0), (float("inf"), 0), (0, float("nan")), (0, float("inf")), (0, 0)]
    return [step(*fault) for fault in faults]


@pytest.mark.parametrize("offset", [0.0, float("inf"), float("nan")])
def test_a_faulty_loss_spoils_its_gradients(offset: float) -> None:
    """Also where they would be finite: the probability 0 of a token has an infinite loss, but a gradient."""
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    scaled_unless_faulty(weight.sum() + offset, 4).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.tensor([4.0, 4.0])) == (offset == 0.0)
    assert bool(weight.grad.isfinite().all()) == (offset == 0.0)


@pytest.mark.parametrize("name", ENGINES)
def test_no_fault_reaches_weights_or_moments(name: str, tmp_path: Path) -> None:
    num_ranks, parallel, dtype = ENGINES[name]
    config = small_config(
        tmp_path,
        model=small_model(num_layers=2).model_dump(),
        parallel=parallel,
        precision={"dtype": dtype},
        batch={"global_size": 8, "micro_size": 2},
    )
    for ranks_steps in run_ranks(faulty_steps, num_ranks, config):
        first, *faulty, last = ranks_steps
        assert np.isfinite([first["norm"], last["norm"]]).all()
        for result in faulty:
            assert not np.isfinite(result["norm"])
            for key, value in result["state"].items():
                np.testing.assert_array_equal(value, first["state"][key], err_msg=key)
        changed = [key for key, value in last["state"].items() if not np.array_equal(value, first["state"][key])]
        assert len(changed) == len(last["state"])  # the step after a skipped one is an ordinary one
        assert all(np.isfinite(value).all() for value in last["state"].values())
