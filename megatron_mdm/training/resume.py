"""What may differ between a run and its resumption."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mdm.checkpoint.base import BASE, INPUTS, fingerprint, needs_base
from megatron_mdm.checkpoint.native import RUN_CONFIG
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import flatten, load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.conversation import TODAY
from megatron_mdm.training.inputs import RunData, tokenizer_contents

# What is read once, when a run begins: it may have been moved or be gone by now.
USED_AT_THE_START = ("model.init_from", "model.lora.init_from", "diffusion.calibration.artifact")

# Sections that change what is watched and kept, or where it is computed, not what is trained.
FREE_SECTIONS = ("logging", "checkpoint", "evaluation", "faults", "parallel", "deepspeed")
FREE_KEYS = (
    "batch.micro_size",
    "batch.mode",
    "batch.micro_tokens",
    "precision.gradients",
    "model.kernels",
    "model.loss_kernel",
    "model.compile",
    "data.end_tokens",
    "image.tokenizer",  # whose codes are trained on is image.made_by
    "image.preview",
    "rl.generation.batch_size",
    "rl.reference",
    "rl.evaluate_every",
    "rl.num_eval_prompts",
    "rl.log_completions",
    "rl.record",
)


# What model.init_from decides where 'data' does not.
_FROM_THE_START = ("mask_token", "pad_token", "eos_token", "end_tokens", "template")


def as_the_run_began(config: RunConfig) -> RunConfig:
    """The configuration with what the run in its folder took at its beginning where it leaves that open: the day that
    its chat template names, and the special tokens and the template of model.init_from, which may be gone by now."""
    saved_path = Path(config.checkpoint.directory) / RUN_CONFIG
    data = config.data
    if not saved_path.exists():
        return config
    saved = load_config(saved_path).data
    open_keys = [key for key in _FROM_THE_START if config.model.init_from and key not in data.model_fields_set]
    open_keys += ["template_date"] if data.template_date == TODAY else []
    changes = {key: getattr(saved, key) for key in open_keys}
    return config.model_copy(update={"data": data.model_copy(update=changes)})


def contents(config: RunConfig, data: RunData) -> dict[str, str]:
    """Fingerprints of a run's data, tokenizer and, where it reads them again, of the weights that it began with,
    wherever they lie, by the key that names them."""
    found = {
        "data.train": data.train.fingerprint,
        "data.validation": data.validation.fingerprint if data.validation else "",
        "data.tokenizer": tokenizer_contents(config, data),
    }
    if needs_base(config):
        found[BASE] = fingerprint(Path(config.model.init_from))
    return found


def check_same_run(folder: Path, config: RunConfig, data: RunData) -> None:
    """Raise UserError naming the first key by which the folder's run differs from the one that was asked for. Data and
    tokenizer are compared by their contents, so they may have been moved or renamed."""
    began_with = json.loads((folder / INPUTS).read_text(encoding="utf-8")) if (folder / INPUTS).exists() else {}
    for key, found in contents(config, data).items():
        if began_with.get(key, found) != found:
            raise UserError(
                f"{_path(config, key)}: the file has changed since the run in {folder} began, or is another ('{key}'); "
                "resume with the same, or train in another 'checkpoint.directory'"
            )
    saved = _compared(load_config(folder / RUN_CONFIG), began_with)
    asked = _compared(config, began_with)
    for key in sorted(saved.keys() | asked.keys()):
        if saved.get(key) != asked.get(key):
            raise UserError(
                f"{folder / RUN_CONFIG}: the run has '{key}' = {saved.get(key)!r}, not {asked.get(key)!r}; resume with "
                "the same configuration, or train in another 'checkpoint.directory'"
            )


def _compared(config: RunConfig, by_contents: Mapping[str, str]) -> dict[str, Any]:
    """Values by key, without those that may differ."""
    values = dict(flatten(config.model_dump(mode="json", exclude={"data": {"train"}})))
    values["data.train"] = config.data.train
    for key in by_contents:
        value = values.pop(key)
        if isinstance(value, dict):  # a blend of corpora
            values["the weights in 'data.train'"] = list(value.values())
    for key in USED_AT_THE_START:
        values[key] = bool(values.get(key))
    return {
        key: value for key, value in values.items() if key.split(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS
    }


def _path(config: RunConfig, key: str) -> str:
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    return ", ".join(value) if isinstance(value, dict) else value
