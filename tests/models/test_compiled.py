"""Compiled blocks train as others do, and are compiled once, for one length, whatever the layers and the lengths.

Captured and differentiated by torch.compile, but run operation by operation: its code generator takes half a minute of
a CPU. launch/gpu_check.sh (`compiled`) has it generate code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_mdm.batch import ModelInputs, Segments
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

NUM_STEPS = 4
SAME = 1e-5  # sums of fp32 numbers in another order
MICRO_TOKENS = 128


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    lengths: set[int]  # of what the blocks were given
    graphs: list[int]  # compiled after each step
    graphs_of_losses: int  # of three layers: compiled for tokens' losses after these


def train(folder: Path, num_layers: int, compile_blocks: bool, **model: Any) -> Trained:
    from torch._dynamo.utils import counters

    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.models import compiled
    from megatron_mdm.models.layers import Block
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    compiled.BACKEND = "aot_eager"
    counters.clear()
    config = small_config(
        folder,
        model=small_model(num_layers=num_layers, compile=compile_blocks, **model).model_dump(),
        batch={"global_size": 8, "mode": "packed", "micro_tokens": MICRO_TOKENS},
        diffusion={"views": 2},
    )
    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    lengths = set()
    for module in engine.engine.module.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, arguments: lengths.add(arguments[0].shape[0]))
    trainer = build.build_trainer(config, data, engine, None, context)
    results, graphs = [], []
    for step in range(NUM_STEPS):
        results.append(trainer.train_step(step))
        graphs.append(counters["stats"]["unique_graphs"])
    if num_layers == 3:
        check_token_losses(engine, trainer.source.prepare(0).micro_batches)
    graphs_of_losses = counters["stats"]["unique_graphs"] - graphs[-1]
    losses = [result.loss for result in results]
    return Trained(losses, [result.grad_norm for result in results], lengths, graphs, graphs_of_losses)


def check_token_losses(engine: Any, micro_batches: list[ModelInputs]) -> None:
    """They are those of a step that changes nothing."""
    losses = engine.token_losses(micro_batches)
    rows = engine.train_batch(micro_batches, 0.0).statistics
    for row, of_tokens, each in zip(rows, losses, micro_batches, strict=True):
        np.testing.assert_allclose((of_tokens * each.token_weight).sum(1), row.loss, rtol=SAME)


def train_both(folder: Path) -> tuple[Trained, ...]:
    """Three layers, plain and compiled; two layers; with adapters, plain and compiled."""
    adapters = [train(folder, 2, compile_blocks, lora={"rank": 4}) for compile_blocks in (False, True)]
    return train(folder, 3, False), train(folder, 3, True), train(folder, 2, True), *adapters


def test_much_padding_is_cut_into_segments() -> None:
    padded = Segments(torch.tensor([[70, 30], [90, 0]])).padded(2, 100, 200)
    assert padded.lengths.tolist() == [[70, 30, 90, 90, 20], [90, 0, 90, 90, 30]]
    assert Segments(torch.tensor([[70, 29]])).padded(1, 99, 1).lengths.tolist() == [[70, 29, 1]]
    assert Segments(torch.tensor([[1]])).padded(1, 1, 127).lengths.tolist() == [[1, 64, 63]]


def test_compiled_blocks_train_as_others(tmp_path: Path) -> None:
    write_ids(tmp_path / "train.jsonl", 30)
    ((plain, compiled, shallower, adapted, adapted_compiled),) = run_ranks(train_both, 1, tmp_path)
    np.testing.assert_allclose(adapted_compiled.losses, adapted.losses, rtol=SAME)
    np.testing.assert_allclose(adapted_compiled.norms, adapted.norms, rtol=SAME)
    assert adapted_compiled.graphs[-1] == adapted_compiled.graphs[0] > 0
    np.testing.assert_allclose(compiled.losses, plain.losses, rtol=SAME)
    np.testing.assert_allclose(compiled.norms, plain.norms, rtol=SAME)
    assert len(plain.lengths) > 1
    assert compiled.lengths == {MICRO_TOKENS}  # what was padded changes no loss
    assert plain.graphs == [0] * NUM_STEPS
    assert len(set(compiled.graphs)) == 1  # after the first step nothing is compiled
    assert 0 < compiled.graphs[0] <= 12
    assert (plain.graphs_of_losses, compiled.graphs_of_losses > 0) == (0, True)  # what trains is what measures
    assert shallower.graphs[0] == 0  # another model of these blocks is not compiled anew
