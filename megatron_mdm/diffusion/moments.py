"""Second moments of the loss as functions of t, from losses that calibration or training has computed.

A *group* is one sample noised at one t: V rows of the model, whose mean loss is the sample's estimate. Rows are reduced
to a few sums (`group_moments`), groups are added up in cells of t (`MomentSums`), and curves are read off the cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_mdm.diffusion.exposure import Exposures
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.diffusion.smoothing import log_linear_rate

# Curves are rounded far below their statistical error: losses differ between layouts in the last bits, and a fit of
# seven parameters would enlarge that until t itself differed.
SIGNIFICANT_DIGITS = 4
_LEAST_SPREAD = 1e-4  # of a loss's mean square over its squared mean
_LEAST_EXPOSURE = 1e-3  # of the mean over t: a sample of one token has no pairs


class RowSums(NamedTuple):
    """Per row, [n, V]: sums over its masked tokens, with w the token's weight in the sample's estimate, c its loss."""

    loss: Floats  # Σ w c
    square: Floats  # Σ w² c²
    gradient_square: Floats  # Σ w² ‖∂c/∂h‖², h the hidden state that the vocabulary projection reads
    weight: Floats  # Σ w
    weight_square: Floats  # Σ w²


class Moments(NamedTuple):
    """A group's contributions; each field [n]. Fields named weight_* are what the others are divided by."""

    one: Floats
    t: Floats
    loss: Floats  # the mean over the rows, l
    loss_square: Floats  # l²
    masking_variance: Floats  # filled by the nested design alone
    gradient_square: Floats  # of the mean over the rows
    token_loss: Floats
    weight_loss: Floats
    squares: Floats
    weight_squares: Floats
    pairs: Floats
    weight_pairs: Floats
    cross: Floats
    weight_cross: Floats
    token_gradients: Floats
    # Squares of the five sums above that are smoothed: (Σ x)²/Σ x² says how many groups stand behind Σ x.
    token_loss_events: Floats
    squares_events: Floats
    pairs_events: Floats
    cross_events: Floats
    token_gradients_events: Floats


def group_moments(t: Floats, q: Floats, rows: RowSums) -> Floats:
    """[n, len(Moments._fields)]. q [n]: the mask probability at t, which makes the sums' sizes alike over t."""
    views = rows.loss.shape[1]
    mean = rows.loss.mean(1)
    total, weight = rows.loss.sum(1), rows.weight.sum(1)
    square, loss_square = q**2, np.square(rows.loss).sum(1)
    weight_square = np.square(rows.weight).sum(1)
    smoothed = {
        "token_loss": total * q,
        "squares": rows.square.sum(1) * square,
        "pairs": np.maximum(loss_square - rows.square.sum(1), 0.0) * square,  # 0 but for rounding with one token
        "cross": np.maximum(total**2 - loss_square, 0.0) * square,
        "token_gradients": rows.gradient_square.sum(1) * square,
    }
    moments = Moments(
        one=np.ones_like(t),
        t=t,
        loss=mean,
        loss_square=mean**2,
        masking_variance=np.zeros_like(t),
        gradient_square=rows.gradient_square.sum(1) / views**2,
        weight_loss=weight * q,
        weight_squares=rows.weight_square.sum(1) * square,
        weight_pairs=(weight_square - rows.weight_square.sum(1)) * square,
        weight_cross=(weight**2 - weight_square) * square,
        **smoothed,
        **{f"{name}_events": value**2 for name, value in smoothed.items()},
    )
    return np.stack(moments, axis=1)


def nested_masking_variance(moments: Floats, num_masks: int) -> Floats:
    """The moments of a design in which num_masks successive groups share sample and t, with the unbiased variance of
    their losses over the masks (v̂ of the paper, Section 4.1) entered."""
    column = Moments._fields.index("loss")
    variance = moments[:, column].reshape(-1, num_masks).var(1, ddof=1)
    moments = moments.copy()
    moments[:, Moments._fields.index("masking_variance")] = np.repeat(variance, num_masks)
    return moments


Curve = Callable[[Floats], Floats]


@dataclass(frozen=True)
class MomentSums:
    """Sums of groups' moments in N equal cells of t, (0, 1/N], (1/N, 2/N], …"""

    sums: Floats  # [N, len(Moments._fields)]

    @classmethod
    def of(cls, moments: Floats, num_cells: int, multiplicity: Floats | None = None) -> MomentSums:
        """moments [n, …]; multiplicity [n]: how often each group counts (a bootstrap's resample), once if not given."""
        t = moments[:, Moments._fields.index("t")]
        cell = np.clip(np.ceil(t * num_cells).astype(np.int64) - 1, 0, num_cells - 1)
        weighted = moments if multiplicity is None else moments * multiplicity[:, None]
        return cls(np.stack([np.bincount(cell, column, num_cells) for column in weighted.T], axis=1))

    def plus(self, other: MomentSums, memory: float = 1.0) -> MomentSums:
        """Other groups added; what was there before counts `memory` times."""
        return MomentSums(memory * self.sums + other.sums)

    def column(self, name: str) -> Floats:
        return self.sums[:, Moments._fields.index(name)]

    @property
    def centres(self) -> Floats:
        """Mean t of each cell's groups; the middle of a cell without any."""
        number = self.column("one")
        middle = (np.arange(len(number)) + 0.5) / len(number)
        return np.where(number > 0, self.column("t") / np.maximum(number, 1e-300), middle)

    @property
    def num_groups(self) -> float:
        return float(self.column("one").sum())

    def mean(self, name: str) -> tuple[Floats, Floats]:
        """(t, mean of a column) of the cells that hold groups."""
        held = self.column("one") > 0
        return self.centres[held], self.column(name)[held] / self.column("one")[held]

    def smooth_ratio(self, name: str, weight: str, t: Floats, shape: Curve) -> Floats:
        """A smooth, positive curve through column/weight, t [T] → [T]; the fewer the losses, the closer to `shape`."""
        amounts = self.column(name)
        num_events = amounts.sum() ** 2 / self.column(f"{name}_events").sum()
        return _rounded(log_linear_rate(self.centres, amounts, self.column(weight), num_events, t, shape))


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
        rounded = _rounded(values)
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
    known exactly (exposure.py), so the same formula serves every masking rule, MIRROR, repeated masks and ISAD. Where
    losses are too few to tell, each term is taken to be the same at all t: then uniform t is the optimum, and a
    calibration that knows little does little.
    """
    grid = np.linspace(0.0, 1.0, len(sums.sums) + 1)

    def smooth(name: str, weight: str, exposure: str) -> Curve:
        def shape(t: Floats) -> Floats:
            expected = getattr(exposures(t), exposure)
            return 1.0 / np.maximum(expected, _LEAST_EXPOSURE * expected.mean())

        if not sums.column(name).any():
            return np.zeros_like
        values = sums.smooth_ratio(name, weight, grid, shape)
        return lambda t: np.interp(t, grid, values)

    token_loss = smooth("token_loss", "weight_loss", "total")
    squares, pairs = smooth("squares", "weight_squares", "squares"), smooth("pairs", "weight_pairs", "pairs")
    cross, gradients = smooth("cross", "weight_cross", "cross"), smooth("token_gradients", "weight_squares", "squares")

    def second_moment(t: Floats) -> Floats:
        known = exposures(t)
        own = squares(t) * known.squares + pairs(t) * known.pairs
        total = own / known.views + cross(t) * known.cross / known.views**2
        # Three curves fitted apart may contradict a fourth, but no square's mean is below the mean's square.
        return np.maximum(total, (1.0 + _LEAST_SPREAD) * np.square(token_loss(t) * known.total))

    def gradient(t: Floats) -> Floats:
        known = exposures(t)
        return gradients(t) * known.squares / known.views

    return MomentCurves(lambda t: token_loss(t) * exposures(t).total, second_moment, _unavailable, gradient)


def _unavailable(_: Floats) -> Floats:
    raise ValueError("target 'paper' needs g and v apart, which only estimator 'naive' gives")


MOMENT_ESTIMATORS: dict[str, Callable[[MomentSums, Exposures], MomentCurves]] = {
    "token_moments": token_moments,
    "naive": naive_moments,
}


def _rounded(values: Floats) -> Floats:
    exponent = np.floor(np.log10(np.maximum(np.abs(values), 1e-300)))
    scale = 10.0 ** (SIGNIFICANT_DIGITS - 1 - exponent)
    return np.round(values * scale) / scale
