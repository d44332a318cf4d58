"""The design's proof: an objective with its own law of t, an attention pattern and a trained parameter beside frozen
ones, all from outside the package, train on every kind of layout and resume on another."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from megatron_mdm.batch import AttentionPattern, CleanBatch
from megatron_mdm.config.schema import ModelConfig, RunConfig
from megatron_mdm.config.sections.objective import ObjectiveOptions
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.noiser import NoisedBatch, Noiser
from megatron_mdm.diffusion.objective import NORMALIZATIONS, Normalization
from megatron_mdm.models.extensions import EXTENSIONS, Extension
from megatron_mdm.models.layers import Block
from megatron_mdm.models.naming import Layer
from megatron_mdm.models.parameters import ZEROS, Parameter, layer_prefix, parameter_table
from megatron_mdm.objectives import OBJECTIVES
from megatron_mdm.objectives.masked import Masked
from tests.ranks import run_ranks
from tests.small import small_config, small_model, write_ids

PROJECTION = "self_attention.linear_proj."
NUM_STEPS = 8
SAVED_STEP = 5


@dataclass(frozen=True, eq=False)
class PromptFirst(AttentionPattern):
    """A prompt sees itself, its response everything."""

    prompts: Tensor  # [R] int64, lengths
    lengths: Tensor  # [R] int64, of prompt and response

    def mask(self, length: int) -> Tensor:
        places = torch.arange(length)
        of_prompt = places < self.prompts[:, None]
        inside = places < self.lengths[:, None]
        return (of_prompt[:, None, :] | (~of_prompt[:, :, None] & inside[:, None, :]))[:, None]

    def row_lengths(self, num_rows: int, width: int) -> Tensor:
        return self.lengths


@dataclass(frozen=True)
class PowerSampler:
    """A TSampler: t = u^power, without an importance weight, so that the loss is that of its own law of t."""

    power: float

    def quantile(self, u: Floats) -> tuple[Floats, Floats]:
        return u**self.power, np.ones_like(u)

    def density(self, t: Floats) -> Floats:
        return t ** (1.0 / self.power - 1.0) / self.power

    def weighted_mass(self, num_bins: int) -> Floats:
        return np.diff(np.linspace(0.0, 1.0, num_bins + 1) ** (1.0 / self.power))


class PromptNoiser(Noiser):
    def __call__(self, batch: CleanBatch, step: int) -> NoisedBatch:
        noised = super().__call__(batch, step)
        prompts = batch.eligible.int().argmax(1)
        pattern = PromptFirst(prompts.repeat(noised.views), batch.lengths.repeat(noised.views))
        return replace(noised, pattern=pattern)


class PowerOfT(Masked):
    """Unweighted cross-entropy of masked tokens at t = u^power."""

    class Options(ObjectiveOptions):
        power: float = 1.0

    options: Options

    def noise(self, cell_density: Floats, mask_id: int) -> PromptNoiser:
        size = self.config.batch.global_size
        sampler = PowerSampler(self.options.power)
        return PromptNoiser(
            design=self.design,
            sampler=sampler,
            num_strata=size,
            global_size=size,
            mask_id=mask_id,
            seed=self.config.seed,
        )

    @property
    def normalization(self) -> Normalization:
        return NORMALIZATIONS["unweighted"]


class Biased(nn.Module):
    """A map whose outputs have a bias."""

    wrapped = "base"

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.output_bias = nn.Parameter(torch.empty(len(base.weight)))

    def forward(self, hidden: Tensor) -> Any:
        output, bias = self.base(hidden)
        return output + self.output_bias, bias


def biased_table(rows: dict[str, Parameter], model: ModelConfig) -> dict[str, Parameter]:
    rows = {name: replace(row, trained=False) for name, row in rows.items()}
    for layer in range(model.num_layers):
        name = layer_prefix(layer) + PROJECTION + "output_bias"
        rows[name] = Parameter(
            name=name,
            shape=(model.hidden_size,),
            layers=(layer + 1,),
            initial=ZEROS,
            gradient_in_parts="sequence",
            decay=False,
        )
    return rows


def attach_bias(layer: Layer, *_: Any) -> None:
    if isinstance(layer, Block):
        layer.layer.self_attention.linear_proj = Biased(layer.layer.self_attention.linear_proj)


OBJECTIVES["power_of_t"] = PowerOfT
EXTENSIONS["bias"] = Extension(biased_table, attach_bias)
MODEL = small_model(num_layers=4, num_kv_heads=4, extensions={"bias": {}})
NUM_TRAINED = 4 * MODEL.hidden_size

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"zero": 0}),
    "dp2_zero3": (2, {"zero": 3}),
    "tp2": (2, {"tensor": 2, "sequence": True, "zero": 1}),
    "pp2": (2, {"pipeline": 2, "zero": 1}),
}


def config_of(folder: Path, run: str, parallel: dict[str, Any]) -> RunConfig:
    return small_config(
        folder,
        model=MODEL.model_dump(),
        objective={"name": "power_of_t", "power": 0.5},
        parallel=parallel,
        schedule={"steps": NUM_STEPS},
        checkpoint={"directory": str(folder / run), "save_every": SAVED_STEP, "keep_last": 5},
    )


def trained(config: RunConfig, resume: bool) -> int:
    """On a rank: a run, or the rest of one. Returns the bytes of this rank's optimizer state."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.training.folder import StartMode
    from megatron_mdm.training.inputs import resolve
    from megatron_mdm.training.run import train_run

    config, data = resolve(config)
    context = initialize(config.parallel)
    train_run(config, data, context, StartMode(resume=resume))
    checkpoint = Path(config.checkpoint.directory) / f"checkpoints/step-{NUM_STEPS:08d}"
    engine = restored_engine(checkpoint, config, context, NUM_STEPS)
    states = engine.optimizer_state._torch_optimizer().state.values()
    return sum(state[moment].nbytes for state in states for moment in ("exp_avg", "exp_avg_sq"))


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extension")
    write_ids(folder / "train.jsonl", 40)
    return folder


@pytest.fixture(scope="module")
def state_bytes(folder: Path) -> dict[str, list[int]]:
    """Of each layout, by rank, after a whole run."""
    return {
        name: run_ranks(trained, num_ranks, config_of(folder, name, parallel), False)
        for name, (num_ranks, parallel) in LAYOUTS.items()
    }


def test_all_layouts_train_alike(folder: Path, state_bytes: dict[str, list[int]]) -> None:
    expected = losses(folder / "one")
    assert len(expected) == NUM_STEPS
    for name in LAYOUTS:
        np.testing.assert_allclose(losses(folder / name), expected, rtol=1e-5, err_msg=name)


def test_law_pattern_and_frozen_weights_are_in_force(folder: Path, state_bytes: dict[str, list[int]]) -> None:
    """t follows the law, and another law, pattern or parameter gives other losses."""
    mean = json.loads((folder / "one/summary.json").read_text())["t_last_step"]["mean"]
    assert mean == pytest.approx(2 / 3, abs=0.06)  # of 8 strata, 4 standard deviations at most
    expected = losses(folder / "one")
    for name, changes in {
        "uniform": {"objective": {"name": "power_of_t", "power": 1.0}},
        "plain": {"objective": {"name": "masked"}},
        "free": {"model": MODEL.model_copy(update={"extensions": {}})},
    }.items():
        changed = config_of(folder, name, {"zero": 0}).model_copy(update={"model": MODEL})
        changed = RunConfig.model_validate({**changed.model_dump(), **changes})
        run_ranks(trained, 1, changed, False)
        assert losses(folder / name)[-1] != pytest.approx(expected[-1], rel=1e-4), name


def test_frozen_parameters_have_no_optimizer_state(folder: Path, state_bytes: dict[str, list[int]]) -> None:
    padding = 64 * 8  # DeepSpeed's, of a rank's partition
    for name, (num_ranks, parallel) in LAYOUTS.items():
        # Whole on every tensor-parallel rank, divided over stages or ZeRO's ranks.
        held = 8 * NUM_TRAINED // (1 if parallel.get("tensor") else num_ranks)
        assert all(held <= found <= held + padding for found in state_bytes[name]), (name, state_bytes[name])
    keys: set[str] = set()
    for path in (folder / "dp2_zero3").rglob(f"step-{SAVED_STEP:08d}/tensors/*.safetensors"):
        with safe_open(path, "pt") as file:
            keys.update(file.keys())
    table = parameter_table(MODEL)
    assert {key.split("/")[0] for key in keys if not key.endswith("/weight")} == {
        name for name, row in table.items() if row.trained
    }
    assert {key.split("/")[0] for key in keys if key.endswith("/weight")} == table.keys()


@pytest.mark.parametrize(("source", "layout"), [("dp2_zero3", "tp2"), ("tp2", "pp2"), ("pp2", "one")])
def test_it_resumes_on_another_layout(
    source: str, layout: str, folder: Path, state_bytes: dict[str, list[int]]
) -> None:
    run = f"{source}_as_{layout}"
    shutil.copytree(folder / source, folder / run)
    shutil.rmtree(folder / run / f"checkpoints/step-{NUM_STEPS:08d}")
    num_ranks, parallel = LAYOUTS[layout]
    run_ranks(trained, num_ranks, config_of(folder, run, parallel), True)
    np.testing.assert_allclose(losses(folder / run), losses(folder / "one"), rtol=1e-5)
