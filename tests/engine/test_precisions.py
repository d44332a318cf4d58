"""One step on every layout in every precision: the gradient's norm, clipping, what moves, and Adam's own count."""

from __future__ import annotations

import gc
import itertools
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.parallel.groups import ParallelContext
from tests.ranks import run_ranks
from tests.small import VOCAB, small_config, small_model

SHARE = 1e-3  # of a row in the loss: gradients must stay below fp16's 65,504 when they are scaled by 2¹⁶
CLIPPING = 5e-4
LEARNING_RATE = 1e-2
# Losses and gradients in bf16 are rounded to 8 bits some ten times in a row on their way through two layers. Of single
# elements these errors are independent; what is common to all of them, which a norm shows, is less than their sum.
BF16 = 10 * 2.0**-9
TOLERANCE = {"fp32": 1e-4, "bf16": BF16, "fp16": BF16}

LAYOUTS: dict[int, list[dict[str, Any]]] = {  # by the number of ranks
    1: [{}],
    2: [{}, {"tensor": 2}, {"pipeline": 2}],
    4: [{"tensor": 2, "pipeline": 2}],
}
PRECISIONS = [("fp32", "model"), ("bf16", "model"), ("bf16", "fp32")]
FP16 = [("fp16", "model")]


class FirstSteps(NamedTuple):
    """Of two optimizer steps on one rank."""

    norms: list[float]
    adam_steps: list[float]  # after the first
    moved: dict[str, float]  # by parameter: the furthest move of an element in the first, in learning rates, less decay
    clipped: dict[tuple[str, int, int], float]  # (parameter, tensor-parallel shard, start): ‖first moment‖² behind it


def first_steps(configs: list[RunConfig]) -> list[FirstSteps]:
    """On a rank, for each configuration. Those of one layout follow each other and share its groups."""
    from megatron_mdm.parallel.groups import initialize

    contexts = {}
    results = []
    for config in configs:
        layout = (config.parallel.tensor, config.parallel.pipeline)
        if layout not in contexts:
            contexts[layout] = initialize(config.parallel)
        results.append(_first_steps(config, contexts[layout]))
        gc.freeze()  # DeepSpeed collects garbage often, which then looks at no engine before this one
    return results


def _first_steps(config: RunConfig, context: ParallelContext) -> FirstSteps:
    from megatron_mdm.batch import Full, ModelInputs
    from megatron_mdm.checkpoint.load import restored_engine

    engine = restored_engine(None, config, context, 0)
    state = engine.optimizer_state
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (4, 9), generator=generator)
    selected = torch.rand(4, 9, generator=generator) < 0.5
    rows = torch.arange(4).chunk(4)[context.data_rank :: context.layout.data]
    micro_batches = [
        ModelInputs(tokens[row], Full(), selected[row], tokens[row], selected[row].float(), torch.full((1,), SHARE))
        for row in rows
    ]
    before = {(part.name, part.start): part.values.clone() for part in state.fragments() if part.kind == "weight"}
    norms = [engine.train_batch(micro_batches, LEARNING_RATE).grad_norm]
    adam_steps = {float(entry["step"]) for entry in state._torch_optimizer().state.values()}
    moved: dict[str, float] = defaultdict(float)
    clipped = {}
    for part in state.fragments():
        row = state.rows[part.name]
        if part.kind == "weight":
            decay = LEARNING_RATE * config.optimizer.weight_decay * row.decay
            move = part.values - (1.0 - decay) * before[part.name, part.start]
            moved[part.name] = max(moved[part.name], float(move.abs().max()) / LEARNING_RATE)
        elif part.kind == "exp_avg":
            shard = context.tensor_rank if "tensor" in row.split else 0
            clipped[part.name, shard, part.start] = float(part.values.square().sum())
    norms.append(engine.train_batch(micro_batches, LEARNING_RATE).grad_norm)
    return FirstSteps(norms, sorted(adam_steps), dict(moved), clipped)


def config_of(folder: Path, parallel: dict[str, Any], dtype: str, gradients: str, tied: bool) -> RunConfig:
    model = small_model(num_kv_heads=4, init_std=0.2, tie_embeddings=tied)
    return small_config(
        folder,
        model=model.model_dump(),
        parallel=parallel,
        precision={"dtype": dtype, "gradients": gradients},
        batch={"global_size": 4, "micro_size": 1},
        optimizer={"lr": LEARNING_RATE, "gradient_clipping": CLIPPING, "weight_decay": 1.0, "eps": 1e-12},
    )


def configs_of(
    folder: Path, num_ranks: int, precisions: list[tuple[str, str]], tied: tuple[bool, ...]
) -> list[RunConfig]:
    """Every stage of ZeRO but 1 in 16 bit, which 0 is there; with tied embeddings where these are special: a pipeline
    has two copies of the table, ZeRO 3 gathers it in two layers."""
    return [
        config_of(folder, {**layout, "zero": zero}, *precision, is_tied)
        for layout, precision, is_tied in itertools.product(LAYOUTS[num_ranks], precisions, tied)
        for zero in (range(2) if "pipeline" in layout else range(4))
        if (precision[0] == "fp32" or zero != 1) and (not is_tied or "pipeline" in layout or zero == 3)
    ]


@pytest.fixture(scope="module")
def references(tmp_path_factory: Any) -> dict[bool, FirstSteps]:
    """Of one process in fp32, by whether embeddings are tied."""
    configs = [config_of(tmp_path_factory.mktemp("one"), {"zero": 0}, "fp32", "model", tied) for tied in (False, True)]
    (steps,) = run_ranks(first_steps, 1, configs)
    return dict(zip((False, True), steps))


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_a_step_is_that_of_one_process_in_fp32(
    num_ranks: int, references: dict[bool, FirstSteps], tmp_path: Path
) -> None:
    configs = configs_of(tmp_path, num_ranks, PRECISIONS, (False, True))
    assert_alike(configs, run_ranks(first_steps, num_ranks, configs), references)


def pretended_first_steps(configs: list[RunConfig]) -> list[FirstSteps]:
    """On a rank, on a CUDA device that is pretended: DeepSpeed has no fp16 on the CPU."""
    from tests.cuda.pretended import install

    install()
    return first_steps(configs)


def test_a_step_in_fp16_is_that_of_one_process_in_fp32(references: dict[bool, FirstSteps], tmp_path: Path) -> None:
    configs = configs_of(tmp_path, 2, FP16, (False,))
    assert_alike(configs, run_ranks(pretended_first_steps, 2, configs), references)


def assert_alike(configs: list[RunConfig], results: list[list[FirstSteps]], references: dict[bool, FirstSteps]) -> None:
    """results: of all ranks, each with an entry a configuration."""
    faults = []
    for config, *ranks in zip(configs, *results):
        expected = references[config.model.tie_embeddings]
        tied = "tied" if config.model.tie_embeddings else "untied"
        name = f"{config.precision.dtype}, gradients {config.precision.gradients}, {config.parallel}, {tied}"
        faults += [f"{name}: {fault}" for fault in faults_of(ranks, expected, TOLERANCE[config.precision.dtype])]
    assert not faults, "\n".join(faults)


def faults_of(ranks: list[FirstSteps], expected: FirstSteps, tolerance: float) -> list[str]:
    """In words: how the steps of all ranks differ from one process's."""
    faults = []
    if any(rank.norms != pytest.approx(expected.norms, rel=tolerance) for rank in ranks):
        faults.append(f"norms {[rank.norms for rank in ranks]}, not {expected.norms}")
    if any(rank.adam_steps != [1.0] for rank in ranks):
        faults.append(f"Adam's count of steps {[rank.adam_steps for rank in ranks]}, not 1")
    # Adam's first update is the gradient over its own magnitude, so an element moves by the learning rate; a second
    # decay would come on top.
    moved = {name: max(rank.moved.get(name, 0.0) for rank in ranks) for name in expected.moved}
    wrong = {name: move for name, move in moved.items() if move != pytest.approx(1.0, rel=1e-3)}
    if wrong:
        faults.append(f"moved by other than one learning rate: {wrong}")
    squares: dict[tuple[str, int, int], float] = {}
    for rank in ranks:
        squares.update(rank.clipped)
    clipped = math.sqrt(sum(squares.values())) / (1.0 - 0.9)
    if clipped != pytest.approx(CLIPPING, rel=1e-3):
        faults.append(f"gradients clipped to a norm of {clipped}, not {CLIPPING}")
    return faults


def test_the_second_step_shows_what_the_first_has_changed(references: dict[bool, FirstSteps]) -> None:
    """By more than rounding: else a model that keeps its first weights would pass."""
    for steps in references.values():
        assert abs(steps.norms[1] / steps.norms[0] - 1.0) > 3 * BF16
        assert steps.norms[0] > 2 * CLIPPING
