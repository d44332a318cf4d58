"""What a model family is: its config.json ↔ our model section, and the names of its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig
from megatron_mdm.models.families.foreign_fields import BOOKKEEPING, INERT, is_left_by_tools

Json = dict[str, Any]

# Fields of our model section by which the weights are read. The others are a run's own choice.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "ffn_hidden_size",
    "head_dim",
    "vocab_size",
    "max_sequence_length",
    "rope_theta",
    "norm_eps",
    "tie_embeddings",
    "qkv_bias",
    "qk_norm",
    "logit_shift",
)


@dataclass(frozen=True)
class Keys:
    """Names of a family's tensors. Those of a layer are prefixed by `layer` with its number; linear maps and norms of
    heads are given without `.weight` (and `.bias`)."""

    embedding: str
    final_norm: str
    head: str
    layer: str
    input_norm: str
    mlp_norm: str
    query: str
    key: str
    value: str
    output: str
    gate: str
    up: str
    down: str
    query_norm: str = ""
    key_norm: str = ""


@dataclass(frozen=True)
class Family:
    """One family. fields, fixed and silent together hold every field of config.json that is accepted."""

    name: str
    architecture: str  # config.json's `architectures` names it
    model_type: str
    keys: Keys
    fields: Mapping[str, str]  # ours → theirs
    fixed: Mapping[str, tuple[Any, ...]]  # theirs → the values that are supported, first the one that is written
    silent: frozenset[str] = frozenset()  # theirs, without influence on what the weights compute
    defaults: Mapping[str, Any] = field(default_factory=dict)  # theirs → what their absence means
    implies: Mapping[str, Any] = field(default_factory=dict)  # ours → what belongs to the family
    peft_task: str = "CAUSAL_LM"  # the peft library's task_type; empty: none that its models could do
    mask_id: int = -1  # where config.json has no mask_token_id; −1: the family has no mask token

    def read(self, config: Json, where: str, ignored: Sequence[str] = ()) -> Json:
        """Values of our model section. A field that is null says as little as one that is absent.

        ignored: fields to read as if they were absent, whatever they may mean. Raises UserError naming a field that is
        missing, unknown or unsupported, or no number where one is needed.
        """
        flat = self.flatten(self.without(config, ignored), where)
        known = BOOKKEEPING | self.silent | set(self.fields.values())
        supported = {**INERT, **self.fixed}
        for name, value in flat.items():
            if name in known or (name in supported and value in supported[name]) or is_left_by_tools(name):
                continue
            if name in supported:
                choices = " or ".join(json_text(choice) for choice in supported[name] if choice is not None)
                raise UserError(
                    f"{where}: '{name}' {json_text(value)} is not supported, only {choices}{way_round(name)}"
                )
            raise UserError(
                f"{where}: the field '{name}' = {json_text(value)} is unknown for {self.architecture}; the "
                f"checkpoint is refused, since it may compute something else{way_round(name)}"
            )
        values = dict(self.implies)
        for ours, theirs in self.fields.items():
            values[ours] = flat.get(theirs, self.defaults.get(theirs))
            if values[ours] is None:
                raise UserError(f"{where}: the field '{theirs}' is missing")
            if ours != "tie_embeddings":
                check_number(theirs, values[ours], where)
        if values.get("head_dim", 0) * values["num_heads"] == values["hidden_size"]:
            values["head_dim"] = 0
        return values

    def notes(self, config: Json, where: str, ignored: Sequence[str] = ()) -> list[str]:
        """What `read` accepts without knowing it, a line each. Raises UserError where an ignored field is not there."""
        absent = [name for name in ignored if name not in config]
        if absent:
            raise UserError(f"{where}: has no field '{absent[0]}' to ignore")
        told = [f"{where}: '{name}' {json_text(config[name])} is ignored, as was asked for" for name in ignored]
        known = self.silent | self.fixed.keys() | set(self.fields.values())
        left = [name for name in self.without(config, ignored) if is_left_by_tools(name) and name not in known]
        return told + ([f"{where}: fields that training tools left are ignored: {', '.join(left)}"] if left else [])

    def write(self, model: ModelConfig, base: Json) -> Json:
        """config.json of a model. base: the one it came from, of which only what differs is changed; {}: none.

        Raises UserError where the family cannot hold the model.
        """
        for ours in ARCHITECTURE:
            own = self.implies.get(ours, ModelConfig.model_fields[ours].default)
            if ours not in self.fields and getattr(model, ours) != own:
                raise UserError(f"'model.{ours}' {getattr(model, ours)} cannot be written as {self.architecture}")
        wanted = {ours: getattr(model, ours) for ours in self.fields}
        if base:
            before = self.read(base, "config.json", model.ignore_fields)
            changes = {self.fields[ours]: value for ours, value in wanted.items() if before[ours] != value}
            return self.unflatten(base, changes)
        if "head_dim" in wanted:
            wanted["head_dim"] = model.kv_channels
        fresh = {"architectures": [self.architecture], "model_type": self.model_type}
        fresh |= {name: values[0] for name, values in self.fixed.items()}
        return self.unflatten(fresh, {self.fields[ours]: value for ours, value in wanted.items()})

    def without(self, config: Json, ignored: Sequence[str]) -> Json:
        """config.json without nulls and without the fields that are to be ignored."""
        return {name: value for name, value in config.items() if value is not None and name not in ignored}

    def flatten(self, config: Json, where: str) -> Json:
        """config.json, without nulls, with what is nested or spelt in several ways brought to the names in `fields`."""
        return dict(config)

    def unflatten(self, base: Json, changes: Json) -> Json:
        """The reverse, for changed values by the names in `fields`."""
        return {**base, **changes}


def check_number(name: str, value: Any, where: str) -> None:
    """Raise UserError where a field's value is no number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{where}: '{name}': expected a number, got {json_text(value)}")


def way_round(name: str) -> str:
    """What a refusal of a field ends with."""
    return f" (to read it without that field: --ignore-fields {name}, or 'model.ignore_fields' [{name}])"


def json_text(value: Any) -> str:
    """A value as config.json spells it."""
    return json.dumps(value)
