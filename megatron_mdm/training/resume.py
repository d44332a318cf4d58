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


def on_the_runs_day(config: RunConfig) -> RunConfig:
    """With the day on which the run in its folder began, where the chat template names one and none is asked for."""
    saved_path = Path(config.checkpoint.directory) / RUN_CONFIG
    if config.data.template_date != TODAY or not saved_path.exists():
        return config
    day = load_config(saved_path).data.template_date
    return config.model_copy(update={"data": config.data.model_copy(update={"template_date": day})})


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
