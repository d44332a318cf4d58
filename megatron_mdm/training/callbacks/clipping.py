"""The clipped schedule's interval, chosen at validations."""

from __future__ import annotations

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.noiser import Noiser
from megatron_mdm.diffusion.t_samplers import ClippedSampler, least_variance_interval
from megatron_mdm.evaluation.validation import FixedGridValidation
from megatron_mdm.training.callbacks.base import Callback, Order, State
from megatron_mdm.training.loop import StepResult
from megatron_mdm.training.metrics import MetricsLog
from megatron_mdm.training.state import TrainState


class AdaptiveClipping(Callback):
    """The clipped schedule's interval, chosen again at every validation: that whose losses vary least."""

    name = "clipping"
    order = Order.CLIPPING

    def __init__(self, config: RunConfig, validation: FixedGridValidation, noiser: Noiser, metrics: MetricsLog) -> None:
        self.every = config.evaluation.every
        self.validation = validation
        self.noiser = noiser
        self.metrics = metrics
        self.bounds: list[float] = []  # none before the first validation

    def state_dict(self) -> State:
        return {"clipping": self.bounds}

    def load_state_dict(self, saved: State) -> None:
        self.bounds = saved["clipping"]
        if self.bounds:
            self.noiser.use(ClippedSampler((self.bounds[0], self.bounds[1])))

    def after_step(self, state: TrainState, _: StepResult) -> None:
        if state.step % self.every == 0:
            bounds = least_variance_interval(self.validation.t, self.validation.losses)
            self.noiser.use(ClippedSampler(bounds))
            self.bounds = list(bounds)
            self.metrics.write(state.step, {"clipping_lower": bounds[0], "clipping_upper": bounds[1]})
