"""Runs on a rank of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

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


class Begun(NamedTuple):
    """A run that begins."""

    config: RunConfig  # with what its data decide
    context: Any
    engine: Any
    source: Any


def begun(config: RunConfig, context: Any = None) -> Begun:
    """Its parts, as training/run.py makes them; context: this rank's, if it has one."""
    from megatron_mdm.checkpoint.load import restored_engine
    from megatron_mdm.parallel.groups import initialize
    from megatron_mdm.rl.run import REINFORCED
    from megatron_mdm.training.inputs import resolve
    from megatron_mdm.training.metrics import MetricsLog
    from megatron_mdm.training.parts import Run

    config, data = resolve(config)
    context = context or initialize(config.parallel)
    engine = restored_engine(None, config, context, 0)
    metrics = MetricsLog(Path(config.checkpoint.directory), False, False, 0)
    return Begun(config, context, engine, REINFORCED.source(Run(config, data, context, engine, None, metrics)))
