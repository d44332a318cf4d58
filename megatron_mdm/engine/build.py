"""Which engine a configuration asks for."""

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.base import Engine, Load
from megatron_mdm.engine.communication import stages
from megatron_mdm.engine.pipe import PipeEngine
from megatron_mdm.engine.zero import ZeroEngine
from megatron_mdm.parallel.groups import ParallelContext


def build_engine(config: RunConfig, context: ParallelContext, load: Load | None = None) -> Engine:
    """The engine of a run. load: fills this rank's part of the model before the optimizer takes its master weights from
    it; None: random initial weights. Raises UserError where a pipeline stage would hold nothing that is trained."""
    for number, stage in enumerate(stages(config)):
        if not stage.held(config.model, config.parallel.tensor).trained:
            raise UserError(
                f"'parallel.pipeline' {config.parallel.pipeline}: stage {number} holds no parameter that is trained "
                "(see 'model.extensions'); use fewer stages"
            )
    engine = PipeEngine if config.parallel.pipeline > 1 else ZeroEngine
    return engine(config, context, load)
