"""Batches of an update: a rollout's completions, weighted by the derivative of the objective."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import Moments
from megatron_mdm.engine.base import Engine, TrainOutput
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.heartbeat import enter
from megatron_mdm.rl.batches import Batches, LocalBatch, MicroBatch
from megatron_mdm.rl.completions import Completions
from megatron_mdm.rl.estimators import Totals, coefficients, values
from megatron_mdm.rl.noise import RlNoise
from megatron_mdm.rl.objective import Gradient, Measures, gradient, metrics
from megatron_mdm.rl.reference import TokenLosses
from megatron_mdm.rl.rollouts import Ints, Rollout
from megatron_mdm.rl.settings import Counts, Place
from megatron_mdm.training.source import Prepared, StepFacts

RECOMPUTE_LIMIT = 1e-3  # of the two passes' difference, from which it is told


class _Weighted(NamedTuple):
    """A step before its training pass: by micro-batch, of each completion."""

    place: Place
    kept: Ints  # completions of the rollout that are trained on, on all ranks
    local: LocalBatch
    gradients: list[list[Gradient]]
    log_probs: list[list[Floats]]


class RolloutSource:
    """A BatchSource of rollouts: each is drawn by the weights of its first step, and trained on for all its steps.

    A step has two passes. The first gives the log-probabilities ℓ, of which the objective J is a function; the second
    trains on Σ W · cross-entropy with W = ∂J/∂ℓ held constant, whose gradient is that of −J.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        completions: Completions,
        noise: RlNoise,
        batches: Batches,
        reference: TokenLosses | None,
        context: ParallelContext,
    ) -> None:
        self.rl = config.rl
        self.engine = engine
        self.completions = completions
        self.noise = noise
        self.batches = batches
        self.reference = reference
        self.context = context
        self.counts = Counts.of(config)
        # Else all ratios are 1, whatever the log-probabilities.
        self.has_first_pass = self.counts.steps > 1 or self.rl.beta > 0
        self.rollout: Rollout | None = None
        self._next_step = 0

    def prepare(self, step: int) -> Prepared:
        """rollout → rows → log-probabilities → the objective's derivative → the model's inputs."""
        place = self.counts.place(step)
        rollout = self._rollout_of(step, place)
        kept = self.kept(rollout, place.minibatch)
        if not len(kept):
            return Prepared([], _Weighted(place, kept, LocalBatch([], 0), [], []))
        local = self.batches(rollout, place.iteration, kept)
        log_probs = self._first_pass(local)
        with self.engine.clock.measure("weights"):
            totals = self.totals(rollout, place.minibatch)
            gradients = [
                [self._gradient(rollout, place, totals, micro, number, found) for number, found in enumerate(of_micro)]
                for micro, of_micro in zip(local.micro_batches, log_probs)
            ]
            inputs = [
                micro.weighted([each.weight for each in of_micro])
                for micro, of_micro in zip(local.micro_batches, gradients)
            ]
        return Prepared(inputs, _Weighted(place, kept, local, gradients, log_probs))

    def collect(self, step: int, prepared: Prepared, output: TrainOutput) -> StepFacts:
        self._next_step = step + 1
        weighted: _Weighted = prepared.content
        place, kept = weighted.place, weighted.kept
        assert self.rollout is not None
        found = self._exchanged(weighted, output)
        t, weight = self.times(step)
        positions = kept - place.minibatch * self.counts.per_step
        return StepFacts(
            loss=-float(found.objective.sum()),
            t=t[positions],
            weight=weight[positions],
            sample_loss=found.mean if self.has_first_pass else np.full(len(kept), np.nan),
            term=-found.objective * len(kept),
            moments=np.zeros((len(kept), len(Moments._fields))),
            num_tokens=int(found.sums.num_tokens.sum()),
            num_views=self.noise.num_rows,
            num_computed=weighted.local.num_computed,
            num_selected=int(found.sums.num_scored.sum()),
            sample_ids=self.rollout.rows[kept // self.rollout.group_size],
            metrics=self._metrics(step, place, kept, found),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"rollout": int(self.rollout.number)} if self.rollout and self._is_wanted() else {}

    def state_arrays(self) -> Mapping[str, NDArray[Any]]:
        """The rollout, while some of its steps are still to come: its weights have changed, so it cannot be drawn
        again."""
        return self.rollout.arrays() if self.rollout and self._is_wanted() else {}

    def load_state_dict(self, saved: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        self.rollout = Rollout.of(arrays) if arrays else None

    def times(self, step: int) -> tuple[Floats, Floats]:
        """[N] each: of the step's completions, and of their first rows, if these have several."""
        place = self.counts.place(step)
        if self.rollout is not None and int(self.rollout.number) == place.rollout:
            t, weight = self.rollout.t, self.rollout.weight
        else:
            t, weight = self.noise.times(place.rollout)
        mine = slice(place.minibatch * self.counts.per_step, (place.minibatch + 1) * self.counts.per_step)
        return t[place.iteration, mine, 0], weight[place.iteration, mine, 0]

    def kept(self, rollout: Rollout, minibatch: int) -> Ints:
        """A minibatch's completions that have a gradient, in order: without a divergence, those whose advantage is 0
        have none. Normalisers count them all the same."""
        mine = self._minibatch(minibatch)
        if self.rl.beta == 0.0:
            return mine[rollout.advantages[mine] != 0.0]
        return mine[self._counts_at_all(rollout)[mine]]

    def totals(self, rollout: Rollout, minibatch: int) -> Totals:
        """Of a minibatch's completions that count."""
        mine = self._minibatch(minibatch)
        counted = mine[self._counts_at_all(rollout)[mine]]
        num_tokens = sum(self.batches.shape(rollout, int(completion)).scored for completion in counted)
        return Totals(len(counted), num_tokens)

    def _minibatch(self, minibatch: int) -> Ints:
        return np.arange(minibatch * self.counts.per_step, (minibatch + 1) * self.counts.per_step)

    def _counts_at_all(self, rollout: Rollout) -> NDArray[np.bool_]:
        return ~rollout.truncated if self.rl.mask_truncated_completions else np.ones_like(rollout.truncated)

    def _is_wanted(self) -> bool:
        """Whether the next step is one of the rollout's."""
        assert self.rollout is not None
        return self.counts.place(self._next_step).rollout == int(self.rollout.number)

    def _rollout_of(self, step: int, place: Place) -> Rollout:
        """The rollout that a step trains on: at the first of its steps, it is made."""
        if self.rollout is None or int(self.rollout.number) != place.rollout:
            if (place.iteration, place.minibatch) != (0, 0):
                raise UserError(
                    f"step {step + 1} trains on rollout {place.rollout}, which the checkpoint does not hold: its "
                    "weights drew none of it; resume from another, or start from scratch with --overwrite"
                )
            self.rollout = self._with_values(self.completions(place.rollout))
            enter(f"step {step + 1}")
        return self.rollout

    def _with_values(self, rollout: Rollout) -> Rollout:
        """With the values of the weights that drew it and of the reference, for all updates: later, the weights are
        others. The first step's own pass gives the values of its completions."""
        number = int(rollout.number)
        empty = np.zeros(0)
        old = reference = empty
        if self.counts.steps > 1:
            with self.engine.clock.measure("old"):
                enter(f"the values of rollout {number} by its own weights")
                old = self._measured(rollout, self.engine, leave_out_first=True)
        if self.reference is not None:
            with self.engine.clock.measure("reference"):
                enter(f"the values of rollout {number} by the reference")
                reference = self._measured(rollout, self.reference, leave_out_first=False)
        return rollout.with_values(old, reference)

    def _measured(self, rollout: Rollout, forward: TokenLosses, leave_out_first: bool) -> Floats:
        """Values [μ, B·G, L] of the completions that will be trained on, by the very micro-batches that will be."""
        found = np.zeros((self.counts.iterations, *rollout.tokens.shape))
        for iteration in range(self.counts.iterations):
            for minibatch in range(self.counts.minibatches):
                kept = self.kept(rollout, minibatch)
                if not len(kept) or (leave_out_first and iteration == minibatch == 0):
                    continue
                local = self.batches(rollout, iteration, kept)
                totals = self.totals(rollout, minibatch)
                losses = forward.token_losses([micro.inputs for micro in local.micro_batches])
                for micro, of_micro in zip(local.micro_batches, losses):
                    for noised, log_probs in zip(micro.completions, micro.log_probs(of_micro)):
                        value = values(coefficients(self.rl, noised.rows, totals), log_probs)
                        found[iteration, noised.completion, : len(value)] = value
        return fill_from_data_ranks(found, self.context)

    def _first_pass(self, local: LocalBatch) -> list[list[Floats]]:
        """Log-probabilities [K, P] of each completion by the present weights; zeros where they make no difference."""
        if not self.has_first_pass:
            return [
                [np.zeros(noised.rows.scored.shape) for noised in micro.completions] for micro in local.micro_batches
            ]
        with self.engine.clock.measure("weights"):
            losses = self.engine.token_losses([micro.inputs for micro in local.micro_batches])
        return [micro.log_probs(of_micro) for micro, of_micro in zip(local.micro_batches, losses)]

    def _gradient(
        self, rollout: Rollout, place: Place, totals: Totals, micro: MicroBatch, number: int, log_probs: Floats
    ) -> Gradient:
        noised = micro.completions[number]
        constants = coefficients(self.rl, noised.rows, totals)
        value = values(constants, log_probs)
        where = (place.iteration, noised.completion, slice(len(value)))
        is_first = (place.iteration, place.minibatch) == (0, 0)  # by the weights that drew the completions
        old = value if is_first else rollout.old[where]
        reference = rollout.reference[where] if self.reference is not None else None
        return gradient(self.rl, constants, log_probs, old, reference, float(rollout.advantages[noised.completion]))

    def _exchanged(self, weighted: _Weighted, output: TrainOutput) -> _Exchanged:
        """What all ranks found of the step's completions."""
        place_of = {int(completion): place for place, completion in enumerate(weighted.kept)}
        table = np.zeros((len(weighted.kept), len(_Sums._fields) + len(Measures._fields)))
        for micro, gradients, log_probs, statistics in zip(
            weighted.local.micro_batches, weighted.gradients, weighted.log_probs, output.statistics
        ):
            trained = _by_completion(statistics.loss, len(micro.completions))
            for number, (noised, found, ours) in enumerate(zip(micro.completions, gradients, log_probs)):
                terms = found.weight * ours
                sums = _Sums(
                    trained=trained[number],
                    before=-terms.sum(),
                    size=np.abs(terms).sum(),
                    num_tokens=noised.shape.prompt + noised.shape.length,
                    num_scored=noised.rows.scored.sum(),
                )
                table[place_of[noised.completion]] = [*sums, *found.measures]
        if len(table):
            table = fill_from_data_ranks(table, self.context)
        return _Exchanged(_Sums(*table[:, : len(_Sums._fields)].T), table[:, len(_Sums._fields) :])

    def _metrics(self, step: int, place: Place, kept: Ints, found: _Exchanged) -> dict[str, float]:
        skipped = self.counts.per_step - len(kept)
        known = metrics(found.measures)
        sums = found.sums
        gap = {}
        if not self.has_first_pass:
            known = {name: value for name, value in known.items() if name not in _OF_THE_FIRST_PASS}
        elif sums.size.sum() > 0.0:
            gap["recompute_gap"] = float(np.abs(sums.trained - sums.before).max() / sums.size.mean())
            if gap["recompute_gap"] > RECOMPUTE_LIMIT and self.context.is_main:
                tqdm.write(
                    f"warning: step {step + 1}: the pass that trains has other losses than the one that weighted them, "
                    f"by {gap['recompute_gap']:.1e} of them",
                    file=sys.stderr,
                )
        return {
            "rollout": place.rollout,
            "iteration": place.iteration,
            **known,
            **gap,
            "weighted_loss": float(sums.trained.sum()),
            "rows_skipped": skipped * self.noise.num_rows,
        }


class _Sums(NamedTuple):
    """Of a completion; or of several, [n] each."""

    trained: Any  # Σ W · cross-entropy, in the pass that trains …
    before: Any  # … and in the one before
    size: Any  # Σ |W · cross-entropy|
    num_tokens: Any  # in its row
    num_scored: Any  # of all rows


class _Exchanged(NamedTuple):
    """Of a step's completions [n] that are trained on."""

    sums: _Sums
    measures: Floats  # [n, F]: Measures

    @property
    def objective(self) -> Floats:
        return self.measures[:, Measures._fields.index("objective")]

    @property
    def mean(self) -> Floats:
        """Cross-entropy of a completion's scored tokens."""
        return self.measures[:, Measures._fields.index("mean")]


_OF_THE_FIRST_PASS = ("entropy", "noise_share", "kl", "kl_k1")


def _by_completion(of_rows: Tensor, count: int) -> Floats:
    """Sums over rows [R] of each of so many completions."""
    return of_rows.double().numpy().reshape(-1, count).sum(0) if count else np.zeros(0)
