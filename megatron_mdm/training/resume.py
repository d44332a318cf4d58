"""What may differ between a run and its resumption."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.checkpoint.native import RUN_CONFIG
from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import flatten, load_config
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.data.conversation import TODAY

# Sections that change what is watched and kept, or where it is computed, not what is trained.
FREE_SECTIONS = ("logging", "checkpoint", "evaluation", "faults", "parallel", "deepspeed")
FREE_KEYS = (
    *("batch.micro_size", "batch.mode", "batch.micro_tokens", "precision.gradients", "model.kernels"),
    "data.end_tokens",
)


# What model.init_from decides where 'data' does not.
_FROM_THE_START = ("mask_token", "pad_token", "eos_token", "end_tokens", "template")


def as_the_run_began(config: RunConfig) -> RunConfig:
    """With what the run in its folder took at its beginning where the configuration leaves it open: the day that its
    chat template names, and the special tokens and the template of model.init_from, which may be gone by now."""
    saved_path, data = Path(config.checkpoint.directory) / RUN_CONFIG, config.data
    if not saved_path.exists():
        return config
    saved = load_config(saved_path).data
    open_keys = [key for key in _FROM_THE_START if config.model.init_from and key not in data.model_fields_set]
    open_keys += ["template_date"] if data.template_date == TODAY else []
    changes = {key: getattr(saved, key) for key in open_keys}
    return config.model_copy(update={"data": data.model_copy(update=changes)})


def check_same_run(saved_path: Path, config: RunConfig) -> None:
    """Raise UserError naming the first key by which the folder's run differs from the one that was asked for."""
    saved = dict(flatten(load_config(saved_path).model_dump(mode="json")))
    asked = dict(flatten(config.model_dump(mode="json")))
    for key in sorted(saved.keys() | asked.keys()):
        free = key.split(".")[0] in FREE_SECTIONS or key in FREE_KEYS
        if not free and saved.get(key) != asked.get(key):
            raise UserError(
                f"{saved_path}: the run has '{key}' = {saved.get(key)!r}, not {asked.get(key)!r}; resume with the same "
                "configuration, or train in another 'checkpoint.directory'"
            )
