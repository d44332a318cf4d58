"""Padded, bucketed and packed micro-batches are one training: the same losses, and no attention across samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.batch import ModelInputs, Padded, Segments
from megatron_mdm.config.schema import ParallelConfig, RunConfig
from megatron_mdm.engine.inputs import packed, padded_to_multiple
from tests.ranks import run_ranks
from tests.small import VOCAB, small_config, small_model, write_ids


def inputs_of(lengths: list[int], segments: list[list[int]] | None = None, seed: int = 0) -> ModelInputs:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    inside = torch.arange(shape[1])[None, :] < torch.tensor(lengths)[:, None]
    tokens = torch.randint(2, VOCAB, shape, generator=generator)
    selected = (torch.rand(shape, generator=generator) < 0.5) & inside
    return ModelInputs(
        tokens=tokens,
        pattern=Padded(torch.tensor(lengths)) if segments is None else Segments(torch.tensor(segments)),
        selected=selected,
        labels=torch.randint(2, VOCAB, shape, generator=generator),
        token_weight=torch.rand(shape, generator=generator) * selected,
        row_weight=torch.rand(len(lengths), generator=generator),
    )


def test_packed_rows_stand_one_after_another() -> None:
    inputs = packed(inputs_of([5, 3, 4]))
    source = inputs_of([5, 3, 4]).tokens
    assert inputs.tokens.tolist() == [[*source[0, :5].tolist(), *source[1, :3].tolist(), *source[2, :4].tolist()]]
    assert inputs.pattern.lengths.tolist() == [[5, 3, 4]]
    assert inputs.row_starts.tolist() == [0, 5, 8]
    assert inputs.pattern.positions(12).tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]
    wider = padded_to_multiple(inputs, 8)
    assert wider.tokens.shape == (1, 16)
    assert wider.pattern.lengths.tolist() == [[5, 3, 4, 4]]
    documents = packed(inputs_of([5, 3], segments=[[2, 3], [3, 0]]))
    assert documents.pattern.lengths.tolist() == [[2, 3, 3]]
    assert documents.row_starts.tolist() == [0, 5]


def forward_packed(dtype: str) -> dict[str, Any]:
    """On a rank: logits and statistics, packed and not; logits after one segment was changed; gradients."""
    from megatron_mdm.engine.inference import DTYPES
    from megatron_mdm.models.layers import build_model
    from megatron_mdm.parallel.groups import initialize

    context = initialize()
    model = build_model(small_model(init_std=0.2), ParallelConfig(), context, 3).to(DTYPES[dtype])
    plain = inputs_of([7, 12, 3, 9])
    changed = plain.tokens.clone()
    changed[1] = (changed[1] + 1) % VOCAB
    results: dict[str, Any] = {"rows": plain.selected.nonzero()[:, 0].numpy()}
    with torch.no_grad():
        for name, inputs in {
            "plain": plain,
            "packed": packed(plain),
            "changed": packed(plain._replace(tokens=changed)),
        }.items():
            results[name] = model(inputs, want_logits=True).float().numpy()
    for name, inputs in {"plain": plain, "packed": packed(plain)}.items():
        model.zero_grad()
        total, rows = model(inputs)
        total.backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        results[f"{name}_loss"] = torch.stack([*rows, total.detach().expand(4)]).float().numpy()
        results[f"{name}_gradient"] = gradient.float().numpy()
    documents = inputs_of([9, 12], segments=[[4, 5, 0], [6, 3, 3]])
    alone = inputs_of([4, 5, 6, 3, 3])
    for row, (source, begin, end) in enumerate([(0, 0, 4), (0, 4, 9), (1, 0, 6), (1, 6, 9), (1, 9, 12)]):
        alone.tokens[row, : end - begin] = documents.tokens[source, begin:end]
        alone.selected[row] = False
        alone.selected[row, : end - begin] = documents.selected[source, begin:end]
    with torch.no_grad():
        results["documents"] = model(packed(documents), want_logits=True).float().numpy()
        results["alone"] = model(alone, want_logits=True).float().numpy()
    return results


@pytest.fixture(scope="module")
def in_fp32() -> dict[str, Any]:
    return run_ranks(forward_packed, 1, "fp32")[0]


def test_packed_equals_padded(in_fp32: dict[str, Any]) -> None:
    np.testing.assert_allclose(in_fp32["packed"], in_fp32["plain"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(in_fp32["packed_loss"], in_fp32["plain_loss"], rtol=1e-5)
    scale = np.abs(in_fp32["plain_gradient"]).max()
    np.testing.assert_allclose(in_fp32["packed_gradient"], in_fp32["plain_gradient"], atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_never_crosses_segments(dtype: str, in_fp32: dict[str, Any]) -> None:
    """Whatever stands in one sample, the others' logits stay the same, bit for bit."""
    result = in_fp32 if dtype == "fp32" else run_ranks(forward_packed, 1, dtype)[0]
    others = result["rows"] != 1
    np.testing.assert_array_equal(result["changed"][others], result["packed"][others])
    assert not np.array_equal(result["changed"][~others], result["packed"][~others])


def test_documents_in_a_sample_do_not_see_each_other(in_fp32: dict[str, Any]) -> None:
    np.testing.assert_allclose(in_fp32["documents"], in_fp32["alone"], rtol=1e-4, atol=1e-5)


def train(config: RunConfig) -> dict[str, Any]:
    """On a rank: 10 steps; losses and per-sample losses, and how many micro-batches each step had."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    config, data = inputs.resolve(config)
    context = initialize(config.parallel)
    trainer = build.build_trainer(config, data, restored_engine(None, config, context, 0), None, context)
    steps = [trainer.train_step(step) for step in range(10)]
    batches = [trainer.source.loader.batch(step).micro_batches for step in range(10)]
    return {
        "losses": [step.loss for step in steps],
        "sample_losses": np.stack([step.sample_loss for step in steps]),
        "grad_norms": [step.grad_norm for step in steps],
        "counts": [len(batch) for batch in batches],
        "fewest": min(len(micro.positions) for batch in batches for micro in batch),
    }


MODES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # name: (ranks, batch section, parallel section)
    "bucketed": (1, {"mode": "bucketed", "micro_size": 2}, {"zero": 0}),
    "bucketed_tokens": (1, {"mode": "bucketed", "micro_tokens": 64}, {"zero": 1}),
    "packed": (1, {"mode": "packed", "micro_size": 4}, {"zero": 0}),
    "packed_tokens_dp2": (2, {"mode": "packed", "micro_tokens": 64}, {"zero": 2}),
    "packed_tokens_zero3": (2, {"mode": "packed", "micro_tokens": 64}, {"zero": 3}),
    "packed_offload": (2, {"mode": "packed", "micro_tokens": 64}, {"zero": 1, "offload": "optimizer"}),
    "bucketed_tokens_dp4": (4, {"mode": "bucketed", "micro_tokens": 64}, {"zero": 1}),
    "packed_sequence": (2, {"mode": "packed", "micro_tokens": 64}, {"tensor": 2, "sequence": True}),
    "packed_pipeline": (2, {"mode": "packed", "micro_tokens": 64}, {"pipeline": 2, "recompute": "full"}),
    "packed_pipeline_dp2": (4, {"mode": "packed", "micro_tokens": 64}, {"pipeline": 2, "zero": 1}),
}


def config_of(folder: Path, batch: dict[str, Any], parallel: dict[str, Any], global_size: int = 8) -> RunConfig:
    return small_config(
        folder,
        data={"train": str(folder / "train.jsonl"), "max_length": 24, "mask_token": 60, "pad_token": 0, "eos_token": 1},
        diffusion={"views": 2},
        batch={"global_size": global_size, "micro_size": 8, **batch},
        parallel=parallel,
        optimizer={"lr": 1e-3},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    write_ids(folder / "train.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def padded(folder: Path) -> dict[str, Any]:
    return run_ranks(train, 1, config_of(folder, {"mode": "padded"}, {"zero": 0}))[0]


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_the_same_training(name: str, folder: Path, padded: dict[str, Any]) -> None:
    num_ranks, batch, parallel = MODES[name]
    results = run_ranks(train, num_ranks, config_of(folder, batch, parallel))
    for result in results:
        np.testing.assert_allclose(result["losses"], padded["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["sample_losses"], padded["sample_losses"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result["grad_norms"], padded["grad_norms"], rtol=1e-4)
        assert result["counts"] == results[0]["counts"]
    if name == "packed_pipeline":
        assert len(set(results[0]["counts"])) > 1  # so the pipeline did change its number of micro-batches


def test_more_ranks_than_samples_keep_step(folder: Path) -> None:
    """Three samples on four ranks: one rank's micro-batch is empty, and nothing changes."""
    expected = run_ranks(train, 1, config_of(folder, {"micro_size": 3}, {"zero": 0}, global_size=3))[0]
    results = run_ranks(train, 4, config_of(folder, {"micro_tokens": 48}, {"zero": 1}, global_size=3))
    assert min(result["fewest"] for result in results) == 0
    for result in results:
        np.testing.assert_allclose(result["losses"], expected["losses"], rtol=1e-5)
