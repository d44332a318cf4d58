"""−log p(response | prompt), from the rows that a model's objective makes of a sample: MASK_BOUND's, or others.

A masked model's bound on P eligible tokens (paper, Eq. 1, for ε → 0) is ∫₀¹ E[Σ_{i masked} CE_i / t] dt, which is, with
the noise of how many are masked integrated out,

    P · E over M ~ U{1 … P} and a uniformly random set S of M positions of (1/M) Σ_{i ∈ S} CE_i.

M is drawn by strata of t: M = ⌊t P⌋ + 1. Under guidance CE is that of the guided logits (LLaDA's get_log_likelihood).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from megatron_mdm.batch import AttentionPattern, ModelInputs, padded_rows
from megatron_mdm.config.schema import Section
from megatron_mdm.data.sft import Sample
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.randomness import Purpose, stream
from megatron_mdm.engine.base import Forward
from megatron_mdm.engine.inputs import logits_inputs
from megatron_mdm.generation.settings import LogitsEngine, SpecialIds
from megatron_mdm.parallel.collectives import fill_from_data_ranks
from megatron_mdm.parallel.groups import ParallelContext
from megatron_mdm.parallel.progress import progress_bar

Counts = NDArray[np.int64]
Patterns = Callable[[Tensor, int], AttentionPattern]  # (lengths [R], width) → which token sees which


def stratified(num_eligible: int, num_times: int, generator: np.random.Generator) -> Counts:
    """One t in each of num_times equal strata of [0, 1), independently. [num_times] in 1 … P."""
    t = (np.arange(num_times) + generator.random(num_times)) / num_times
    return np.minimum((t * num_eligible).astype(np.int64), num_eligible - 1) + 1


def systematic(num_eligible: int, num_times: int, generator: np.random.Generator) -> Counts:
    """LLaDA's: evenly spaced from one random count on, modulo P. [num_times] in 1 … P.

    LLaDA rounds to the nearest count, halves to even ones, which makes even counts likelier; here fractions are cut
    off, so that every count is as likely.
    """
    first = int(generator.integers(num_eligible))
    return (first + np.arange(num_times) * num_eligible // num_times) % num_eligible + 1


COUNTS: dict[str, Callable[[int, int, np.random.Generator], Counts]] = {
    "stratified": stratified,
    "systematic": systematic,
}


class LikelihoodConfig(Section):
    """Exact likelihoods (of autoregressive models) use extrapolate and batch_size only, and refuse cfg_scale. LLaDA's
    setting is counts=systematic num_times=128 num_repeats=1."""

    num_times: int = Field(default=16, gt=0)  # mask counts per repeat
    num_repeats: int = Field(default=4, gt=0)  # independent repeats, from which the standard error is taken
    counts: str = "stratified"
    # Classifier-free guidance s: l_u + (s + 1)(l_c - l_u), where u does not see the prompt, that is, what is not
    # eligible. Keeps the logits of all masked positions of twice batch_size rows.
    cfg_scale: float = Field(default=0.0, ge=0.0)
    extrapolate: bool = False  # score samples of any length, beyond model.max_sequence_length, too
    batch_size: int = Field(default=32, gt=0)  # rows per forward pass and data-parallel rank
    seed: int = 0

    @field_validator("counts")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in COUNTS:
            raise ValueError(f"must be one of {', '.join(COUNTS)}")
        return value


class Likelihoods(NamedTuple):
    """Likelihoods of n samples, float64, the same on every rank."""

    nats: Floats  # [n]: the estimate of −log p, or of its bound
    standard_error: Floats  # [n]: of the estimate, from the masks' noise; not a number with one repeat
    num_eligible: NDArray[np.int64]  # [n]


class Scorer(Forward, LogitsEngine, Protocol):
    """engine.inference.InferenceEngine, or its like over a pipeline."""


class Row(NamedTuple):
    """A row of the model. Its loss is the mean cross-entropy of the scored positions."""

    tokens: NDArray[np.int32]  # [S]: what the model sees
    labels: NDArray[np.int32]  # [S]
    scored: NDArray[np.bool_]  # [S]
    given: NDArray[np.bool_]  # [S]: the prompt, which guidance's other pass does not see


class Rows(NamedTuple):
    """Made when they are asked for: row i is repeat and time i % per_sample of sample i // per_sample."""

    lengths: NDArray[np.int64]
    num_repeats: int
    make: Callable[[int], Row]
    pattern_of: Patterns = padded_rows


class Scoring(NamedTuple):
    """How a model's samples are scored: −log p, or its bound, is the mean of a sample's rows times its targets."""

    rows: Callable[[Sequence[Sample], LikelihoodConfig, SpecialIds], Rows]
    targets: Callable[[Sample], NDArray[np.bool_]]  # [S]: the positions that count
    is_bound: bool  # an upper bound by Monte Carlo, not −log p itself


def negative_log_likelihoods(
    engine: Scorer,
    samples: Sequence[Sample],
    config: LikelihoodConfig,
    special: SpecialIds,
    context: ParallelContext,
    scoring: Scoring,
) -> Likelihoods:
    """−log p of each sample's target positions, or its bound. Collective. scoring: of the objective that the model was
    trained for. Raises UserError where guidance is asked for and it has none."""
    rows = scoring.rows(samples, config, special)
    num_eligible = np.array([np.count_nonzero(scoring.targets(sample)) for sample in samples], dtype=np.int64)
    losses = _mean_losses(engine, rows, config, special, context)
    repeats = losses.reshape(len(samples), rows.num_repeats, -1).mean(2) * num_eligible[:, None]
    if not scoring.is_bound:
        error = np.zeros(len(samples))
    elif rows.num_repeats == 1:
        error = np.full(len(samples), np.nan)
    else:
        error = repeats.std(1, ddof=1) / rows.num_repeats**0.5
    return Likelihoods(repeats.mean(1), error, num_eligible)


def _masked_rows(samples: Sequence[Sample], config: LikelihoodConfig, special: SpecialIds) -> Rows:
    per_sample = config.num_repeats * config.num_times

    def make(index: int) -> Row:
        sample_index, place = divmod(index, per_sample)
        repeat, time = divmod(place, config.num_times)
        sample = samples[sample_index]
        places = np.flatnonzero(sample.eligible)
        count_stream = stream(config.seed, Purpose.LIKELIHOOD, repeat, sample_index)
        count = COUNTS[config.counts](len(places), config.num_times, count_stream)[time]
        mask_stream = stream(config.seed, Purpose.LIKELIHOOD, config.num_repeats + place, sample_index)
        scored = np.zeros(len(sample.tokens), dtype=np.bool_)
        scored[mask_stream.permutation(places)[:count]] = True
        return Row(np.where(scored, special.mask, sample.tokens), sample.tokens, scored, ~sample.eligible)

    lengths = np.repeat([len(sample.tokens) for sample in samples], per_sample)
    return Rows(lengths, config.num_repeats, make)


def _eligible(sample: Sample) -> NDArray[np.bool_]:
    return sample.eligible


MASK_BOUND = Scoring(_masked_rows, _eligible, is_bound=True)


def _mean_losses(
    engine: Scorer, rows: Rows, config: LikelihoodConfig, special: SpecialIds, context: ParallelContext
) -> Floats:
    """Mean cross-entropy of each row's scored positions, in nats [number of rows], over all data-parallel ranks."""
    order = np.argsort(rows.lengths, kind="stable")
    batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    losses = np.zeros(len(order))
    turns = range(-(-len(batches) // context.layout.data))
    for turn in progress_bar(turns, desc="likelihood", unit="batch", enabled=context.is_main):
        index = turn * context.layout.data + context.data_rank
        batch = batches[min(index, len(batches) - 1)]  # ranks without work repeat the last batch, to keep step
        measured = _losses([rows.make(row) for row in batch], engine, config.cfg_scale, special, rows.pattern_of)
        if index < len(batches):
            losses[batch] = measured.double().cpu().numpy()
    return fill_from_data_ranks(losses, context)


def _losses(rows: Sequence[Row], engine: Scorer, cfg_scale: float, special: SpecialIds, pattern_of: Patterns) -> Tensor:
    """Mean cross-entropy of each row's scored positions, [R] float32."""
    inputs = _inputs(rows, special.pad, pattern_of)
    if not cfg_scale:
        return engine.evaluate([inputs])[0].loss
    blind = inputs.tokens.masked_fill(_padded([row.given for row in rows], False), special.mask)
    both = torch.cat([inputs.tokens, blind])
    lengths = inputs.pattern.row_lengths(*inputs.tokens.shape)
    pattern = pattern_of(lengths.repeat(2), both.shape[1])
    logits = engine.logits(logits_inputs(both, pattern, inputs.selected.repeat(2, 1))).float()
    conditional, unconditional = logits.chunk(2)
    guided = unconditional + (cfg_scale + 1.0) * (conditional - unconditional)
    losses = torch.zeros_like(inputs.token_weight)
    losses[inputs.selected] = cross_entropy(
        guided, inputs.labels[inputs.selected].to(guided.device), reduction="none"
    ).cpu()
    return (losses * inputs.token_weight).sum(1)


def _inputs(rows: Sequence[Row], pad_id: int, pattern_of: Patterns) -> ModelInputs:
    lengths = torch.tensor([len(row.tokens) for row in rows])
    tokens = _padded([row.tokens for row in rows], pad_id)
    labels = _padded([row.labels for row in rows], 0)
    scored = _padded([row.scored for row in rows], False)
    weight = scored.float() / scored.sum(1, keepdim=True)
    pattern = pattern_of(lengths, tokens.shape[1])
    return ModelInputs(tokens.long(), pattern, scored, labels.long(), weight, torch.ones(len(rows)))


def _padded(rows: Sequence[NDArray[Any]], value: float) -> Tensor:
    """[R, S], padded on the right."""
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)
