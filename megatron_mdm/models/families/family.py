"""What a model family is: its config.json ↔ our model section, and the names of its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import ModelConfig

Json = dict[str, Any]

# Fields of config.json that say nothing about the function the weights compute.
BOOKKEEPING = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "mask_token_id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
# Fields of our model section by which the weights are read. The others are a run's own choice.
ARCHITECTURE = (
    *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "head_dim", "vocab_size"),
    *("max_sequence_length", "rope_theta", "norm_eps", "tie_embeddings", "qkv_bias", "qk_norm", "logit_shift"),
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
    mask_id: int = -1  # where config.json has no mask_token_id; −1: the family has no mask token

    def read(self, config: Json, where: str) -> Json:
        """Values of our model section. Raises UserError naming a field that is missing, unknown or unsupported."""
        flat = self.flatten(config, where)
        known = BOOKKEEPING | self.silent | self.fixed.keys() | set(self.fields.values())
        for name, value in flat.items():
            if name in self.fixed and value not in self.fixed[name]:
                supported = " or ".join(json_text(choice) for choice in self.fixed[name])
                raise UserError(f"{where}: '{name}' {json_text(value)} is not supported, only {supported}")
            if name not in known:
                raise UserError(
                    f"{where}: the field '{name}' = {json_text(value)} is unknown for {self.architecture}; the "
                    "checkpoint is refused, since it may compute something else"
                )
        values = dict(self.implies)
        for ours, theirs in self.fields.items():
            value = flat.get(theirs)
            values[ours] = self.defaults.get(theirs) if value is None else value
            if values[ours] is None:
                raise UserError(f"{where}: the field '{theirs}' is missing")
        if values.get("head_dim", 0) * values["num_heads"] == values["hidden_size"]:
            values["head_dim"] = 0
        return values

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
            before = self.read(base, "config.json")
            changes = {self.fields[ours]: value for ours, value in wanted.items() if before[ours] != value}
            return self.unflatten(base, changes)
        if "head_dim" in wanted:
            wanted["head_dim"] = model.kv_channels
        fresh = {"architectures": [self.architecture], "model_type": self.model_type}
        fresh |= {name: values[0] for name, values in self.fixed.items()}
        return self.unflatten(fresh, {self.fields[ours]: value for ours, value in wanted.items()})

    def flatten(self, config: Json, where: str) -> Json:
        """config.json with what is nested or spelt in several ways brought to the names in `fields`."""
        return dict(config)

    def unflatten(self, base: Json, changes: Json) -> Json:
        """The reverse, for changed values by the names in `fields`."""
        return {**base, **changes}


def json_text(value: Any) -> str:
    """A value as config.json spells it."""
    return json.dumps(value)
