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
from megatron_mdm.checkpoint.native import NativeCheckpoint
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import load_config
from megatron_mdm.data.conversation import Message
from megatron_mdm.data.tokenizer import load_tokenizer
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


def dream_without_tokenizer_json(folder: Path) -> Path:
    """As Dream's own folder: vocab.json, merges.txt, and a class that is remote code."""
    write_checkpoint(folder, "dream", shard_size="1GB")
    pieces = ["Ġ", "Ċ", "?", *"abcdefghijklmnopqrstuvwxyz", "ab", "Ġab"]
    (folder / "vocab.json").write_text(json.dumps({piece: place for place, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n", encoding="utf-8")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    names = {"50": "<|endoftext|>", "51": "<|im_start|>", "52": "<|im_end|>", str(MASK): "<|mask|>"}
    added = {token: {"content": text, "special": True, **flags} for token, text in names.items()}
    settings = {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": added, "mask_token": "<|mask|>"}
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    change_json(folder / "config.json", eos_token_id=50, pad_token_id=50)
    return folder


def test_a_dream_checkpoint_without_tokenizer_json_can_be_prompted(tmp_path: Path) -> None:
    folder = dream_without_tokenizer_json(tmp_path / "dream")
    notes = import_checkpoint(folder, tmp_path / "run", ImportOptions(1, 1, "auto", 10**9, {}))
    data = load_config(tmp_path / "run" / "config.yaml").data
    assert Path(data.tokenizer) == tmp_path / "run" / "huggingface" / "vocab.json"
    assert (data.mask_token, data.eos_token, data.template) == (MASK, 50, "tokenizer")
    assert "template tokenizer: the folder's chat template" in notes
    tokenizer = load_tokenizer(data)
    ids = [token for part in tokenizer.ids_of(tokenizer.prompt_of([Message("user", "cab ab?")])) for token in part]
    assert tokenizer.backend.decode(ids) == "user\ncab ab?\nassistant\n"
    assert [ids[0], ids.count(51), ids.count(52)] == [51, 2, 1]
    export_checkpoint(NativeCheckpoint.open(tmp_path / "run"), tmp_path / "out", "auto", "auto", 10**9)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() or name == "config.json"


def test_a_tokenizer_of_an_unknown_class_is_told_and_left(tmp_path: Path) -> None:
    folder = dream_without_tokenizer_json(tmp_path / "dream")
    change_json(folder / "tokenizer_config.json", tokenizer_class="OtherTokenizer")
    notes = import_checkpoint(folder, tmp_path / "run", ImportOptions(1, 1, "auto", 10**9, {}))
    assert any("no tokenizer: " in note and "'OtherTokenizer'" in note for note in notes)
    data = load_config(tmp_path / "run" / "config.yaml").data
    assert (data.tokenizer, data.mask_token, data.template) == ("", MASK, "plain")
    with pytest.raises(UserError, match=r"'data\.tokenizer' is empty, so no text can be encoded; set 'data.tokenizer'"):
        load_tokenizer(data).encode("a")


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
    exported = export_checkpoint(NativeCheckpoint.open(tmp_path / "run"), tmp_path / "out", "auto", "auto", 10**9)
    assert exported["rope_scaling"] == scaling
    for start in (single, tmp_path / "out", tmp_path / "run"):
        initial = InitialWeights(model.model_copy(update={"init_from": str(start)}))
        ignored = "'rope_scaling'" in initial.describe(MASK)
        assert ignored == (start != tmp_path / "run")
