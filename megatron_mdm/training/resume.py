"""What may differ between a run and its resumption."""

from __future__ import annotations

from pathlib import Path

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import flatten, load_config
from megatron_mdm.config.schema import RunConfig

# Sections that change what is watched and kept, or where it is computed, not what is trained.
FREE_SECTIONS = ("logging", "checkpoint", "evaluation", "faults", "parallel", "deepspeed")
FREE_KEYS = ("batch.micro_size", "batch.mode", "batch.micro_tokens", "precision.gradients", "model.kernels")


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
