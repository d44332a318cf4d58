"""Fine-tuning with low-rank adapters: what a run keeps, where it resumes, whose weights stand beside the adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from megatron_mdm.checkpoint.base import check_base
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.config.validate import validate
from megatron_mdm.models.adapter_rows import adapters_of, matrix_shape, targets_of
from megatron_mdm.models.families import FAMILIES
from megatron_mdm.models.parameters import checkpoint_bytes, num_parameters, parameter_table
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

NUM_STEPS = 6
SAVED_STEP = 3
LORA = {
    "rank": 4,
    "alpha": 32.0,
    "targets": ["q_proj", "value", "attn_out", "gate", "up", "down_proj"],
    "dropout": 0.25,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one": (1, {"zero": 0}, "fp32"),
    "dp2_zero3": (2, {"zero": 3, "recompute": "full"}, "fp32"),
    "tp2": (2, {"tensor": 2, "sequence": True, "zero": 2}, "fp32"),
    "pp2": (2, {"pipeline": 2, "zero": 1, "recompute": "full"}, "fp32"),
    "pp2_bf16": (2, {"pipeline": 2, "zero": 1}, "bf16"),
}
PACKED = ("tp2",)


def config_of(folder: Path, run: str, parallel: dict[str, Any], dtype: str = "fp32", **model: Any) -> RunConfig:
    return small_config(
        folder,
        model=small_model(num_layers=4, qkv_bias=True, **model).model_dump(),
        parallel=parallel,
        precision={"dtype": dtype},
        optimizer={"lr": 1e-2},
        schedule={"steps": NUM_STEPS},
        checkpoint={"directory": str(folder / run), "save_every": SAVED_STEP, "keep_last": 5},
    )


def adapted(folder: Path, run: str, layout: str = "one", base: str = "base", **lora: Any) -> RunConfig:
    _, parallel, dtype = LAYOUTS[layout]
    config = config_of(folder, run, parallel, dtype, init_from=str(folder / base), lora={**LORA, **lora})
    mode = "packed" if layout in PACKED else "padded"
    return config.model_copy(update={"batch": config.batch.model_copy(update={"mode": mode})})


def trained(configs: list[RunConfig], resume: bool = False) -> list[tuple[int, str]]:
    """On a rank: runs, one after another. Returns of each the bytes of this rank's moments, and its error."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.folder import StartMode
    from megatron_mdm.training.inputs import resolve
    from megatron_mdm.training.run import train_run

    context = initialize(configs[0].parallel)
    results = []
    for config in configs:
        resolved, data = resolve(config)
        try:
            train_run(resolved, data, context, StartMode(resume=resume))
        except UserError as error:
            results.append((0, str(error)))
            continue
        checkpoint = Path(config.checkpoint.directory) / f"checkpoints/step-{NUM_STEPS:08d}"
        engine = restored_engine(checkpoint, resolved, context, NUM_STEPS)
        states = engine.optimizer_state._torch_optimizer().state.values()
        results.append((sum(state[moment].nbytes for state in states for moment in ("exp_avg", "exp_avg_sq")), ""))
    return results


def passes(configs: list[RunConfig]) -> list[tuple[bool, Any, Any]]:
    """On a rank, of each configuration: whether a step's inputs have keys, the rows' losses in its training pass, which
    changes nothing, and then evaluated, as which tokens' losses have no dropout."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.build import build_source
    from megatron_mdm.training.inputs import resolve

    results = []
    for config in configs:
        context = initialize(config.parallel)
        resolved, data = resolve(config)
        engine = restored_engine(None, resolved, context, 0)
        micro_batches = build_source(resolved, data, None, context).prepare(0).micro_batches
        has_keys = all(each.dropout_keys is not None for each in micro_batches)
        in_training = engine.train_batch(micro_batches, 0.0).statistics
        evaluated = engine.evaluate(micro_batches)
        by_token = zip(engine.token_losses(micro_batches), micro_batches)
        assert all(
            np.allclose((tokens * inputs.token_weight).sum(1), rows.loss, rtol=1e-5)
            for (tokens, inputs), rows in zip(by_token, evaluated)
        )
        losses = [[rows.loss.cpu().numpy() for rows in found] for found in (in_training, evaluated)]
        results.append((has_keys, *(np.concatenate(found) for found in losses)))
    return results


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write_ids(folder / "train.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def moment_bytes(folder: Path) -> dict[str, list[int]]:
    """Of each layout, by rank, after a whole run; the runs stay in the folder, as does their base."""
    base = config_of(folder, "base", {"zero": 0})
    found = {"one": [run_ranks(trained, 1, [base, adapted(folder, "one")])[0][1]]}
    for name, (num_ranks, _, _) in LAYOUTS.items():
        if name not in found:
            found[name] = [rank[0] for rank in run_ranks(trained, num_ranks, [adapted(folder, name, name)])]
    assert not any(error for results in found.values() for _, error in results), found
    return {name: [size for size, _ in results] for name, results in found.items()}


def test_layouts_train_alike(folder: Path, moment_bytes: dict[str, list[int]]) -> None:
    expected = losses(folder / "one")
    assert len(expected) == NUM_STEPS
    assert abs(expected[-1] - losses(folder / "base")[0]) > 0.1
    for name, (_, _, dtype) in LAYOUTS.items():
        tolerance = 1e-5 if dtype == "fp32" else 0.02
        np.testing.assert_allclose(losses(folder / name), expected, rtol=tolerance, err_msg=name)


def test_only_training_passes_drop(folder: Path, moment_bytes: dict[str, list[int]]) -> None:
    """Beside trained adapters. Without dropout there are no keys, and both passes have the same bits."""
    names = ("with", "without")
    begun = [adapted(folder, name, init_from=str(folder / "one"), dropout=rate) for name, rate in zip(names, (0.25, 0))]
    (((has_keys, training, evaluated), (has_none, plain, plainly_evaluated)),) = run_ranks(passes, 1, begun)
    assert has_keys
    assert not has_none
    np.testing.assert_array_equal(plain, plainly_evaluated)
    np.testing.assert_array_equal(evaluated, plain)
    assert np.abs(training - plain).max() > 1e-3


def test_only_adapters_are_kept(folder: Path, moment_bytes: dict[str, list[int]]) -> None:
    """Counted: the optimizer's moments on every rank, and the tensors of a checkpoint."""
    model = small_model(num_layers=4, qkv_bias=True, lora=LORA)
    rows = {name: row for name, row in parameter_table(model).items() if row.trained}
    assert {name for adapter in adapters_of(model) for name in (adapter.a, adapter.b)} == rows.keys()
    size = sum(row.size for row in rows.values())
    padding = 64 * 8  # DeepSpeed's, of a rank's partition
    for name, found in moment_bytes.items():
        whole = 8 * size
        assert all(whole / 2 * (len(found) < 2) <= number <= whole + padding for number in found), (name, found)
        assert sum(found) >= whole, name
    for name in LAYOUTS:
        keys: set[str] = set()
        for path in (folder / name).rglob(f"step-{SAVED_STEP:08d}/tensors/*.safetensors"):
            with safe_open(path, "pt") as file:
                keys.update(file.keys())
        assert keys == {f"{row}/{kind}" for row in rows for kind in ("weight", "exp_avg", "exp_avg_sq")}, name


@pytest.mark.parametrize(("source", "layout"), [("dp2_zero3", "tp2"), ("tp2", "one"), ("one", "dp2_zero3")])
def test_it_resumes_on_another_layout(
    source: str, layout: str, folder: Path, moment_bytes: dict[str, list[int]]
) -> None:
    run = f"{source}_as_{layout}"
    shutil.copytree(folder / source, folder / run)
    shutil.rmtree(folder / run / f"checkpoints/step-{NUM_STEPS:08d}")
    run_ranks(trained, LAYOUTS[layout][0], [adapted(folder, run, layout)], True)
    np.testing.assert_allclose(losses(folder / run), losses(folder / "one"), rtol=1e-5)


def test_it_keeps_to_the_weights_that_it_began_with(folder: Path, moment_bytes: dict[str, list[int]]) -> None:
    """The base's run goes on: a resumed run takes the checkpoint that it began with. Other weights are refused, and so
    are none; a base that was moved can be named."""
    shutil.copytree(folder / "base", folder / "going_on")
    shutil.copytree(folder / "base", folder / "other")
    begun = adapted(folder, "begun", base="going_on")
    assert run_ranks(trained, 1, [begun]) == [[(moment_bytes["one"][0], "")]]
    kept = load_config(folder / "begun/config.yaml")
    assert kept.model.init_from.endswith(f"going_on/checkpoints/step-{NUM_STEPS:08d}")

    newer = folder / "going_on/checkpoints" / f"step-{NUM_STEPS + 1:08d}"
    shutil.copytree(folder / "base/checkpoints" / f"step-{SAVED_STEP:08d}", newer)
    shutil.copytree(folder / "begun", folder / "moved")
    for run in ("begun", "moved"):
        shutil.rmtree(folder / run / f"checkpoints/step-{NUM_STEPS:08d}")
    shutil.rmtree(folder / f"other/checkpoints/step-{NUM_STEPS:08d}")
    (results,) = run_ranks(
        trained,
        1,
        [begun, adapted(folder, "moved", base="base"), adapted(folder, "moved", base="other")],
        True,
    )
    assert [error for _, error in results[:2]] == ["", ""]
    assert "the file has changed since the run in" in results[2][1]
    assert "('model.init_from')" in results[2][1]
    assert losses(folder / "begun") == losses(folder / "moved") == losses(folder / "one")

    check_base(folder / "begun", kept)
    (folder / "going_on").rename(folder / "gone")
    with pytest.raises(UserError, match=r"no such folder; where it has been moved, give model\.init_from=FOLDER"):
        check_base(folder / "begun", kept)
    other = kept.model_copy(update={"model": kept.model.model_copy(update={"init_from": str(folder / "other")})})
    with pytest.raises(UserError, match="holds other weights than the adapters in"):
        check_base(folder / "begun", other)


def eight_billion(**lora: Any) -> ModelConfig:
    config = load_config("configs/sft/llada_8b_gsm8k.yaml")
    return config.model.model_copy(update={"vocab_size": 126464, "lora": config.model.lora.model_copy(update=lora)})


def test_what_8b_parameters_take() -> None:
    """At rank 16, optimizer state and checkpoints are at most 3 % of full fine-tuning's."""
    full = eight_billion()
    table = parameter_table(eight_billion(rank=16))
    trained_size = sum(row.size for row in table.values() if row.trained)
    assert trained_size / num_parameters(full) < 0.03
    assert checkpoint_bytes(eight_billion(rank=16)) / checkpoint_bytes(full) < 0.03


def test_targets_are_named_in_any_familys_words() -> None:
    plain = small_model()
    for family in FAMILIES.values():
        names = [family.keys.query, family.keys.value.rpartition(".")[2], family.keys.down]
        model = plain.model_copy(update={"lora": plain.lora.model_copy(update={"rank": 2, "targets": names})})
        assert targets_of(model) == {"query", "value", "down"}, family.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 2, "targets": ["qkv"]}}, r"'model.lora.targets': no matrix is named 'qkv'; there are "),
        ({"lora": {"rank": 2, "targets": ["head"]}, "tie_embeddings": True}, "embedding and head are one table"),
    ],
)
def test_impossible_targets_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parameter_table(small_model(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"'model.lora' trains beside frozen weights: name them by 'model.init_from'"),
        ({"init_from": "x", "kernels": "transformer_engine"}, "Transformer Engine fuses norms into the linear maps"),
        ({"init_from": "x", "lora": {"targets": ["head"]}}, r"'model.lora.dropout' cannot be applied to the head"),
        ({"init_from": "x", "compile": True}, r"'model.lora.dropout' cannot be combined with 'model.compile'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    lora = {**LORA, **changes.get("lora", {})}
    config = config_of(tmp_path, "run", {"zero": 0}, **{**changes, "lora": lora})
    with pytest.raises(UserError, match=message):
        validate(config, 1)


def test_rows_have_the_shapes_of_their_matrices() -> None:
    model = small_model(lora={"rank": 4, "targets": ["all-linear", "embedding", "head"]})
    table = parameter_table(model)
    for adapter in adapters_of(model):
        outputs, inputs = matrix_shape(model, adapter.target)
        transposed = adapter.target == "embedding"  # its A is kept by tokens
        expected = ((outputs, 4), (inputs, 4)) if transposed else ((4, inputs), (outputs, 4))
        assert (table[adapter.a].shape, table[adapter.b].shape) == expected


def measured(folder: Path) -> dict[str, Any]:
    """On a rank: the run's losses with its adapters merged and beside their base, and what asks for gradients."""
    from megatron_mdm.checkpoint.load import load_for_gradients, load_for_inference, run_config
    from megatron_mdm.models.naming import rows_of
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.reports.variance import Sketch
    from megatron_mdm.training.build import build_trainer
    from megatron_mdm.training.inputs import resolve
    from megatron_mdm.training.source import SupervisedSource

    config, data = resolve(load_config(folder / "config.yaml"))
    context = initialize(config.parallel)
    merged = load_for_inference(folder, run_config(folder), context)
    beside = load_for_gradients(folder, config, context)
    source = build_trainer(config, data, merged, None, context).source  # type: ignore[arg-type]
    assert isinstance(source, SupervisedSource)
    batches = source.prepare(0).micro_batches
    sketch = Sketch(beside.model)
    total, _ = beside.model(batches[0])
    total.backward()
    square, _ = sketch.take()
    return {
        "merged": [statistics.loss.numpy() for statistics in merged.evaluate(batches)],
        "beside": [statistics.loss.numpy() for statistics in beside.evaluate(batches)],
        "asking": {row.name for row, tensor in rows_of(beside.model, config.model) if tensor.requires_grad},
        "square": square,
    }


def test_its_gradients_variance_is_that_of_the_adapters(folder: Path, moment_bytes: dict[str, list[int]]) -> None:
    """What the variance report draws: forward passes are those of the merged weights, gradients the adapters'."""
    (found,) = run_ranks(measured, 1, folder / "one")
    model = small_model(num_layers=4, qkv_bias=True, lora=LORA)
    assert found["asking"] == {name for name, row in parameter_table(model).items() if row.trained}
    for merged, beside in zip(found["merged"], found["beside"], strict=True):
        np.testing.assert_allclose(merged, beside, rtol=1e-5)
    assert found["square"] > 0
