"""One model, any layout: the same t, masks and losses whatever the ranks, the sharding and the accumulation."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_mdm.checkpoint.tensors import TensorReader
from megatron_mdm.config.load import flatten
from megatron_mdm.config.schema import ImageConfig, ObjectiveConfig, RunConfig
from tests.ranks import run_ranks
from tests.rl.layouts import gradient_by_autograd, record_base, replay_and_watch, replay_config
from tests.small import IMAGES, small_config, small_model, write_ids, write_images

METHOD = {
    "t_sampler": "ppots",
    "views": 2,
    "strata": "full",
    "calibration": {"num_samples": 3, "num_times": 10, "num_masks": 4, "num_restarts": 3},
}

LORA = {"rank": 4, "alpha": 32.0, "targets": ["all-linear", "embedding", "head"]}

IMAGE_LAYOUTS = ("dp2_zero1", "tp2_zero0", "pp2_zero0", "dp2_zero3")

LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {  # name: (ranks, parallel section, micro-batch size)
    "dp2_zero0": (2, {"zero": 0}, 2),
    "dp2_zero1": (2, {"zero": 1}, 2),
    "dp2_zero2": (2, {"zero": 2}, 2),
    "dp2_zero3": (2, {"zero": 3}, 2),
    "dp2_no_accumulation": (2, {"zero": 1}, 4),
    "tp2_zero0": (2, {"tensor": 2, "zero": 0}, 4),
    "tp2_sp_zero3": (2, {"tensor": 2, "sequence": True, "zero": 3}, 4),
    "tp2_sp_recompute": (2, {"tensor": 2, "sequence": True, "recompute": "full"}, 4),
    "dp2_zero3_recompute": (2, {"zero": 3, "recompute": "full", "recompute_interval": 2}, 2),
    "dp2_selective": (2, {"zero": 1, "recompute": "selective"}, 1),
    "dp2_offload": (2, {"zero": 1, "offload": "optimizer"}, 2),
    "dp2_zero3_offload": (2, {"zero": 3, "offload": "all"}, 2),
    "pp2_zero0": (2, {"pipeline": 2, "zero": 0}, 2),
    "dp4": (4, {"zero": 1}, 1),
    "tp2_dp2_zero1": (4, {"tensor": 2, "zero": 1}, 2),
    "tp2_dp2_zero2": (4, {"tensor": 2, "zero": 2}, 2),
    "tp2_dp2_zero3": (4, {"tensor": 2, "zero": 3}, 2),
    "pp2_dp2_zero1": (4, {"pipeline": 2, "zero": 1}, 2),
    "pp4": (4, {"pipeline": 4, "zero": 1}, 2),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2, "zero": 1}, 2),
    "tp2_pp2_zero0": (4, {"tensor": 2, "pipeline": 2, "zero": 0}, 4),
    "tp2_pp2_sp": (4, {"tensor": 2, "pipeline": 2, "sequence": True, "zero": 1}, 2),
    "tp2_pp2_sp_recompute": (4, {"tensor": 2, "pipeline": 2, "sequence": True, "recompute": "full"}, 2),
    "tp4": (4, {"tensor": 4, "zero": 1}, 4),
}


def train_in_turn(configs: dict[str, RunConfig], folder: Path) -> dict[str, dict[str, Any]]:
    """On a rank: configurations of one layout, each with a folder of its own, trained and watched."""
    from megatron_mdm.parallel.groups import initialize

    context = initialize(next(iter(configs.values())).parallel)
    watch = {True: replay_and_watch, False: train_and_watch}
    return {name: watch[config.rl.is_used](config, folder / name, context) for name, config in configs.items()}


def train_and_watch(config: RunConfig, folder: Path, context: Any) -> dict[str, Any]:
    """10 steps; losses, gradient norms, t, per-sample losses, a hash of every sample and its masks, the calibration.
    Weights and moments go to the folder."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.checkpoint.tensors import Snapshot
    from megatron_mdm.training import build, inputs
    from megatron_mdm.training.calibrate import calibrate
    from megatron_mdm.training.source import SupervisedSource

    config, data = inputs.resolve(config)
    engine = restored_engine(None, config, context, 0)
    artifact = calibrate(engine, config, data, context) if config.diffusion.t_sampler == "ppots" else None
    trainer = build.build_trainer(config, data, engine, artifact, context)
    masks: dict[tuple[int, int], str] = {}
    noise = trainer.source.noise

    def watched(batch, step):
        noised = noise(batch, step)
        for row in range(len(batch.positions)):
            place = (step, int(batch.positions[row]))
            views = noised.masked.view(noised.views, len(batch.positions), -1)[:, row]
            length = int(batch.lengths[row])
            shown = [*views[:, :length], batch.tokens[row, :length]]
            masks[place] = hashlib.sha256(b"".join(part.numpy().tobytes() for part in shown)).hexdigest()
        return noised

    watched.times, watched.mask_probability = noise.times, noise.mask_probability  # type: ignore[attr-defined]
    source = SupervisedSource(context, trainer.source.loader, trainer.source.objective, watched)
    trainer = dataclasses.replace(trainer, source=source)
    steps = [trainer.train_step(step) for step in range(10)]
    snapshot = Snapshot(context)
    snapshot.take(trainer.engine.optimizer_state.fragments())
    snapshot.write(folder)
    return {
        "losses": [step.loss for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "sample_losses": np.stack([step.sample_loss for step in steps]),
        "t": np.stack([step.t for step in steps]),
        "masks": masks,
        "calibration": artifact,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_ids(folder / "train.jsonl", 40)
    write_images(folder / "images.jsonl", 24)
    (folder / "rl").mkdir()
    run_ranks(record_base, 1, folder / "rl")
    return folder


def config_of(folder: Path, parallel: dict[str, Any], micro_size: int, **model: Any) -> RunConfig:
    return small_config(
        folder,
        model=small_model(num_layers=4, num_kv_heads=4, **model).model_dump(),
        diffusion=METHOD,
        parallel=parallel,
        optimizer={"lr": 1e-3},
        batch={"global_size": 8, "micro_size": micro_size},
    )


def configs_of(folder: Path, parallel: dict[str, Any], micro_size: int) -> dict[str, RunConfig]:
    """All parameters; adapters of every matrix, with a rate at which their product soon counts; images and text, with
    captions dropped and the mean over the global batch's masked tokens; updates on recorded rollouts."""
    adapted = config_of(folder, parallel, micro_size, lora=LORA)
    without_calibration = adapted.diffusion.model_copy(update={"t_sampler": "uniform"})
    return {
        "full": config_of(folder, parallel, micro_size),
        "lora": adapted.model_copy(
            update={
                "diffusion": without_calibration,
                "optimizer": adapted.optimizer.model_copy(update={"lr": 1e-2}),
            }
        ),
        "images": image_config_of(folder, parallel, micro_size),
        "rl": replay_config(folder / "rl", parallel, micro_size),
    }


def image_config_of(folder: Path, parallel: dict[str, Any], micro_size: int) -> RunConfig:
    full = config_of(folder, parallel, micro_size)
    blend: dict[str, float] = {str(folder / "images.jsonl"): 1.0, str(folder / "train.jsonl"): 0.5}
    images = {"mask_schedule": "cosine", "masking": "rounded_count", "normalization": "unweighted_masked"}
    return full.model_copy(
        update={
            "objective": ObjectiveConfig(name="text_to_image"),
            "data": full.data.model_copy(update={"train": blend}),
            "diffusion": full.diffusion.model_copy(update=images),
            "image": ImageConfig(vocabulary=IMAGES, caption_dropout=0.3),
        }
    )


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, dict[str, Any]]:
    return run_ranks(train_in_turn, 1, configs_of(folder, {"zero": 0}, 8), folder / "reference")[0]


def assert_same_tensors(folder: Path, expected: Path, config: RunConfig) -> None:
    """Weights and moments, put together from any layout's shards, against one process's."""
    from safetensors.torch import load_file

    (whole,) = (load_file(path) for path in expected.glob("*.safetensors"))
    reader = TensorReader(folder, config.model)
    assert reader.places.keys() == whole.keys()
    for key, value in whole.items():
        name, kind = key.split("/")
        tensor = reader.read(name, kind, 0, 1)
        # Adam divides by the root of a second moment: a gradient near zero enlarges rounding differences, up to a part
        # of the rate. (A single step does so the most: see OPTIMIZER in tests/rl/layouts.py.)
        tolerance = 1e-2 * config.optimizer.lr if kind == "weight" else 1e-4 * float(value.abs().max())
        np.testing.assert_allclose(tensor.numpy(), value.numpy(), rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, folder: Path, reference: dict[str, dict[str, Any]]) -> None:
    num_ranks, parallel, micro_size = LAYOUTS[name]
    configs = configs_of(folder, parallel, micro_size)
    if name not in IMAGE_LAYOUTS:
        del configs["images"]
    results = run_ranks(train_in_turn, num_ranks, configs, folder / name)
    for kind, config in configs.items():
        equal = assert_equal_updates if config.rl.is_used else assert_equal_runs
        equal([result[kind] for result in results], reference[kind])
        assert_same_tensors(folder / name / kind, folder / "reference" / kind, config)


def test_an_update_has_the_gradient_of_the_whole_objective(folder: Path, reference: dict[str, dict[str, Any]]) -> None:
    """Two passes, in one process, against autograd through everything at once; of the other layouts, the first moment
    is the same, as test_layout_equals_one_process finds."""
    from safetensors.numpy import load_file

    config = replay_config(folder / "rl", {"zero": 0}, 8)
    (expected,) = run_ranks(gradient_by_autograd, 1, config)
    (moments,) = (load_file(path) for path in (folder / "reference/rl").glob("*.safetensors"))
    assert {key.split("/")[0] for key in moments} == expected.keys()
    for name, gradient in expected.items():
        found = moments[f"{name}/exp_avg"] / (1 - config.optimizer.betas[0])
        np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)
    whole = np.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in expected.values()))
    assert reference["rl"]["first_norm"] == pytest.approx(whole, rel=1e-5)


def assert_equal_updates(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Losses are sums that cancel: of their terms, which are about 1, they have 1e-5."""
    for result in results:
        for name in ("losses", "weighted_losses"):
            np.testing.assert_allclose(result[name], reference[name], rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(result["grad_norms"], reference["grad_norms"], rtol=1e-4)
        np.testing.assert_allclose(result["first_norm"], reference["first_norm"], rtol=1e-5)
        for name in ("sample_losses", "ratios", "kl", "old"):
            np.testing.assert_allclose(result[name], reference[name], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(result["t"], reference["t"])
        assert result["recompute_gap"] < 1e-6


TIED = {"tie_embeddings": True, "z_loss": 1e-2}


@pytest.fixture(scope="module")
def tied_reference(folder: Path) -> dict[str, Any]:
    config = config_of(folder, {"zero": 0}, 8, **TIED)
    return run_ranks(train_in_turn, 1, {"full": config}, folder / "tied_reference")[0]["full"]


@pytest.mark.parametrize("name", ["pp2_zero0", "tp2_pp2_sp", "dp2_zero3"])
def test_tied_embeddings_and_z_loss(name: str, folder: Path, tied_reference: dict[str, Any]) -> None:
    num_ranks, parallel, micro_size = LAYOUTS[name]
    config = config_of(folder, parallel, micro_size, **TIED)
    results = run_ranks(train_in_turn, num_ranks, {"full": config}, folder / f"tied_{name}")
    assert_equal_runs([result["full"] for result in results], tied_reference)
    assert_same_tensors(folder / f"tied_{name}/full", folder / "tied_reference/full", config)


def assert_equal_runs(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for result in results:
        np.testing.assert_allclose(result["losses"], reference["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["sample_losses"], reference["sample_losses"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(result["grad_norms"], reference["grad_norms"], rtol=1e-4)
        ours, theirs = (dict(flatten(run["calibration"] or {})) for run in (result, reference))
        assert ours.get("cell_density") == theirs.get("cell_density")
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds"}:
            if isinstance(ours[name], str):
                assert ours[name] == theirs[name], name
            else:  # powers of losses, and a bootstrap of rounded curves, enlarge the losses' last bits
                loose = {"moments": 1e-5, "rounds": 1e-4, "efficiency_interval": 1e-4}
                assert_close(ours[name], theirs[name], loose.get(name, 1e-6), name)
        np.testing.assert_array_equal(result["t"], reference["t"])
        assert all(reference["masks"][place] == mask for place, mask in result["masks"].items())
    seen = set().union(*(result["masks"].keys() for result in results))
    assert seen == reference["masks"].keys()


def assert_close(ours: Any, theirs: Any, tolerance: float, name: str) -> None:
    """Numbers, or nested lists and objects of them."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), name
        for key in ours:
            assert_close(ours[key], theirs[key], tolerance, name)
    elif isinstance(ours, list) and ours and isinstance(ours[0], dict):
        for pair in zip(ours, theirs, strict=True):
            assert_close(*pair, tolerance, name)
    else:
        # moments are of losses near 1, in fp32; some are differences of powers, which cancel where counts are exact
        cancelled = {"moments": 2.0**-24}
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=cancelled.get(name, 0), err_msg=name)


def test_training_lowers_the_losses(folder: Path, reference: dict[str, dict[str, Any]]) -> None:
    """Losses of the same samples, t and masks, compared with a run whose weights stay as they were."""
    still = {
        kind: config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 1e-12})})
        for kind, config in configs_of(folder, {"zero": 0}, 8).items()
        if not config.rl.is_used  # whose loss is no measure of it
    }
    untrained = run_ranks(train_in_turn, 1, still, folder / "untrained")[0]
    for kind, result in untrained.items():
        assert result["losses"][0] == reference[kind]["losses"][0]
        assert np.mean(reference[kind]["losses"][5:]) < np.mean(result["losses"][5:]) - 0.01, kind
