"""PEFT folders that are not whole, not what they say, or not what we compute: one clear line each."""

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

from megatron_mdm.checkpoint.chosen_adapters import first_adapters
from megatron_mdm.checkpoint.initial import InitialWeights
from megatron_mdm.checkpoint.lazy_tensors import read
from megatron_mdm.checkpoint.peft import ADAPTER_FILE, PREFIX, PeftAdapter
from megatron_mdm.checkpoint.peft_config import ADAPTER_CONFIG
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import LoraConfig, ModelConfig
from megatron_mdm.models.families import FAMILIES
from megatron_mdm.models.families.keymap import matrices
from tests.small import VOCAB, small_model

MODEL = small_model()
LLADA = FAMILIES["llada"]
A = f"{PREFIX}model.transformer.blocks.1.q_proj.lora_A.weight"
B = f"{PREFIX}model.transformer.blocks.1.v_proj.lora_B.weight"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct",
    "peft_version": "0.21.2",
    "a_later_field": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG), encoding="utf-8")
    tensors = {}
    for weight, (target, _) in matrices(LLADA, MODEL).items():
        if target in ("query", "value"):
            outputs = 32 if target == "query" else 16
            module = PREFIX + weight.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, 32)
            tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, 2)
    save_file(tensors, folder / ADAPTER_FILE)
    return folder


def settings(expected: str, **changes: Any) -> Callable[[Path], str]:
    """A fault of adapter_config.json."""

    def fault(folder: Path) -> str:
        (folder / ADAPTER_CONFIG).write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
        return expected

    return fault


def tensors(expected: str, **changes: torch.Tensor | None) -> Callable[[Path], str]:
    """A fault of the tensors; a name that is given nothing is left out."""

    def fault(folder: Path) -> str:
        path = folder / ADAPTER_FILE
        changed = {**load_file(path), **changes}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
        return expected

    return fault


def no_json(folder: Path) -> str:
    (folder / ADAPTER_CONFIG).write_text("{", encoding="utf-8")
    return "not readable as JSON"


def pickled(folder: Path) -> str:
    (folder / ADAPTER_FILE).rename(folder / "adapter_model.bin")
    return r"adapter_model.bin: pickled weights are not read, since that can run code; save the adapter again"


def no_file(folder: Path) -> str:
    (folder / ADAPTER_FILE).unlink()
    return f"holds no {ADAPTER_FILE}"


def truncated(folder: Path) -> str:
    path = folder / ADAPTER_FILE
    os.truncate(path, path.stat().st_size - 8)
    return f"{path}: the file is truncated"


def empty(folder: Path) -> str:
    save_file({}, folder / ADAPTER_FILE)
    return "holds no tensors"


FAULTS: dict[str, Callable[[Path], str]] = {
    "no json": no_json,
    "pickled": pickled,
    "no file": no_file,
    "truncated": truncated,
    "empty": empty,
    "no type": settings("the field 'peft_type' is missing", peft_type=None),
    "another method": settings('\'peft_type\' "IA3" is not supported, only "LORA"', peft_type="IA3"),
    "no rank": settings("the field 'r' is missing", r=None),
    "rank": settings("'r': expected a positive whole number, got 2.5", r=2.5),
    "alpha": settings("'lora_alpha': expected a positive number, got \"big\"", lora_alpha="big"),
    "dropout": settings("'lora_dropout' 1.5 is not supported", lora_dropout=1.5),
    "biases": settings('\'bias\' "all" is not supported, only "none"', bias="all"),
    "whole modules": settings("'modules_to_save' [\"lm_head\"] is not supported", modules_to_save=["lm_head"]),
    "dora": settings("'use_dora' true is not supported, only its being empty or false", use_dora=True),
    "ranks": settings("'rank_pattern' {\"q_proj\": 8} is not supported", rank_pattern={"q_proj": 8}),
    "alphas": settings("'alpha_pattern' {\"q_proj\": 8} is not supported", alpha_pattern={"q_proj": 8}),
    "layers": settings("'layers_to_transform' leaves out layer 0 of 2", layers_to_transform=[1]),
    "transposed": settings("'fan_in_fan_out' true is not supported", fan_in_fan_out=True),
    "bias of B": settings("'lora_bias' true is not supported", lora_bias=True),
    "pissa": settings("'init_lora_weights' \"pissa\" is not supported, only true or", init_lora_weights="pissa"),
    "loftq": settings("'loftq_config' {\"loftq_bits\": 4} is not supported", loftq_config={"loftq_bits": 4}),
    "parameters": settings("'target_parameters' [\"x\"] is not supported", target_parameters=["x"]),
    "tokens": settings("'trainable_token_indices' [5] is not supported", trainable_token_indices=[5]),
    "unknown": settings("the field 'twist' = 0.5 is unknown; the adapter is refused", twist=0.5),
    "modules": settings("'target_modules': expected a list of names or a regular expression", target_modules=3),
    "expression": settings("'target_modules' \"(\" is no regular expression", target_modules="("),
    "another module named": settings(
        "does not hold 'base_model.model.model.transformer.blocks.0.k_proj.lora_A.weight', but 'target_modules' in "
        "adapter_config.json names the module 'model.transformer.blocks.0.k_proj'",
        target_modules=["q_proj", "k_proj", "v_proj"],
    ),
    "a module not named": settings(
        "holds 'base_model.model.model.transformer.blocks.0.v_proj.lora_A.weight', but 'target_modules' in "
        "adapter_config.json does not name the module",
        target_modules=["q_proj"],
    ),
    "excluded": settings("does not name the module", exclude_modules=["v_proj"]),
    "one of a pair": tensors(f"lacks '{B}'; only adapters of all layers, with A and B, are supported", **{B: None}),
    "shape": tensors(f"'{A}' has shape [2, 31]; by adapter_config.json and the model it", **{A: torch.zeros(2, 31)}),
    "another rank": tensors(f"'{A}' has shape [3, 32]", **{A: torch.zeros(3, 32)}),
    "type": tensors(f"'{A}' has the unsupported type I8", **{A: torch.zeros(2, 32, dtype=torch.int8)}),
    "magnitudes": tensors(
        "lora_magnitude_vector' is neither A nor B of an adapter of a LLaDAModelLM of 2 layers",
        **{A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(32)},
    ),
    "a layer too many": tensors("is neither A nor B", **{A.replace("blocks.1", "blocks.2"): torch.zeros(2, 32)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(fault: str, folder: Path) -> None:
    PeftAdapter.open(folder, MODEL, LLADA)
    expected = FAULTS[fault](folder)
    with pytest.raises(UserError) as raised:
        PeftAdapter.open(folder, MODEL, LLADA)
    assert expected in str(raised.value)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_not_a_number_is_named_where_it_is_read(folder: Path) -> None:
    tensors("", **{A: torch.full((2, 32), torch.nan)})(folder)
    weights = PeftAdapter.open(folder, MODEL, LLADA).weights
    bad = next(name for name in weights.tensors if "layers.1" in name and name.endswith("query_A"))
    with pytest.raises(UserError, match=r"'.*blocks\.1\.q_proj\.lora_A\.weight' holds values that are infinite or not"):
        read(weights.tensors[bad])


def test_names_of_another_family_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter of a LlamaForCausalLM, but 'base_model"):
        PeftAdapter.open(folder, MODEL, FAMILIES["llama"])
    assert PeftAdapter.open(folder, MODEL).weights.lora == LoraConfig(rank=2, alpha=4, targets=("query", "value"))


def with_tables(folder: Path, **changes: torch.Tensor) -> Path:
    """The folder, with adapters of both tables; changes: of their tensors."""
    settings("", target_modules=["q_proj", "v_proj", "wte", "transformer.ff_out"])(folder)
    added = {
        "ff_out.lora_A.weight": torch.zeros(2, 32),
        "ff_out.lora_B.weight": torch.zeros(VOCAB, 2),
        "wte.lora_embedding_A": torch.zeros(2, VOCAB),
        "wte.lora_embedding_B": torch.zeros(32, 2),
        **changes,
    }
    tensors("", **{f"{PREFIX}model.transformer.{name}": tensor for name, tensor in added.items()})(folder)
    return folder


def test_an_adapter_of_tied_tables_is_refused(folder: Path) -> None:
    assert {"head", "embedding"} < set(PeftAdapter.open(with_tables(folder), MODEL).weights.lora.targets)
    with pytest.raises(UserError, match="the embedding or the head, which are one table in this model"):
        PeftAdapter.open(folder, small_model(tie_embeddings=True))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("ff_out.lora_A.weight", (2, 31), [2, 32]),
        ("ff_out.lora_B.weight", (VOCAB + 1, 2), [VOCAB, 2]),
        ("ff_out.lora_B.weight", (VOCAB, 1), [VOCAB, 2]),
        ("wte.lora_embedding_A", (2, VOCAB + 1), [2, VOCAB]),
        ("wte.lora_embedding_A", (2 * VOCAB,), [2, VOCAB]),
        ("wte.lora_embedding_B", (31, 2), [32, 2]),
    ],
)
def test_shapes_of_tables_adapters_are_named(
    name: str, shape: tuple[int, ...], expected: list[int], folder: Path
) -> None:
    """Fewer tokens would do."""
    with_tables(folder, **{name: torch.zeros(shape)})
    with pytest.raises(UserError) as raised:
        PeftAdapter.open(folder, MODEL, LLADA)
    assert f"{name}' has shape {list(shape)}" in str(raised.value)
    assert str(raised.value).endswith(f"it would be {expected}")


def test_how_it_was_made_is_told_and_does_not_matter(folder: Path) -> None:
    settings("", eva_config={"rho": 2.0}, init_lora_weights="eva", corda_config={"x": 1})(folder)
    (note,) = PeftAdapter.open(folder, MODEL).notes
    assert note == f"{folder / ADAPTER_CONFIG}: fields about how it was made are ignored: eva_config, corda_config"


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"rank": 4}, "'model.lora.rank' is 4, but 2 by "),
        ({"alpha": 8.0}, "'model.lora.alpha' is 8.0, but 4.0 by "),
        ({"rslora": True}, "'model.lora.rslora' is True, but False by "),
        ({"targets": ["q_proj"]}, "'model.lora.targets' are query, but query, value by "),
    ],
)
def test_first_adapters_of_other_settings_are_named(lora: dict[str, Any], expected: str, folder: Path) -> None:
    section = {"rank": 2, "alpha": 4.0, "targets": ["query", "value"], "init_from": str(folder)}
    assert first_adapters(with_lora(section), None, {}).weights.lora.rank == 2
    with pytest.raises(UserError, match=expected):
        first_adapters(with_lora({**section, **lora}), None, {})


def test_an_adapter_is_no_model(folder: Path) -> None:
    with pytest.raises(UserError, match=r"an adapter, without the model beside it; train it further by 'model\.lora"):
        InitialWeights(MODEL.model_copy(update={"init_from": str(folder)}))
    (folder / ADAPTER_CONFIG).unlink()
    with pytest.raises(UserError, match=r"neither an adapter of PEFT's \(adapter_config\.json\) nor a run with"):
        first_adapters(with_lora({"rank": 2, "init_from": str(folder)}), None, {})
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such folder of an adapter"):
        first_adapters(with_lora({"rank": 2, "init_from": str(folder)}), None, {})


def with_lora(section: dict[str, Any]) -> ModelConfig:
    return small_model(lora=section)
