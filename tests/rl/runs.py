"""Runs on a rank of a test."""

from __future__ import annotations

from typing import Any

from megatron_mdm.config.schema import RunConfig


def run_of(config: RunConfig, parts: Any, resume: bool = False) -> dict[str, Any]:
    """As cli/train.py: checked, read, trained. Returns the summary."""
    from megatron_mdm.objectives import check_run
    from megatron_mdm.parallel.groups import initialize, world_size_from_environment
    from megatron_mdm.training.folder import StartMode
    from megatron_mdm.training.inputs import resolve
    from megatron_mdm.training.run import train_run

    world_size = world_size_from_environment()
    check_run(config, world_size)
    config, data = resolve(parts.checked(config, world_size))
    parts.check_data(config, data)
    return train_run(config, data, initialize(config.parallel), StartMode(resume=resume), parts)
