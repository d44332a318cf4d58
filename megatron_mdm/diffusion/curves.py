"""E[l | t] and E[l² | t] as curves, read off sums of moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_mdm.diffusion.exposure import Exposure, Exposures
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.moments import MomentSums
from megatron_mdm.diffusion.smoothing import LogRate, log_rate

Curve = Callable[[Floats], Floats]

# Logarithms of rates are rounded far below their statistical error: losses differ between layouts in the last bits, and
# a fit of a dozen parameters would enlarge that until t itself differed.
_LOG_STEP = 1 / 1000
_LEAST_SPREAD = 1e-4  # of a loss's mean square over its squared mean
_LARGEST_VARIANCE = 16.0  # of a log rate that is little known: it is raised by no more than e⁴


class Term(NamedTuple):
    """Part of a moment at t: a rate of token losses, smooth in t, times what the weights amount to, which is known."""

    amounts: str  # of Moments
    known: Callable[[Exposure], Floats]


MEAN = (Term("token_loss", lambda known: known.total),)
SECOND_MOMENT = (
    Term("squares", lambda known: known.squares / known.views),
    Term("pairs", lambda known: known.pairs / known.views),
    Term("cross", lambda known: known.cross / known.views**2),
)
GRADIENT = (Term("token_gradients", lambda known: known.squares / known.views),)

# Powers of the mean token loss that the rates are taken for where the losses are too few to tell: a mean square between
# that of rare mistakes (1) and of losses that scale (2), and products of different tokens' losses.
_POWER = {"squares": 1.5, "pairs": 2.0, "cross": 2.0, "token_gradients": 1.5}


@dataclass(frozen=True)
class MomentCurves:
    """What is known of the estimator's loss l and gradient at each t in [0, 1]."""

    mean_loss: Curve  # g(t) = E[l | t]
    second_moment: Curve  # E[l² | t]
    paper: Curve  # ĝ² + v̂: leaves out the spread of g over samples
    gradient: Curve  # E[‖h‖² | t], h the gradient with respect to the last hidden states


def naive_moments(sums: MomentSums, _: Exposures) -> MomentCurves:
    """The paper's estimates: means of the losses and of their squares in each cell, joined by straight lines."""

    def curve(values: Floats, t: Floats) -> Curve:
        rounded = np.exp(_rounded(np.log(np.maximum(values, 1e-300))))
        return lambda x: np.interp(x, t, rounded)

    t, mean_loss = sums.mean("loss")
    masking_variance = sums.mean("masking_variance")[1]
    return MomentCurves(
        curve(mean_loss, t),
        curve(sums.mean("loss_square")[1], t),
        curve(mean_loss**2 + masking_variance, t),
        curve(sums.mean("gradient_square")[1], t),
    )


def token_moments(sums: MomentSums, exposures: Exposures) -> MomentCurves:
    """E[l² | t] with the noise of the masks' counts and weights integrated out.

    With μ₂ = E[c_i² | i masked], κ = E[c_i c_j | i ≠ j masked] and κ' the same over two rows of a sample,

        E[l² | t] = (μ₂(t) · E[Σ w²] + κ(t) · E[Σ_{i≠j} w w]) / V + κ'(t) · E[Σ_rows≠ w w'] / V²

    The three are smooth in t and free of 1/t; each is a ratio of sums over groups. The expectations of the weights are
    known exactly (exposure.py), so the same formula serves every masking rule, MIRROR, repeated masks and ISAD. The
    mean token loss, of which most is known, leads: μ₂, κ and κ' are taken for powers of it until the losses say more.
    The density is the root of a second moment, and the *expected* root of a rate whose logarithm is normal is that of
    e^(mode + variance/4): where little is known of a rate, it counts for more than its mode, and p(t) stays high.
    """
    # finer towards 0, where the rates turn most
    grid = np.square(np.linspace(0.0, 1.0, len(sums.sums) + 1))
    leader = _log_rate(sums, "token_loss", grid)

    def smooth(term: Term) -> Curve:
        if not sums.column(term.amounts).any():
            return np.zeros_like
        power = _POWER[term.amounts]
        follower = log_rate(sums.rates(term.amounts), grid, lambda t: np.interp(t, grid, leader.mode), power)
        variance = np.minimum(follower.variance + power**2 * leader.variance, _LARGEST_VARIANCE)
        values = np.exp(_rounded(follower.mode + variance / 4))
        return lambda t: np.interp(t, grid, values)

    mean_values = np.exp(_rounded(leader.mode))

    def mean_loss(t: Floats) -> Floats:
        return np.interp(t, grid, mean_values) * exposures(t).total

    second_moment, gradient = (_sum_of_terms(terms, smooth, exposures) for terms in (SECOND_MOMENT, GRADIENT))
    return MomentCurves(
        mean_loss,
        # Curves fitted apart may contradict each other, but no square's mean is below the mean's square.
        lambda t: np.maximum(second_moment(t), (1.0 + _LEAST_SPREAD) * np.square(mean_loss(t))),
        _unavailable,
        gradient,
    )


def _log_rate(sums: MomentSums, name: str, grid: Floats) -> LogRate:
    if not sums.column(name).any():
        return LogRate(np.full_like(grid, np.log(1e-300)), np.zeros_like(grid))
    return log_rate(sums.rates(name), grid)


def _sum_of_terms(terms: Sequence[Term], smooth: Callable[[Term], Curve], exposures: Exposures) -> Curve:
    rates = [(smooth(term), term.known) for term in terms]
    return lambda t: np.sum([rate(t) * known(exposures(t)) for rate, known in rates], axis=0)


def _unavailable(_: Floats) -> Floats:
    raise ValueError("target 'paper' needs g and v apart, which only estimator 'naive' gives")


MOMENT_ESTIMATORS: dict[str, Callable[[MomentSums, Exposures], MomentCurves]] = {
    "token_moments": token_moments,
    "naive": naive_moments,
}


def _rounded(logarithms: Floats) -> Floats:
    return np.round(logarithms / _LOG_STEP) * _LOG_STEP
