"""The paper's claims, one by one: what the runs say of each, with an interval, and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from megatron_mdm.evaluation.intervals import Interval, mean_interval
from megatron_mdm.study.scores import Scores
from megatron_mdm.study.statistics import (
    contrast,
    mean_rank_correlation,
    rank_correlation,
    spread_ratio,
    worst_over_best,
)

HOLDS = "holds"
FAILS = "does not hold"
UNKNOWN = "cannot tell at this size"
NEAR = 2.0  # spreads within this factor count as near each other


class Verdict(NamedTuple):
    claim: str
    task: str  # empty: over tasks
    quantity: str  # what the interval is of, in words
    interval: Interval
    verdict: str


def above(interval: Interval, threshold: float = 0.0) -> str:
    """Whether a quantity is above a threshold, by its interval."""
    if interval.lower > threshold:
        return HOLDS
    return FAILS if interval.upper < threshold else UNKNOWN


def below(interval: Interval, threshold: float) -> str:
    if interval.upper < threshold:
        return HOLDS
    return FAILS if interval.lower > threshold else UNKNOWN


def verdicts(scores: Scores) -> list[Verdict]:
    """All claims of which there are runs."""
    found = [verdict for claim in CLAIMS for task in scores.tasks for verdict in claim(scores, task)]
    return [*found, *_long_responses(scores), *_predicted(scores)]


def _worst_above_best(scores: Scores, task: str) -> Iterator[Verdict]:
    names = scores.settings.claims
    if scores.all_there(task, (names.both, names.standard)):
        of = (scores.scores, scores.errors)
        both, both_errors, standard, errors = (get(task, name) for name in (names.both, names.standard) for get in of)
        interval = worst_over_best(both, both_errors, standard, errors)
        text = f"worst of {len(both)} less best of {len(standard)}"
        yield Verdict(
            "the worst seed of P-POTS + MIRROR is above the best of Standard", task, text, interval, above(interval)
        )


def _stable(scores: Scores, task: str) -> Iterator[Verdict]:
    names = scores.settings.claims
    if names.causal and scores.all_there(task, (names.both, names.causal)):
        interval = spread_ratio(scores.scores(task, names.both), scores.scores(task, names.causal))
        text = f"ratio of standard deviations; near: below {NEAR:g}"
        claim = "P-POTS + MIRROR's spread over seeds is near the autoregressive model's"
        yield Verdict(claim, task, text, interval, below(interval, NEAR))
    if scores.all_there(task, (names.both, names.standard)):
        interval = spread_ratio(scores.scores(task, names.both), scores.scores(task, names.standard))
        claim = "P-POTS + MIRROR's spread over seeds is less than Standard's"
        yield Verdict(claim, task, "ratio of standard deviations", interval, below(interval, 1.0))


def _synergy(scores: Scores, task: str) -> Iterator[Verdict]:
    names = scores.settings.claims
    four = (names.both, names.ppots, names.mirror, names.standard)
    if scores.all_there(task, four):
        interval = contrast([scores.scores(task, name) for name in four], [1.0, -1.0, -1.0, 1.0])
        claim = "P-POTS and MIRROR together gain more than the sum of each one's gain"
        yield Verdict(claim, task, "gain of both less both gains", interval, above(interval))


def _clipped_between(scores: Scores, task: str) -> Iterator[Verdict]:
    names = scores.settings.claims
    pairs = ((names.clipped, names.standard), (names.both, names.clipped))
    if scores.all_there(task, (names.clipped, names.standard, names.both)):
        for better, worse in pairs:
            interval = contrast([scores.scores(task, better), scores.scores(task, worse)], [1.0, -1.0])
            text = f"{scores.title(better)} less {scores.title(worse)}"
            yield Verdict("Clipped is between Standard and P-POTS + MIRROR", task, text, interval, above(interval))


def _equal_compute(scores: Scores, task: str) -> Iterator[Verdict]:
    names = scores.settings.claims
    for budget in ("compute", "time"):
        standard = scores.scores(task, names.standard, budget)
        for method in dict.fromkeys((names.both, *names.ours)):
            others = scores.scores(task, method, budget)
            if standard and others:
                interval = contrast([others, standard], [1.0, -1.0])
                claim = f"{scores.title(method)} is better than Standard at equal {budget}"
                yield Verdict(claim, task, "difference of means", interval, above(interval))


def _best_of_ours(scores: Scores, task: str) -> Iterator[Verdict]:
    """A higher bar than a difference's interval: the two intervals do not overlap. The best is that of those with the
    most runs."""
    yield from _apart(scores, task, scores.scores, "")
    yield from _apart(scores, task, lambda *of: [-loss for loss in scores.losses(*of)], " in validation loss")


def _apart(scores: Scores, task: str, values: Callable[[str, str, str], list[float]], what: str) -> Iterator[Verdict]:
    """values: of which more is better, by task, method and budget."""
    names = scores.settings.claims
    standard = values(task, names.standard, "compute")
    ours = {name: found for name in names.ours if (found := values(task, name, "compute"))}
    if not standard or not ours:
        return
    most = max(map(len, ours.values()))
    means = {name: mean_interval(found) for name, found in ours.items() if len(found) == most}
    best = max(means, key=lambda name: means[name].estimate)
    first, second = means[best], mean_interval(standard)
    gap = Interval(first.estimate - second.estimate, first.lower - second.upper, first.upper - second.lower)
    claim = f"the best of ours is better than Standard{what} at equal compute, with 95 % intervals apart"
    yield Verdict(claim, task, f"gain of {scores.title(best)}, bound to bound", gap, above(gap))


def _robust_curve(scores: Scores, task: str) -> Iterator[Verdict]:
    names = scores.settings.claims
    least = [_least_efficiency(scores, task, name) for name in (names.curve, names.polynomial)]
    if all(least):
        interval = contrast(least, [1.0, -1.0])
        claim = "EPR keeps its efficiency better than a polynomial of degree 7 while the model drifts"
        yield Verdict(
            claim, task, "difference of each run's least efficiency at validations", interval, above(interval)
        )


CLAIMS: tuple[Callable[[Scores, str], Iterator[Verdict]], ...] = (
    _worst_above_best,
    _stable,
    _synergy,
    _clipped_between,
    _equal_compute,
    _best_of_ours,
    _robust_curve,
)


def _least_efficiency(scores: Scores, task: str, method: str) -> list[float]:
    def least(run: dict[str, object]) -> float | None:
        curve = run["curves"]["efficiency"]["validation_efficiency"]  # type: ignore[index]
        return min(curve) if curve else None

    return scores.means(task, method, least)


def _long_responses(scores: Scores) -> Iterator[Verdict]:
    """MIRROR's gain on the task of the longest responses less its mean gain on the others."""
    names = scores.settings.claims
    lengths = {task: scores.settings.tasks[task].response_tokens for task in scores.tasks}
    there = [t for t in lengths if lengths[t] and scores.all_there(t, (names.mirror, names.standard))]
    if len(there) < 2:
        return
    longest = max(there, key=lambda task: lengths[task])
    groups = []
    weights = []
    for task in there:
        share = 1.0 if task == longest else -1.0 / (len(there) - 1)
        groups += [scores.scores(task, names.mirror), scores.scores(task, names.standard)]
        weights += [share, -share]
    interval = contrast(groups, weights)
    text = f"gain on {scores.task_title(longest)} less the mean gain on {len(there) - 1} others"
    yield Verdict("MIRROR helps long responses more", "", text, interval, above(interval))


def _predicted(scores: Scores) -> Iterator[Verdict]:
    claim = "less gradient variance at equal compute at the base checkpoint, better final score"
    found = rankings(scores)
    for ranking in found:
        text = f"Spearman's correlation over {len(ranking.methods)} methods"
        yield Verdict(claim, ranking.task, text, ranking.correlation, above(ranking.correlation))
    if len(found) > 1:
        over = mean_rank_correlation([([-value for value in each.variance], each.score) for each in found])
        yield Verdict(claim, "", f"mean of the {len(found)} tasks' (Fisher's z)", over, above(over))


class Ranking(NamedTuple):
    """Gradient variance at equal compute, relative to the standard method's, and mean final score."""

    task: str
    budget: str  # of the scores
    methods: list[str]
    variance: list[float]
    score: list[float]
    correlation: Interval  # of the scores with minus the variances


def rankings(scores: Scores) -> list[Ranking]:
    """One of each task whose variances were measured: scores at equal compute, where there are some of two methods at
    least, else at equal samples."""
    found = []
    for record in scores.variance:
        task = record["task"]
        rows = record["rows"]
        budget = "compute" if sum(bool(scores.scores(task, row["name"], "compute")) for row in rows) > 1 else "samples"
        kept = [(row, values) for row in rows if (values := scores.scores(task, row["name"], budget))]
        if len(kept) < 3:
            continue
        variance = [row["gradient"][0] * row["passes"] for row, _ in kept]
        score = [math.fsum(values) / len(values) for _, values in kept]
        correlation = rank_correlation([-value for value in variance], score)
        found.append(Ranking(task, budget, [row["name"] for row, _ in kept], variance, score, correlation))
    return found
