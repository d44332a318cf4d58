"""Which engine a configuration asks for."""

from collections.abc import Callable

from torch import nn

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.base import Engine
from megatron_mdm.engine.pipe import PipeEngine
from megatron_mdm.engine.zero import ZeroEngine
from megatron_mdm.parallel.groups import ParallelContext


def build_engine(config: RunConfig, context: ParallelContext, load: Callable[[nn.Module], None]) -> Engine:
    """load: called with this rank's part of the model before the optimizer takes its master weights from it."""
    engine = PipeEngine if config.parallel.pipeline > 1 else ZeroEngine
    return engine(config, context, load)


def from_scratch(_: nn.Module) -> None:
    """A load that keeps the initial weights."""
