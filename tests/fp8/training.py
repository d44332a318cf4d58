"""Training with the stand-in on a pretended device: what it records of each pass, and what is learned."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.fp8 import stand_in

NUM_STEPS = 2
NUM_MICRO_BATCHES = 2  # of a step on a data-parallel rank
# every dimension a multiple of 16, also on one of two tensor-parallel ranks
MODEL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 64}


@dataclass(frozen=True, kw_only=True)
class Layout:
    recipe: str = "delayed"
    parallel: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    group: tuple[tuple[int, ...], ...] = ((0, 1), (0, 1))  # by rank: who scales alike


LAYOUTS = {
    "DP 2, recomputed": Layout(recipe="tensorwise", parallel={"zero": 2, "recompute": "full"}),
    "TP 2, sequence, packed": Layout(parallel={"tensor": 2, "sequence": True, "zero": 1}, batch={"mode": "packed"}),
    "PP 2, recomputed": Layout(parallel={"pipeline": 2, "zero": 1, "recompute": "full"}, group=((0,), (1,))),
}


class Part(NamedTuple):
    """What was recorded during a part of a run."""

    passes: list[stand_in.Pass]
    contexts: list[stand_in.Context]
    reductions: int


class Run(NamedTuple):
    losses: list[float]  # of steps
    norms: list[float]
    parts: dict[str, Part]  # "evaluate 0", "step 0", …, "inference"


TORCH = {"kernels": "torch"}


def train_all(folder: Path) -> tuple[dict[str, Run], Run]:
    """On a rank: (by layout, with FP8; what torch's layers in bf16 learn of the same batches)."""
    # The server that ranks are forked from has imported megatron-core without Transformer Engine.
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron" or name.startswith("megatron_mdm")]:
        del sys.modules[name]
    sys.modules.pop("tests.small", None)
    stand_in.install()
    from tests.cuda.pretended import install

    install()
    of_fp8 = {
        name: _train(layout, folder, {"kernels": "transformer_engine", "fp8": layout.recipe})
        for name, layout in LAYOUTS.items()
    }
    return of_fp8, _train(Layout(parallel={"zero": 1}), folder, TORCH)


def _train(layout: Layout, folder: Path, kernels: dict[str, Any]) -> Run:
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.build import build_trainer
    from megatron_mdm.training.inputs import resolve
    from tests.small import small_config, small_model

    data_parallel = 2 // layout.parallel.get("tensor", 1) // layout.parallel.get("pipeline", 1)
    given = small_config(
        folder,
        model=small_model(**MODEL, **kernels).model_dump(),
        parallel=layout.parallel,
        batch={"global_size": 8, "micro_size": 8 // NUM_MICRO_BATCHES // data_parallel, **layout.batch},
        precision={"dtype": "bf16"},
        logging={"profile_every": 0, "tensorboard": False},
    )
    config, data = resolve(given)
    context = initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    trainer = build_trainer(config, data, engine, None, context)
    batch = trainer.source.prepare(0).micro_batches
    run = Run([], [], {})
    for step in range(NUM_STEPS):
        if step in (0, NUM_STEPS - 1):
            _recorded(run, f"evaluate {step}", lambda: engine.evaluate(batch))
        result = _recorded(run, f"step {step}", lambda step=step: trainer.train_step(step))
        run.losses.append(result.loss)
        run.norms.append(result.grad_norm)
    if context.layout.data > 1:
        _recorded(run, "inference", lambda: _infer(config, context, batch[0]))
    return run


def _recorded(run: Run, name: str, action: Any) -> Any:
    state = stand_in.state
    before = (len(state.passes), len(state.contexts), state.reductions)
    result = action()
    run.parts[name] = Part(state.passes[before[0] :], state.contexts[before[1] :], state.reductions - before[2])
    return result


def _infer(config: Any, context: Any, inputs: Any) -> Any:
    from megatron_mdm.engine.inference import InferenceEngine
    from megatron_mdm.models.layers import build_model

    model = build_model(config.model, config.parallel, context, config.seed)
    return InferenceEngine(model, "bf16").evaluate([inputs])
