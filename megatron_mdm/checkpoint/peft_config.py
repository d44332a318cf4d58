"""adapter_config.json of the peft library: what it says of an adapter, and one that a run's adapter is written with.

A field decides what an adapter computes, or only how it was made; a field that no one here has looked at may do either,
so only its being empty is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megatron_mdm.checkpoint.huggingface import read_json
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import LoraConfig
from megatron_mdm.models.families.family import Json, json_text

ADAPTER_CONFIG = "adapter_config.json"
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")
# Values besides empty ones with which an adapter is what we compute.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others change the weights beside the adapter (pissa, olora, corda, loftq, lora_ga) or what it computes (mica).
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": (),
    "alpha_pattern": (),
    "arrow_config": (),
    "fan_in_fan_out": (),
    "kasa_config": (),
    "layer_replication": (),
    "loftq_config": (),
    "lora_bias": (),
    "megatron_config": (),
    "modules_to_save": (),
    "monteclora_config": (),
    "rank_pattern": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "use_bdlora": (),
    "use_dora": (),
    "use_qalora": (),
    "velora_config": (),
}
_READ = frozenset(
    ["r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform"]
)
_BOOKKEEPING = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "layers_pattern",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "task_type",
    ]
)
# How adapters were made, or run: no part of what these compute. Each is named in a line.
_HOW_IT_WAS_MADE = frozenset(["corda_config", "ensure_weight_tying", "eva_config", "lora_ga_config", "runtime_config"])
Matches = Callable[[str], bool]


class PeftSettings(NamedTuple):
    lora: LoraConfig  # targets left open: the tensors say which there are
    base: str  # the model that it was trained on, by its name or folder; empty: not told
    # Whether PEFT would put an adapter beside the module of this name, by target_modules; None: it does not say.
    matches: Matches | None
    notes: tuple[str, ...]


def read_settings(folder: Path, num_layers: int) -> PeftSettings:
    """Raises UserError naming a field that is missing or of a wrong type, or by which the adapter is not W + s · B·A
    beside linear maps of all layers."""
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if config.get("peft_type") is None:
        raise UserError(f"{path}: the field 'peft_type' is missing")
    for name, value in config.items():
        _check(path, name, value)
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, float | int) or not 0 <= dropout < 1:
        raise UserError(f"{path}: 'lora_dropout' {json_text(dropout)} is not supported, only 0 up to, not including, 1")
    _check_layers(path, config.get("layers_to_transform"), num_layers)
    ignored = [name for name, value in config.items() if name in _HOW_IT_WAS_MADE and value not in _EMPTY]
    notes = (f"{path}: fields about how it was made are ignored: {', '.join(ignored)}",) if ignored else ()
    lora = LoraConfig(
        rank=_number(path, config, "r", is_whole=True),
        alpha=_number(path, config, "lora_alpha", is_whole=False),
        dropout=dropout,
        rslora=bool(config.get("use_rslora")),
    )
    return PeftSettings(lora, str(config.get("base_model_name_or_path") or ""), _matches(path, config), notes)


def settings_to_write(lora: LoraConfig, base: str, target_modules: Iterable[str], task: str) -> Json:
    """adapter_config.json of a run's adapter. task: of PEFT's, or empty."""
    return {
        "peft_type": "LORA",
        "task_type": task or None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _check(path: Path, name: str, value: Any) -> None:
    """Raise UserError where a field may change what the adapter computes."""
    if name in _READ or name in _BOOKKEEPING or name in _HOW_IT_WAS_MADE or value in _EMPTY:
        return
    if name not in _SUPPORTED:
        raise UserError(
            f"{path}: the field '{name}' = {json_text(value)} is unknown; the adapter is refused, since it may compute "
            "something else (take the field out to read it without)"
        )
    if value not in _SUPPORTED[name]:
        choices = " or ".join(map(json_text, _SUPPORTED[name])) or "its being empty or false"
        raise UserError(f"{path}: '{name}' {json_text(value)} is not supported, only {choices}")


def _number(path: Path, config: Json, name: str, is_whole: bool) -> Any:
    value = config.get(name)
    if value is None:
        raise UserError(f"{path}: the field '{name}' is missing")
    is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
    if not is_number or value <= 0:
        what = "a positive whole number" if is_whole else "a positive number"
        raise UserError(f"{path}: '{name}': expected {what}, got {json_text(value)}")
    return value


def _check_layers(path: Path, layers: Any, num_layers: int) -> None:
    if layers in _EMPTY and layers is not False:
        return
    numbers: list[Any] = layers if isinstance(layers, list) else [layers]
    left_out = [number for number in range(num_layers) if number not in numbers]
    if left_out:
        raise UserError(
            f"{path}: 'layers_to_transform' leaves out layer {left_out[0]} of {num_layers}; only adapters of all "
            "layers are supported"
        )


def _matches(path: Path, config: Json) -> Matches | None:
    wanted = _pattern(path, config, "target_modules")
    excluded = _pattern(path, config, "exclude_modules")
    layers_only = config.get("layers_to_transform") not in _EMPTY  # which no module outside of them fits
    if wanted is None:
        return None

    def matches(module: str) -> bool:
        if excluded and excluded(module):
            return False
        return wanted(module) and (not layers_only or re.search(r"\.\d+\.", module) is not None)

    return matches


def _pattern(path: Path, config: Json, name: str) -> Matches | None:
    """By PEFT's rules: a string is a regular expression of whole names, or all-linear, a list names them by their
    ends."""
    value = config.get(name)
    if value in _EMPTY:
        return None
    if value == "all-linear":
        return lambda module: re.search(r"\.\d+\.", module) is not None
    if isinstance(value, str):
        try:
            expression = re.compile(value)
        except re.error as error:
            raise UserError(f"{path}: '{name}' {json_text(value)} is no regular expression ({error})") from None
        return lambda module: expression.fullmatch(module) is not None
    if not isinstance(value, list) or not all(isinstance(end, str) for end in value):
        raise UserError(f"{path}: '{name}': expected a list of names or a regular expression, got {json_text(value)}")
    return lambda module: any(module == end or module.endswith(f".{end}") for end in value)
