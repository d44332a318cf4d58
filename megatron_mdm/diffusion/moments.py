"""Second moments of the loss as functions of t, from losses that calibration or training has computed.

A *group* is one sample noised at one t: V rows of the model, whose mean loss is the sample's estimate. Rows are reduced
to a few sums (`group_moments`), and groups are added up in cells of t (`MomentSums`); curves.py reads curves off them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_mdm.diffusion.mask_schedule import Floats

_ROUNDING = 1e-9  # of a cell, far above that of t · N


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
    # Squares and products of the sums above: what is known of the noise of a ratio Σ a / Σ e is Σ (a − r e)².
    token_loss_square: Floats
    squares_square: Floats
    pairs_square: Floats
    cross_square: Floats
    token_gradients_square: Floats
    weight_loss_square: Floats
    weight_squares_square: Floats
    weight_pairs_square: Floats
    weight_cross_square: Floats
    token_loss_product: Floats
    squares_product: Floats
    pairs_product: Floats
    cross_product: Floats
    token_gradients_product: Floats


WEIGHT_OF = {
    "token_loss": "weight_loss",
    "squares": "weight_squares",
    "pairs": "weight_pairs",
    "cross": "weight_cross",
    "token_gradients": "weight_squares",
}


def group_moments(t: Floats, q: Floats, rows: RowSums) -> Floats:
    """Moments of groups, [n, len(Moments._fields)]. q [n]: the mask probability at t, which makes the sums' sizes alike
    over t."""
    views = rows.loss.shape[1]
    mean = rows.loss.mean(1)
    total = rows.loss.sum(1)
    weight = rows.weight.sum(1)
    square = q**2
    loss_square = np.square(rows.loss).sum(1)
    weight_square = np.square(rows.weight).sum(1)
    amounts = {
        "token_loss": total * q,
        "squares": rows.square.sum(1) * square,
        "pairs": np.maximum(loss_square - rows.square.sum(1), 0.0) * square,  # 0 but for rounding with one token
        "cross": np.maximum(total**2 - loss_square, 0.0) * square,
        "token_gradients": rows.gradient_square.sum(1) * square,
    }
    weights = {
        "weight_loss": weight * q,
        "weight_squares": rows.weight_square.sum(1) * square,
        "weight_pairs": np.maximum(weight_square - rows.weight_square.sum(1), 0.0) * square,
        "weight_cross": np.maximum(weight**2 - weight_square, 0.0) * square,
    }
    moments = Moments(
        one=np.ones_like(t),
        t=t,
        loss=mean,
        loss_square=mean**2,
        masking_variance=np.zeros_like(t),
        gradient_square=rows.gradient_square.sum(1) / views**2,
        **amounts,
        **weights,
        **{f"{name}_square": value**2 for name, value in (amounts | weights).items()},
        **{f"{name}_product": value * weights[WEIGHT_OF[name]] for name, value in amounts.items()},
    )
    return np.stack(moments, axis=1)


def column_of(moments: Floats, name: str) -> Floats:
    """The column [n] of this name of moments [n, …], of groups or of cells."""
    return moments[:, Moments._fields.index(name)]


def nested_masking_variance(moments: Floats, num_masks: int) -> Floats:
    """The moments of a design in which num_masks successive groups share sample and t, with the unbiased variance of
    their losses over the masks (v̂ of the paper, Section 4.1) entered."""
    variance = column_of(moments, "loss").reshape(-1, num_masks).var(1, ddof=1)
    moments = moments.copy()
    moments[:, Moments._fields.index("masking_variance")] = np.repeat(variance, num_masks)
    return moments


def cells_of(t: Floats, num_cells: int) -> NDArray[np.int64]:
    """The cell of N equal ones, (0, 1/N], (1/N, 2/N], …, that each t is in; j/N is in the j-th, though j/N · N may
    exceed j."""
    cell = np.ceil(t * num_cells - _ROUNDING).astype(np.int64) - 1
    return np.clip(cell, 0, num_cells - 1)


class Rates(NamedTuple):
    """Sums in cells of t whose ratio amounts/exposures is a rate, with what tells the noise of that ratio; [N] each."""

    t: Floats
    amounts: Floats  # Σ a over the cell's groups
    exposures: Floats  # Σ e, positive
    amount_squares: Floats  # Σ a²
    products: Floats  # Σ a e
    exposure_squares: Floats  # Σ e²


@dataclass(frozen=True)
class MomentSums:
    """Sums of groups' moments in N equal cells of t, (0, 1/N], (1/N, 2/N], …"""

    sums: Floats  # [N, len(Moments._fields)]

    @classmethod
    def of(cls, moments: Floats, num_cells: int) -> MomentSums:
        """moments [n, …] of groups."""
        cell = cells_of(column_of(moments, "t"), num_cells)
        return cls(np.stack([np.bincount(cell, column, num_cells) for column in moments.T], axis=1))

    def plus(self, other: MomentSums, memory: float = 1.0) -> MomentSums:
        """Other groups added; what was there before counts `memory` times."""
        return MomentSums(memory * self.sums + other.sums)

    def column(self, name: str) -> Floats:
        return column_of(self.sums, name)

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

    def rates(self, name: str) -> Rates:
        """A column over its weight, of the cells that have any of it."""
        weight = WEIGHT_OF[name]
        held = self.column(weight) > 0
        columns = (name, weight, f"{name}_square", f"{name}_product", f"{weight}_square")
        return Rates(self.centres[held], *(self.column(column)[held] for column in columns))
