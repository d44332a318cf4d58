"""Folders with more in them than one checkpoint: what transformers reads is read, and the other files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.checkpoint.convert import ImportOptions, export_checkpoint, import_checkpoint
from megatron_mdm.checkpoint.huggingface import INDEX, SINGLE, HuggingFaceCheckpoint
from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from tests.checkpoint.huggingface_models import MASK, write_checkpoint
from tests.checkpoint.test_bad_checkpoints import change_json

EMBEDDING = "model.embed_tokens.weight"
ADAPTER = {"base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {
        "single": write_checkpoint(folder / "single", "llama", shard_size="1GB"),
        "sharded": write_checkpoint(folder / "sharded", "llama"),
    }


@pytest.fixture
def single(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["single"], tmp_path / "single"))


@pytest.fixture
def sharded(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["sharded"], tmp_path / "sharded"))


def files_read(folder: Path) -> set[str]:
    return {tensor.path.name for tensor in HuggingFaceCheckpoint.open(folder).tensors.values()}


def test_an_adapter_beside_the_weights_is_not_read(single: Path, sharded: Path) -> None:
    for folder in (single, sharded):
        before = files_read(folder)
        save_file(ADAPTER, folder / "adapter_model.safetensors")
        assert files_read(folder) == before
        (note,) = HuggingFaceCheckpoint.open(folder).notes
        assert note == f"{folder}: not read, as transformers would not: adapter_model.safetensors"
    (sharded / INDEX).unlink()
    assert files_read(sharded) == before


def test_the_single_file_goes_before_the_index(sharded: Path) -> None:
    """As in transformers, where both are there."""
    tensors = {name: tensor for path in sharded.glob("*.safetensors") for name, tensor in load_file(path).items()}
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    save_file(tensors, sharded / SINGLE)
    assert files_read(sharded) == {SINGLE}
    assert all(name in HuggingFaceCheckpoint.open(sharded).notes[0] for name in shards)


def test_files_outside_the_index_are_not_read(sharded: Path) -> None:
    save_file({EMBEDDING: torch.zeros(60, 32)}, sharded / "consolidated.safetensors")
    assert "consolidated.safetensors" not in files_read(sharded)
    (sharded / INDEX).unlink()
    assert "consolidated.safetensors" not in files_read(sharded)


def test_an_adapter_alone_is_named(single: Path) -> None:
    (single / SINGLE).unlink()
    save_file(ADAPTER, single / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: an adapter without its model; merge the two"):
        HuggingFaceCheckpoint.open(single)


def test_an_index_with_a_number_for_a_file_is_named(sharded: Path) -> None:
    places = json.loads((sharded / INDEX).read_text(encoding="utf-8"))["weight_map"]
    change_json(sharded / INDEX, weight_map={**places, EMBEDDING: 5})
    with pytest.raises(UserError, match="names the file '5'"):
        HuggingFaceCheckpoint.open(sharded)


def test_ignored_fields_go_with_the_run(single: Path, tmp_path: Path) -> None:
    """Import, start from it, export: what was ignored once need not be said again, and stays in config.json."""
    scaling = {"rope_type": "llama3", "factor": 8.0}
    change_json(single / "config.json", rope_scaling=scaling, unsloth_fixed=True)
    options = ImportOptions(1, 1, "auto", 10**9, {"mask": str(MASK)})
    with pytest.raises(UserError, match=r"'rope_scaling' of type \"llama3\" .*--ignore-fields rope_scaling"):
        import_checkpoint(single, tmp_path / "run", options)
    notes = import_checkpoint(
        single, tmp_path / "run", ImportOptions(1, 1, "auto", 10**9, {"mask": str(MASK)}, ("rope_scaling",))
    )
    assert f"{single}/config.json: 'rope_scaling' {json.dumps(scaling)} is ignored, as was asked for" in notes
    assert f"{single}/config.json: fields that training tools left are ignored: unsloth_fixed" in notes
    model = load_config(tmp_path / "run" / "config.yaml").model
    assert model.ignore_fields == ("rope_scaling",)
    exported = export_checkpoint(tmp_path / "run", tmp_path / "out", "auto", "auto", 10**9)
    assert exported["rope_scaling"] == scaling
    for start in (single, tmp_path / "out", tmp_path / "run"):
        initial = InitialWeights(model.model_copy(update={"init_from": str(start)}))
        ignored = "'rope_scaling'" in initial.describe(MASK)
        assert ignored == (start != tmp_path / "run")
