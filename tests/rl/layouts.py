"""Recorded rollouts trained on by any layout: what tests/training/test_layouts.py launches, and its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_mdm.config.schema import RunConfig
from tests.rl.small import rl_config
from tests.small import small_model

RL = {
    "prompts_per_rollout": 2,
    "num_iterations": 2,
    "beta": 0.1,
    "rewards": [{"name": "tests.rl.small:low_ids"}],
}
MODEL = small_model(num_layers=4, num_kv_heads=4, init_std=0.2).model_dump()
# A first step of Adam is lr·g / (|g| + ε). Of a gradient of 1e-7, where others are 1e-2, layouts agree to a fifth: with
# the usual ε of 1e-8 that is a hundredth of the rate. The gradients themselves are compared as first moments.
OPTIMIZER = {"lr": 1e-3, "eps": 1e-4}


def record_base(folder: Path) -> None:
    """On one rank: a run that records a rollout in folder/base, whose last weights others begin with."""
    from megatron_mdm.rl.run import REINFORCED
    from tests.rl.runs import run_of

    config = rl_config(
        folder,
        {**RL, "beta": 0.0, "record": True, "num_iterations": 1},
        model=MODEL,
        schedule={"steps": 1},
        checkpoint={"directory": str(folder / "base")},
    )
    run_of(config, REINFORCED)


def replay_config(folder: Path, parallel: dict[str, Any], micro_size: int) -> RunConfig:
    """The updates of the recorded rollout, from the recording run's last weights on, which are the reference, too."""
    return rl_config(
        folder,
        {**RL, "replay": str(folder / "base/rollouts")},
        model={**MODEL, "init_from": str(folder / "base")},
        parallel=parallel,
        optimizer={**OPTIMIZER, "gradient_clipping": 0.0},
        batch={"global_size": 8, "micro_size": micro_size},
        checkpoint={"directory": str(folder / "replayed")},
    )


def replay_and_watch(config: RunConfig, folder: Path, context: Any) -> dict[str, Any]:
    """A step at values of θ_old and of the reference that differ from θ's, and once more, from the weights that it
    gave; losses, gradient norms and measures. Weights and moments after the first go to the folder, by name."""
    from megatron_mdm.checkpoint.tensors import Snapshot
    from megatron_mdm.training.loop import Trainer
    from tests.rl.runs import begun

    config, _, engine, source = begun(config, context)
    source.prepare(0)
    assert source.rollout is not None
    gradients = [each for of_micro in source.prepare(1).content.gradients for each in of_micro]
    assert all(each.measures.ratio_min == each.measures.ratio_max == 1.0 for each in gradients), "weights are equal yet"
    source.rollout = source.rollout.with_values(
        *(moved(values) for values in (source.rollout.old, source.rollout.reference))
    )
    output = engine.train_batch(source.prepare(1).micro_batches, lr=OPTIMIZER["lr"])
    snapshot = Snapshot(context)
    snapshot.take(engine.optimizer_state.fragments())
    snapshot.write(folder)
    trainer = Trainer(config, context, source, engine, num_steps=2)
    steps = [trainer.train_step(1)]
    return {
        "first_norm": output.grad_norm,
        "losses": [step.loss for step in steps],
        "weighted_losses": [step.metrics["weighted_loss"] for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "sample_losses": np.stack([step.sample_loss for step in steps]),
        "t": np.stack([step.t for step in steps]),
        "ratios": [[step.metrics[f"ratio/{name}"] for name in ("min", "mean", "max")] for step in steps],
        "kl": [step.metrics["kl"] for step in steps],
        "recompute_gap": max(step.metrics["recompute_gap"] for step in steps),
        "old": source.rollout.old,
    }


def moved(values: Any) -> Any:
    """Values by up to ±0.3 off, where there are any: ratios on both sides of the clip's bounds."""
    return values + 0.3 * np.sin(np.arange(values.size)).reshape(values.shape) * (values != 0.0)


def gradient_by_autograd(config: RunConfig) -> dict[str, np.ndarray]:
    """On one rank: the gradient of −J at the place of replay_and_watch's first step, by name, from one pass over plain
    logits with the whole objective differentiated by torch."""
    import torch

    from megatron_mdm.checkpoint.initial import InitialWeights
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.models.naming import rows_of
    from megatron_mdm.rl.estimators import coefficients
    from tests.rl.runs import begun

    config, context, _, source = begun(config)
    source.prepare(0)
    rollout = source.rollout
    assert rollout is not None
    old, reference = moved(rollout.old)[1], moved(rollout.reference)[1]
    model = build_model(config.model, config.parallel, context, None)
    InitialWeights(config.model).load(model, context, config.seed)
    totals = source.totals(rollout, 0)
    low, high = config.rl.clip_range
    total = torch.zeros((), dtype=torch.float64)
    for completion in range(8):
        (micro,) = source.batches(rollout, 1, np.array([completion])).micro_batches
        (noised,) = micro.completions
        constants = coefficients(config.rl, noised.rows, totals)
        logits = model(micro.inputs, want_logits=True)
        picked = micro.inputs.selected
        chosen = logits.double().log_softmax(-1).gather(1, micro.inputs.labels[picked][:, None])[:, 0]
        log_probs = torch.zeros(picked.shape, dtype=torch.float64).masked_scatter(picked, chosen)
        scored = slice(noised.shape.prompt, noised.shape.prompt + noised.shape.scored)
        value = (torch.from_numpy(constants.c) * log_probs[:, scored]).sum(0)
        size = len(value)
        ratio = ((value - torch.from_numpy(old[completion, :size])) / constants.d).exp()
        advantage = rollout.advantages[completion]
        gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        minus = torch.from_numpy(reference[completion, :size]) - value
        total = total - (torch.from_numpy(constants.n) * (gain - config.rl.beta * (minus.exp() - minus - 1))).sum()
    total.backward()
    return {row.name: tensor.grad.numpy() for row, tensor in rows_of(model, config.model) if tensor.grad is not None}
