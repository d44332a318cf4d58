"""Frozen matrices in 4 bits: the model is, bit for bit, the one whose matrices were quantised once."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.config.validate import FOUR_BIT_BLOCK, validate
from megatron_mdm.models.parameters import parameter_table
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

needs_library = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (nf4)")

SIZES = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "ffn_hidden_size": 128, "qkv_bias": True}
LORA = {"rank": 4, "alpha": 32.0, "dropout": 0.1, "targets": ["query", "value", "down"]}
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {  # ranks, parallel, type
    "one": (1, {"zero": 0}, "fp32"),
    "bf16_recompute": (1, {"zero": 1, "recompute": "full"}, "bf16"),
    "dp2_zero2": (2, {"zero": 2}, "fp32"),
    "tp2_sp_zero1": (2, {"tensor": 2, "sequence": True, "zero": 1}, "fp32"),
    "pp2_zero1": (2, {"pipeline": 2, "zero": 1}, "fp32"),
}
NUM_STEPS = 3


def config_of(folder: Path, parallel: dict[str, Any], dtype: str = "fp32", **lora: Any) -> RunConfig:
    return small_config(
        folder,
        model=small_model(**SIZES, lora={**LORA, **lora}).model_dump(),
        parallel=parallel,
        precision={"dtype": dtype},
        optimizer={"lr": 1e-2},
    )


def fill(layers: torch.nn.Module, model: ModelConfig, context: Any, is_rounded: bool) -> None:
    """Weights drawn by their names, on a rank; is_rounded: what would be kept in 4 bits is quantised and dequantised,
    as a whole."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from megatron_mdm.models.initialize import initialize_weights
    from megatron_mdm.models.naming import rows_of

    rows = list(rows_of(layers, model))
    initialize_weights(rows, model, 0, context.tensor_rank, context.layout.tensor)
    whole = model.model_copy(update={"lora": model.lora.model_copy(update={"base": "nf4"})})
    for row, tensor in rows:
        if is_rounded and parameter_table(whole)[row.name].is_four_bit:
            matrix = torch.empty(row.shape)
            initialize_weights([(row, matrix)], model, 0, 0, 1)
            matrix = dequantize_4bit(*quantize_4bit(matrix, blocksize=FOUR_BIT_BLOCK, quant_type="nf4"))
            with torch.no_grad():
                tensor.copy_(row.split["tensor"].shard(matrix, context.tensor_rank, context.layout.tensor))


def trained(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """On a rank: steps of each configuration, whose first matrices are rounded where they are not kept in 4 bits."""
    from megatron_mdm.engine.build import build_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    results = []
    for given in configs:
        config, data = inputs.resolve(given)
        context = initialize(config.parallel)
        is_rounded = config.model.lora.base == "model"
        load = partial(fill, model=config.model, context=context, is_rounded=is_rounded)
        engine = build_engine(config, context, load)
        trainer = build.build_trainer(config, data, engine, None, context)
        steps = [trainer.train_step(step) for step in range(NUM_STEPS)]
        logits = engine.logits(trainer.source.prepare(0).micro_batches[0])
        found = {
            "losses": np.array([step.loss for step in steps]),
            "norms": np.array([step.grad_norm for step in steps]),
            "logits": logits.float().numpy(),
        }
        for fragment in engine.optimizer_state.fragments():
            if fragment.kind == "exp_avg":
                found[fragment.name] = fragment.values.float().numpy().copy()
        results.append(found)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four_bit")
    write_ids(folder / "train.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """By layout, of each rank: [in 4 bits, rounded once, as it was]."""
    found = {}
    for name, (num_ranks, parallel, dtype) in LAYOUTS.items():
        configs = [config_of(folder, parallel, dtype, base=base) for base in ("nf4", "model")]
        found[name] = run_ranks(trained, num_ranks, configs)
    return found


@needs_library
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_model_is_the_one_that_was_rounded_once(name: str, runs: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Losses, gradients of adapters (their norms, first moments) and logits, exactly."""
    for in_four_bits, rounded in runs[name]:
        assert in_four_bits.keys() == rounded.keys()
        assert any("lora_value_A" in key for key in rounded) or name.startswith("pp2")
        for key, value in rounded.items():
            np.testing.assert_array_equal(in_four_bits[key], value, err_msg=key)


@needs_library
def test_layouts_train_alike(runs: dict[str, list[list[dict[str, Any]]]]) -> None:
    expected = runs["one"][0][0]
    for name, (_, _, dtype) in LAYOUTS.items():
        tolerance = 1e-5 if dtype == "fp32" else 0.02
        for found, _ in runs[name]:
            np.testing.assert_allclose(found["losses"], expected["losses"], rtol=tolerance, err_msg=name)


def read_back(base: RunConfig, adapted: RunConfig) -> dict[str, list[Any]]:
    """On a rank: losses of a run's checkpoint as it is resumed, read for gradients, and merged."""
    from megatron_mdm.checkpoint.load import load_for_gradients, load_for_inference, restored_engine, run_config
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.build import build_source
    from megatron_mdm.training.folder import StartMode
    from megatron_mdm.training.inputs import resolve
    from megatron_mdm.training.run import train_run

    context = initialize(base.parallel)
    for config in (base, adapted):
        train_run(*resolve(config), context, StartMode())
    folder = Path(adapted.checkpoint.directory)
    config, data = resolve(load_config(folder / "config.yaml"))
    (checkpoint,) = (folder / "checkpoints").iterdir()
    engines = {
        "resumed": restored_engine(checkpoint, config, context, NUM_STEPS),
        "gradients": load_for_gradients(folder, config, context),
        "merged": load_for_inference(folder, run_config(folder), context),
    }
    batches = build_source(config, data, None, context).prepare(0).micro_batches
    return {name: [rows.loss.numpy() for rows in engine.evaluate(batches)] for name, engine in engines.items()}


@needs_library
def test_merged_weights_are_not_rounded(folder: Path) -> None:
    """Whatever computes beside the base rounds it as the run did, in bf16 by scales in fp32."""
    configs = []
    for name, rank in (("base", 0), ("adapted", LORA["rank"])):
        config = config_of(folder, {"zero": 1}, "bf16", rank=rank, base="nf4")
        init_from = str(folder / "base") if rank else ""
        changes = {
            "model": config.model.model_copy(update={"init_from": init_from}),
            "schedule": config.schedule.model_copy(update={"steps": NUM_STEPS}),
            "checkpoint": config.checkpoint.model_copy(update={"directory": str(folder / name)}),
        }
        configs.append(config.model_copy(update=changes))
    (found,) = run_ranks(read_back, 1, *configs)
    np.testing.assert_array_equal(found["resumed"], found["gradients"])
    differences = [np.abs(merged - own).max() for merged, own in zip(found["merged"], found["resumed"])]
    assert max(differences) > 1e-3


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_it_says_what_is_missing() -> None:
    from megatron_mdm.models.four_bit import bitsandbytes

    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes, .*pip install 'megatron-mdm\[nf4\]', or use model"):
        bitsandbytes()


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        ({"zero": 3}, {}, r"nf4 cannot be combined with 'parallel.zero' 3"),
        ({"zero": 1}, {"compile": True}, r"nf4 cannot be combined with 'model.compile'"),
        ({"zero": 1}, {"hidden_size": 96}, r"'model.hidden_size' 96 is not a multiple of 64; use"),
        ({"tensor": 2}, {"ffn_hidden_size": 192}, r"'model.ffn_hidden_size' 192 is not .* 64 × 'parallel.tensor' 2"),
        ({"tensor": 2}, {"head_dim": 16}, r"the width of a head 64 is not a multiple of 64 × 'parallel.tensor' 2"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    parallel: dict[str, Any], model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path, parallel, base="nf4", dropout=0.0)
    config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": "x", **model})})
    with pytest.raises(UserError, match=message):
        validate(config, 2)


def test_what_is_kept_in_four_bits() -> None:
    """The matrices of the layers; not embeddings, norms, biases or adapters."""
    table = parameter_table(small_model(**SIZES, qk_norm=True, lora={**LORA, "base": "nf4"}))
    found = {name.removeprefix("decoder.layers.0.") for name, row in table.items() if row.is_four_bit and ".0." in name}
    assert found == {
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }
    assert not any(row.is_four_bit for name, row in table.items() if "layers" not in name)
