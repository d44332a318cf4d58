"""What a rank reads when it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.checkpoint.lazy_tensors import Columns, Flat, Part, Rows, as_matrix, read, read_elements
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.models.parameters import num_parameters
from tests.ranks import run_ranks
from tests.small import small_config, small_model

# Large enough for what is read besides, headers and manifests, to be little.
MODEL = small_model(hidden_size=128, num_kv_heads=4, ffn_hidden_size=384, vocab_size=1024)
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "zero1": ({"zero": 1}, "fp32"),
    "zero1_bf16": ({"zero": 1}, "bf16"),
    "zero2": ({"zero": 2}, "fp32"),
    "zero3": ({"zero": 3}, "fp32"),
    "zero3_bf16": ({"zero": 3}, "bf16"),
}


class Held:
    """A tensor in memory that counts what is read of it."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = as_matrix(values)
        self.shape = tuple(values.shape)
        self.dtype = values.dtype
        self.num_read = 0

    def read_into(self, out: torch.Tensor, row: int, column: int) -> None:
        out.copy_(self.values[row : row + len(out), column : column + out.shape[1]])
        self.num_read += out.numel()


@pytest.mark.parametrize(("start", "count"), [(0, 60), (0, 1), (7, 2), (9, 11), (13, 1), (20, 20), (23, 37), (59, 1)])
def test_elements_are_read_alone(start: int, count: int) -> None:
    """Of a tensor of 6 × 10 that is put together in each of the ways that there are, and of a vector."""
    whole = torch.arange(60.0).view(6, 10)
    held = [Held(whole[:2]), Held(whole[2:])]
    sides = [Held(whole[:, :3].contiguous()), Held(whole[:, 3:].contiguous())]
    pieces = [Held(piece.clone()) for piece in whole.view(-1).split([25, 5, 30])]
    for parts, tensor in (
        (held, Rows([Part(held[0], 0, 2), Part(held[1], 0, 4)])),
        (sides, Columns([Part(sides[0], 0, 3), Part(sides[1], 0, 7)])),
        (pieces, Flat(pieces, (6, 10))),
        (pieces, Flat(pieces, (60,))),
    ):
        for part in parts:
            part.num_read = 0
        found = read_elements(tensor, start, count, torch.float32)
        assert torch.equal(found, whole.view(-1)[start : start + count])
        assert sum(part.num_read for part in parts) == count
        assert torch.equal(read(tensor).view(-1), whole.view(-1))


def saved(config: RunConfig) -> None:
    """On a rank: a checkpoint after two steps."""
    from megatron_mdm.checkpoint.store import CheckpointStore
    from megatron_mdm.engine.build import build_engine
    from megatron_mdm.parallel.groups import initialize

    context = initialize(config.parallel)
    engine = build_engine(config, context)
    trained(engine)
    store = CheckpointStore(Path(config.checkpoint.directory), config.checkpoint, context)
    store.save(2, engine, {})
    store.finish()


def trained(engine: Any) -> list[float]:
    """Norms of two steps."""
    from megatron_mdm.batch import Full, ModelInputs

    tokens = torch.arange(12).view(2, 6)
    inputs = ModelInputs(tokens, Full(), tokens > 3, tokens, (tokens > 3).float(), torch.ones(2))
    return [engine.train_batch([inputs] * 2, 1e-2).grad_norm for _ in range(2)]


def resumed(configs: dict[str, RunConfig], checkpoint: Path) -> dict[str, Any]:
    """On a rank, for each configuration: bytes that the process read, what the engine then holds, how it goes on."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    results = {}
    for name, config in configs.items():
        before = bytes_read()
        engine = restored_engine(checkpoint, config, context, 2)
        num_bytes = bytes_read() - before
        parts = {(p.name, p.kind): (p.start, p.values.numpy().copy()) for p in engine.optimizer_state.fragments()}
        results[name] = num_bytes, parts, trained(engine)
    return results


def bytes_read() -> int:
    """By all read calls of this process so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_each_data_parallel_rank_reads_its_part(tmp_path: Path) -> None:
    """Of weights and moments in fp32, 12 bytes a parameter; and the state is the one that was saved, bit for bit."""
    run_ranks(saved, 1, small_config(tmp_path, model=MODEL.model_dump(), parallel={"zero": 0}))
    checkpoint = tmp_path / "run" / "step-00000002"
    configs = {
        name: small_config(tmp_path, model=MODEL.model_dump(), parallel=parallel, precision={"dtype": dtype})
        for name, (parallel, dtype) in {"zero0": ({"zero": 0}, "fp32"), **LAYOUTS}.items()
    }
    share = 12 * num_parameters(MODEL) / 2
    first, second = run_ranks(resumed, 2, configs, checkpoint)
    for name in LAYOUTS:
        whole = {key: values.copy() for key, (_, values) in first["zero0"][1].items()}
        norms = first["zero0"][2]
        for num_bytes, parts, _ in (first[name], second[name]):
            assert num_bytes < 1.05 * share < first["zero0"][0]
            for key, (start, values) in parts.items():
                place = whole[key][start : start + len(values)]
                np.testing.assert_array_equal(values, place, err_msg=str(key))
                place[:] = np.nan  # seen
        assert all(np.isnan(values).all() for values in whole.values())  # together the ranks hold everything
        assert first[name][2] == pytest.approx(norms, rel=0.02 if "bf16" in name else 1e-5)
