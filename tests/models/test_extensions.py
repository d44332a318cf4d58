"""Parameters that code outside the package adds, and those that it freezes: (IA)³'s scales around frozen weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from megatron_mdm.checkpoint.convert import export_checkpoint
from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import dump_config
from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.engine.build import build_engine
from megatron_mdm.engine.communication import MicroBatchShape
from megatron_mdm.engine.memory import rank_memory
from megatron_mdm.models.extensions import EXTENSIONS, Extension
from megatron_mdm.models.layers import Block
from megatron_mdm.models.naming import Layer
from megatron_mdm.models.parameters import ONES, Initial, Parameter, layer_prefix, num_parameters, parameter_table
from megatron_mdm.models.sharding import Split
from megatron_mdm.parallel.layout import Layout
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

FC2 = "mlp.linear_fc2."


class Scaled(nn.Module):
    """A map with its inputs and outputs scaled, and its outputs shifted by a buffer."""

    wrapped = "base"

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        outputs, inputs = base.weight.shape
        self.input_scale = nn.Parameter(torch.empty(inputs))
        self.output_scale = nn.Parameter(torch.empty(outputs))
        self.register_buffer("shift", torch.empty(outputs))

    def forward(self, hidden: torch.Tensor) -> Any:
        output, bias = self.base(hidden * self.input_scale)
        return output * self.output_scale + self.shift.to(output.dtype), bias


def scaled_table(rows: dict[str, Parameter], model: ModelConfig) -> dict[str, Parameter]:
    rows = {name: replace(row, trained=False) for name, row in rows.items()}
    for layer in range(model.num_layers):
        prefix = layer_prefix(layer) + FC2
        inputs = Parameter(
            name=prefix + "input_scale",
            shape=(model.ffn_hidden_size,),
            layers=(layer + 1,),
            initial=ONES,
            split={"tensor": Split(0)},
            decay=False,
        )
        outputs = replace(
            inputs,
            name=prefix + "output_scale",
            shape=(model.hidden_size,),
            split={},
            gradient_in_parts="sequence",
        )
        shift = replace(
            outputs,
            name=prefix + "shift",
            initial=Initial("normal", 0.1),
            gradient_in_parts="never",
            trained=False,
            is_buffer=True,
        )
        rows |= {row.name: row for row in (inputs, outputs, shift)}
    return rows


def attach_scales(layer: Layer, *_: Any) -> None:
    if isinstance(layer, Block):
        layer.layer.mlp.linear_fc2 = Scaled(layer.layer.mlp.linear_fc2)


EXTENSIONS["scaled"] = Extension(scaled_table, attach_scales)
MODEL = small_model(num_kv_heads=4, qkv_bias=True, tie_embeddings=True, extensions={"scaled": {}})
SCALES = [row for name, row in parameter_table(MODEL).items() if name.endswith(("_scale", "shift"))]
NUM_TRAINED = 2 * (64 + 32)
NUM_SHIFTS = 2 * 32


def test_the_table_has_its_rows() -> None:
    plain = parameter_table(MODEL.model_copy(update={"extensions": {}}))
    assert [name for name in parameter_table(MODEL) if name not in plain] == [row.name for row in SCALES]
    assert num_parameters(MODEL) == sum(row.size for row in plain.values()) + NUM_TRAINED + NUM_SHIFTS
    assert sum(row.size for row in parameter_table(MODEL).values() if row.trained) == NUM_TRAINED
    with pytest.raises(UserError, match=r"'model.extensions.adapters': no code has registered it \(registered: "):
        parameter_table(small_model(extensions={"adapters": {}}))


def test_a_stage_without_anything_to_train_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "stages", {"pipeline": 4})
    with pytest.raises(UserError, match=r"'parallel.pipeline' 4: stage 0 holds no parameter that is trained"):
        build_engine(config, None)  # type: ignore[arg-type]


def config_of(folder: Path, name: str, parallel: dict[str, Any], dtype: str = "fp32", **model: Any) -> RunConfig:
    section = {**MODEL.model_dump(), **model}
    checkpoint = {"directory": str(folder / name)}
    precision = {"dtype": dtype}
    return small_config(folder, model=section, parallel=parallel, precision=precision, checkpoint=checkpoint)


def trained(configs: dict[str, RunConfig], resume_from: dict[str, Path] | None = None) -> dict[str, dict[str, Any]]:
    """On a rank, for each configuration of one layout: two steps, or those after a checkpoint, and what is held."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.checkpoint.store import CheckpointStore
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training import build, inputs

    context = initialize(next(iter(configs.values())).parallel)
    results = {}
    for name, config in configs.items():
        config, data = inputs.resolve(config)
        checkpoint = (resume_from or {}).get(name)
        first = 2 if checkpoint else 0
        engine = restored_engine(checkpoint, config, context, first)
        trainer = build.build_trainer(config, data, engine, None, context)
        steps = [trainer.train_step(step) for step in range(first, first + 2)]
        store = CheckpointStore(Path(config.checkpoint.directory) / "checkpoints", config.checkpoint, context)
        store.save(first + 2, engine, {})
        store.finish()
        module = engine.engine.module
        inner = engine.optimizer_state._torch_optimizer()
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        moments = [state[key] for state in inner.state.values() for key in ("exp_avg", "exp_avg_sq")]
        weights = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
        results[name] = {
            "losses": [step.loss for step in steps],
            "norms": [step.grad_norm for step in steps],
            "frozen_gradients": sum(parameter.grad is not None for parameter in frozen),
            "moment_bytes": sum(moment.nbytes for moment in moments),
            "weight_bytes": sum(weight.nbytes for weight in weights),
            "rank": context.pipeline_rank,
        }
    return results


LAYOUTS: dict[str, tuple[int, dict[str, tuple[dict[str, Any], str]]]] = {
    "dp2": (
        2,
        {
            "zero2": ({"zero": 2}, "fp32"),
            "zero3": ({"zero": 3}, "fp32"),
            "zero0_bf16": ({"zero": 0}, "bf16"),
            "zero1_bf16": ({"zero": 1}, "bf16"),
            "zero3_bf16": ({"zero": 3}, "bf16"),
        },
    ),
    "tp2": (
        2,
        {
            "tp2_sequence": ({"tensor": 2, "sequence": True, "zero": 1}, "fp32"),
        },
    ),
    "pp2": (
        2,
        {
            "pp2_zero0": ({"pipeline": 2, "zero": 0}, "fp32"),
            "pp2_bf16": ({"pipeline": 2, "zero": 1}, "bf16"),
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("extensions")
    write_ids(folder / "train.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    return run_ranks(trained, 1, {"one": config_of(folder, "one", {"zero": 0})})[0]["one"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_trained_around_frozen_weights(layout: str, folder: Path, reference: dict[str, Any]) -> None:
    """On any layout, with tied embeddings: losses as in one process; no gradient, no optimizer state and no moments of
    what is frozen, whose weights are stored once."""
    num_ranks, variants = LAYOUTS[layout]
    configs = {name: config_of(folder, name, *variant) for name, variant in variants.items()}
    assert reference["norms"][0] > 0
    for ranks in zip(*(results.items() for results in run_ranks(trained, num_ranks, configs))):
        name = ranks[0][0]
        config = configs[ranks[0][0]]
        exact = config.precision.dtype == "fp32"
        for _, result in ranks:
            tolerance = 1e-5 if exact else 0.02
            np.testing.assert_allclose(result["losses"], reference["losses"], rtol=tolerance, err_msg=name)
            np.testing.assert_allclose(result["norms"], reference["norms"], rtol=10 * tolerance, err_msg=name)
            assert result["frozen_gradients"] == 0, name
            layout_of = Layout.of(num_ranks, config.parallel)
            planned = rank_memory(config, layout_of, result["rank"], MicroBatchShape(1, 8, 8), 1, "cpu")
            slack = 64 * 8  # DeepSpeed pads its partitions
            trained_here = NUM_TRAINED // layout_of.pipeline
            assert 0 < result["moment_bytes"] <= 8 * trained_here + slack < planned.weights, name
            assert result["weight_bytes"] == pytest.approx(planned.weights, rel=0.02), name
        assert_stored(folder / name / "checkpoints/step-00000002", config)


def assert_stored(checkpoint: Path, config: RunConfig) -> None:
    sizes: dict[str, int] = {}
    for path in checkpoint.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                name, kind = key.split("/")
                tensor = file.get_tensor(key)
                row = parameter_table(config.model)[name]
                assert row.trained or kind == "weight"
                is_master = row.trained or row.is_buffer or config.precision.dtype == "fp32"
                assert tensor.dtype == (torch.float32 if is_master else torch.bfloat16), key
                sizes[key] = sizes.get(key, 0) + tensor.numel()
    expected = {
        f"{name}/{kind}"
        for name, row in parameter_table(config.model).items()
        for kind in (("weight", "exp_avg", "exp_avg_sq") if row.trained else ("weight",))
    }
    assert sizes.keys() == expected
    for key, size in sizes.items():
        row = parameter_table(config.model)[key.split("/")[0]]
        degree = config.parallel.tensor
        copies = 1 if row.split else degree
        assert size == np.prod(row.padded_shape(degree)) * copies, key


def test_training_resumes(folder: Path, reference: dict[str, Any]) -> None:
    """From what other layouts wrote, the frozen weights' own included."""
    sources = ("one", "zero3", "tp2_sequence", "pp2_zero0")
    configs = {name: config_of(folder, f"resumed_{name}", {"zero": 0}) for name in sources}
    checkpoints = {name: folder / name / "checkpoints/step-00000002" for name in sources}
    (results,) = run_ranks(trained, 1, configs, checkpoints)
    for name, result in results.items():
        np.testing.assert_allclose(result["losses"], results["one"]["losses"], rtol=1e-5, err_msg=name)


def test_a_run_without_it_is_a_start(folder: Path, reference: dict[str, Any]) -> None:
    """The scales are drawn; the reverse is refused, and so is an export, which would lose them."""
    plain = config_of(folder, "plain", {"zero": 0}, extensions={})
    run_ranks(trained, 1, {"plain": plain})
    (folder / "plain/config.yaml").write_text(dump_config(plain, folder / "plain"), encoding="utf-8")
    start = {"init_from": str(folder / "plain")}
    begun = run_ranks(trained, 1, {"begun": config_of(folder, "begun", {"zero": 0}, **start)})[0]["begun"]
    assert np.isfinite(begun["losses"]).all()
    assert begun["losses"][0] != reference["losses"][0]  # other weights than the seed's
    config = config_of(folder, "one", {"zero": 0})
    (folder / "one/config.yaml").write_text(dump_config(config, folder / "one"), encoding="utf-8")
    backwards = MODEL.model_copy(update={"extensions": {}, "init_from": str(folder / "one")})
    with pytest.raises(UserError, match=r"holds 'decoder.layers.0.mlp.linear_fc2.input_scale', which the model lacks"):
        InitialWeights(backwards)
    with pytest.raises(UserError, match="scaled adds has no place in a Hugging Face checkpoint"):
        export_checkpoint(NativeCheckpoint.open(folder / "one"), folder / "exported", "llama", "auto", 2**30)
