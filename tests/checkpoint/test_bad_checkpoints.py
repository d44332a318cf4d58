"""Checkpoints that are not whole, not what they say, or not safe: one clear line that names the tensor or the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mdm.checkpoint.convert import ImportOptions, import_checkpoint
from megatron_mdm.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.config.errors import UserError
from tests.checkpoint.huggingface_models import VOCAB, write_checkpoint
from tests.small import small_model

QUERY = "model.transformer.blocks.1.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("good") / "llada", "llada")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "llada"))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"][tensor]


def change_tensor(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = shard_of(folder, QUERY)
    tensors = load_file(path)
    tensors[QUERY] = change(tensors[QUERY]).contiguous()
    save_file(tensors, path)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def missing_shard(folder: Path) -> str:
    path = shard_of(folder, QUERY)
    path.unlink()
    return f"names the file '{path.name}'"


def missing_shard_without_index(folder: Path) -> str:
    (folder / INDEX).unlink()
    path = shard_names(folder)[1]
    path.unlink()
    return f"the file '{path.name}' is missing"


def truncated_file(folder: Path) -> str:
    path = shard_of(folder, QUERY)
    os.truncate(path, path.stat().st_size - 100)
    return f"{path}: the file is truncated"


def truncated_header(folder: Path) -> str:
    path = shard_of(folder, QUERY)
    os.truncate(path, 50)
    return f"{path}: the file is truncated"


def not_safetensors(folder: Path) -> str:
    path = shard_of(folder, QUERY)
    path.write_bytes(b"PK\x03\x04" * 1000)
    return f"{path}: not a safetensors file"


def wrong_shape(folder: Path) -> str:
    change_tensor(folder, lambda tensor: tensor[:-1])
    return f"'{QUERY}' has shape [31, 32]; by config.json it would be [32, 32]"


def nan_tensor(folder: Path) -> str:
    change_tensor(folder, lambda tensor: tensor.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(torch.nan)))
    return f"'{QUERY}' holds values that are infinite or not numbers"


def infinite_tensor(folder: Path) -> str:
    change_tensor(folder, lambda tensor: tensor.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(-torch.inf)))
    return f"'{QUERY}' holds values that are infinite or not numbers"


def unsupported_type(folder: Path) -> str:
    change_tensor(folder, lambda tensor: tensor.to(torch.int8))
    return f"'{QUERY}' has the unsupported type I8"


def index_names_an_absent_file(folder: Path) -> str:
    places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    change_json(folder / INDEX, weight_map={**places, QUERY: "model-00099-of-00099.safetensors"})
    return f"names the file 'model-00099-of-00099.safetensors' (for '{QUERY}'), which is absent"


def index_leaves_the_folder(folder: Path) -> str:
    places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    path = shard_of(folder, QUERY)
    shutil.copyfile(path, folder.parent / path.name)
    change_json(folder / INDEX, weight_map={**places, QUERY: f"../{path.name}"})
    return f"names the file '../{path.name}' (for '{QUERY}'), which is absent"


def index_places_a_tensor_wrongly(folder: Path) -> str:
    places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    other = next(file for file in places.values() if file != places[QUERY])
    change_json(folder / INDEX, weight_map={**places, QUERY: other})
    return f"does not hold '{QUERY}'"


def missing_tensor(folder: Path) -> str:
    places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    del places[QUERY]
    change_json(folder / INDEX, weight_map=places)
    return f"no file holds the tensor '{QUERY}'"


def unknown_tensor(folder: Path) -> str:
    save_file({"model.transformer.blocks.0.q_proj.bias": torch.zeros(32)}, folder / "extra.safetensors")
    places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    places["model.transformer.blocks.0.q_proj.bias"] = "extra.safetensors"
    change_json(folder / INDEX, weight_map=places)
    return "'model.transformer.blocks.0.q_proj.bias' has no place in a LLaDAModelLM"


def tokenizer_of_another_model(folder: Path) -> str:
    write_tokenizer(folder, VOCAB + 5)
    return f"tokenizer.json: has ids up to {VOCAB + 4}, but the embedding table has {VOCAB} rows"


def pickles_only(folder: Path) -> str:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    return "pytorch_model.bin: pickled weights are not read"


def no_weights(folder: Path) -> str:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    return "holds no safetensors files"


def biases(folder: Path) -> str:
    change_json(folder / "config.json", include_bias=True)
    return "'include_bias' true is not supported"


def alibi(folder: Path) -> str:
    change_json(folder / "config.json", alibi=True)
    return "'alibi' true is not supported"


def block_type(folder: Path) -> str:
    change_json(folder / "config.json", block_type="sequential")
    return '\'block_type\' "sequential" is not supported, only "llama"'


def unknown_field(folder: Path) -> str:
    change_json(folder / "config.json", quantization_config={"bits": 4})
    return "the field 'quantization_config'"


def missing_field(folder: Path) -> str:
    change_json(folder / "config.json", n_heads=None)
    return "the field 'n_heads' is missing"


def field_of_a_wrong_type(folder: Path) -> str:
    change_json(folder / "config.json", n_layers="many")
    return "'n_layers': "


def unknown_architecture(folder: Path) -> str:
    change_json(folder / "config.json", architectures=["MambaForCausalLM"])
    return "'architectures' ['MambaForCausalLM'] is not supported, only LLaDAModelLM"


def broken_json(folder: Path) -> str:
    (folder / "config.json").write_text("{", encoding="utf-8")
    return "config.json: not readable as JSON"


def shard_names(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def write_tokenizer(folder: Path, num_ids: int) -> None:
    import tokenizers

    model = tokenizers.models.WordLevel({f"word{i}": i for i in range(num_ids)}, unk_token="word0")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))


FAULTS = [
    *(missing_shard, missing_shard_without_index, truncated_file, truncated_header, not_safetensors, wrong_shape),
    *(nan_tensor, infinite_tensor, unsupported_type, index_names_an_absent_file, index_places_a_tensor_wrongly),
    index_leaves_the_folder,
    *(missing_tensor, unknown_tensor, tokenizer_of_another_model, pickles_only, no_weights, biases, alibi, block_type),
    *(unknown_field, missing_field, field_of_a_wrong_type, unknown_architecture, broken_json),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_named(fault: Callable[[Path], str], folder: Path, tmp_path: Path) -> None:
    expected = fault(folder)
    with pytest.raises(UserError) as error:
        import_checkpoint(folder, tmp_path / "run", ImportOptions(1, 1, "auto", 10**9, {}))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


CAUSAL_FIELDS: dict[str, dict[str, Any]] = {
    "'rope_parameters' of type \"llama3\"": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
    "'rope_scaling' of type \"linear\"": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "'use_sliding_window' true": {"use_sliding_window": True},
    "'layer_types' has \"sliding_attention\"": {"layer_types": ["full_attention", "sliding_attention"]},
    "'hidden_act' \"gelu\"": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("expected", CAUSAL_FIELDS)
def test_field_of_causal_families_is_named(expected: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "qwen2", "qwen2")
    change_json(folder / "config.json", **CAUSAL_FIELDS[expected])
    with pytest.raises(UserError) as error:
        import_checkpoint(folder, tmp_path / "run", ImportOptions(1, 1, "auto", 10**9, {}))
    assert expected in str(error.value)


def test_a_head_that_is_tied_in_words_only_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tied", "llama_tied", shard_size="1GB")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, path)
    HuggingFaceCheckpoint.open(folder)
    head[0, 0] += 1.0
    save_file({**tensors, "lm_head.weight": head}, path)
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        HuggingFaceCheckpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_theta": 1e4}, "'model.rope_theta' is 10000.0, but 5000.0 by"),
        ({"num_layers": 2}, "'model.num_layers' is 2, but 3 by"),
        ({"vocab_size": 40}, "'model.vocab_size' is 40, but 60 by"),
        ({"qk_norm": True}, "'model.qk_norm' is True, but False by"),
        ({"init_from": "no/such/folder"}, "no such folder"),
    ],
)
def test_architecture_that_differs_is_named(changes: dict[str, Any], expected: str, good: Path) -> None:
    described = {"num_layers": 3, "ffn_hidden_size": 48, "vocab_size": 60, "rope_theta": 5000.0, "init_from": str(good)}
    with pytest.raises(UserError) as error:
        InitialWeights(small_model(**{**described, **changes}))
    assert expected in str(error.value)
