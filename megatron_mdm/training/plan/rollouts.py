"""How long a rollout of reinforcement learning and the updates on it take."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megatron_mdm.config.schema import RunConfig
from megatron_mdm.engine.communication import MicroBatchShape, Volume, passing_communication
from megatron_mdm.generation.memory import decoding_shape
from megatron_mdm.generation.settings import GenerationConfig
from megatron_mdm.parallel.layout import Layout
from megatron_mdm.training.plan.cluster import Cluster
from megatron_mdm.training.plan.timing import StepTime, passing_seconds

# Bytes that move between memory and device for each logit that a token is drawn from: 8 of each of some 60 operands of
# the hash, the two logarithms, the logit in float64 and its probability
_DRAWING_BYTES = 450


@dataclass(frozen=True)
class RolloutTime:
    """Seconds of a rollout and its updates. Rewards are not counted: they are the user's functions."""

    generation: float
    old: float  # values of the weights that drew the completions
    reference: float  # values of the initial weights
    weights: float  # the updates' passes without gradients, which their tokens' weights are made of
    updates: float
    validation: float  # exact match on prompts of data.validation, by rollout
    num_completions: int
    num_updates: int
    num_turns: int  # batches that a data-parallel rank decodes one after another
    num_passes: int  # of each
    communication: Volume  # bytes of one rank in all passes without gradients

    @property
    def total(self) -> float:
        return self.generation + self.old + self.reference + self.weights + self.updates + self.validation


def rollout_time(
    config: RunConfig,
    layout: Layout,
    cluster: Cluster,
    usual: MicroBatchShape,
    num_micro_batches: int,
    update: StepTime,
) -> RolloutTime:
    """usual, num_micro_batches: of an update on a data-parallel rank."""
    rl = config.rl
    generation = GenerationConfig.of_rollouts(config)
    num_turns = _turns(rl.num_completions, generation, layout)
    turn = _turn_seconds(config, generation, layout, cluster, usual.length)
    num_updates = rl.num_completions // config.batch.global_size * rl.num_iterations
    # The first update's values are those of the weights that drew the completions: its pass gives both. And where there
    # is one update only, held to nothing, no value is needed.
    num_old = num_updates - 1
    num_weights = num_updates if num_updates > 1 or rl.beta > 0 else 0
    num_reference = num_updates if rl.beta > 0 else 0
    sweep = passing_seconds(config, layout, cluster, usual, num_micro_batches)
    validation = 0.0
    if rl.evaluate_every and (config.data.validation or config.data.validation_fraction):
        validation = turn * _turns(rl.num_eval_prompts, generation, layout) / rl.evaluate_every
    communication: Volume = Counter()
    width = int(config.model.vocab_size)
    shape = _usual_decoding(generation, usual.length)
    for number, of_pass in (
        (num_turns * generation.most_passes, passing_communication(config, layout, 0, shape, width)),
        (
            num_micro_batches * (num_old + num_weights + num_reference),
            passing_communication(config, layout, 0, usual, 0),
        ),
    ):
        communication.update({key: number * size for key, size in of_pass.items()})
    return RolloutTime(
        generation=num_turns * turn,
        old=num_old * sweep,
        reference=num_reference * sweep,
        weights=num_weights * sweep,
        updates=num_updates * update.total,
        validation=validation,
        num_completions=rl.num_completions,
        num_updates=num_updates,
        num_turns=num_turns,
        num_passes=generation.most_passes,
        communication=communication,
    )


def _turns(num_prompts: int, generation: GenerationConfig, layout: Layout) -> int:
    return math.ceil(math.ceil(num_prompts / generation.batch_size) / layout.data)


def _turn_seconds(
    config: RunConfig, generation: GenerationConfig, layout: Layout, cluster: Cluster, length: int
) -> float:
    """Seconds to decode one batch."""
    shape = _usual_decoding(generation, length)
    width = int(config.model.vocab_size)
    drawing = _DRAWING_BYTES * shape.selected * width / (cluster.memory_gbytes_per_s * 1e9)
    return generation.most_passes * (passing_seconds(config, layout, cluster, shape, 1, width) + drawing)


def _usual_decoding(generation: GenerationConfig, length: int) -> MicroBatchShape:
    """A pass with half of a block masked."""
    greatest = decoding_shape(generation, length)
    return MicroBatchShape(greatest.rows, length, math.ceil(greatest.selected / 2))
