"""Estimates of a completion's log-likelihood: constants c, n, d of the objective, by `rl.estimator` and ratio level.

With ℓ[k, i] = log p(y_i | row k) at the masked scored tokens of K rows, a value is v = Σ c ℓ, of a token or of a
completion; the objective is Σ n (min(ρ A, clip(ρ) A) − β KL), ρ = exp((v − v_old)/d). All constants are known before
any forward pass. rl/README.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_mdm.config.schema import RlConfig
from megatron_mdm.config.sections.rl import MASKED
from megatron_mdm.diffusion.mask_schedule import Floats
from megatron_mdm.rl.noise import Rows


class Totals(NamedTuple):
    """Of the completions of an optimizer step that count: those with advantage 0 do, truncated ones do unless
    mask_truncated_completions."""

    num_completions: int  # N
    num_tokens: int  # Σ P


class Coefficients(NamedTuple):
    """Of a completion."""

    c: Floats  # [K, P]: 0 where a row does not score a token
    n: Floats  # [P], 0 where no row scores a token; at sequence level [1]
    d: float  # 1, or P
    parts: int  # K': independent rows or pairs
    of_sequence: bool  # values are of K' parts, not of P tokens


def values(coefficients: Coefficients, log_probs: Floats) -> Floats:
    """log_probs [K, P], 0 where unscored → values [P] of tokens or, at sequence level, [K'] of independent rows or
    pairs, whose sum is the completion's."""
    terms = coefficients.c * log_probs
    return terms.reshape(coefficients.parts, -1).sum(1) if coefficients.of_sequence else terms.sum(0)


def coefficients(rl: RlConfig, rows: Rows, totals: Totals) -> Coefficients:
    """The constants of a completion with these rows."""
    return ESTIMATORS[rl.estimator, rl.importance_sampling_level](rl, rows, totals)


def _one_step(rl: RlConfig, rows: Rows, totals: Totals) -> Coefficients:
    """diffu-GRPO: each token's mean over rows with the completion masked and the prompt masked in part."""
    c = rows.scored / len(rows.scored)
    return Coefficients(c, NORMALIZERS[rl.normalization](rows, totals), 1.0, rows.parts, False)


def _masked_tokens(rl: RlConfig, rows: Rows, totals: Totals) -> Coefficients:
    """UniGRPO, and its average over views (A.9): each token's mean over the rows that mask it.

    With normalize elbo the mean is weighted by the rows' 1/(p q), which differ between complementary rows.
    """
    share = rows.scored.astype(np.float64)
    if rl.normalization == "elbo":
        share *= _inverse(rows.q)[:, None]
    c = share / np.maximum(share.sum(0), np.finfo(np.float64).tiny)
    return Coefficients(c, NORMALIZERS[rl.normalization](rows, totals), 1.0, rows.parts, False)


def _coupled(rl: RlConfig, rows: Rows, totals: Totals) -> Coefficients:
    """coupled-GRPO: each token in the one of two complementary rows that masks it, weighted 1 or 1/q of that row; with
    a full pass the mean of that and the token's value where everything is masked."""
    weight = _inverse(rows.q) if rl.pair_weight == "rate" else np.ones(len(rows.q))
    weight = weight / rows.parts
    if rl.full_pass:
        weight[-1] = 1.0
        weight *= 0.5
    c = rows.scored * weight[:, None]
    return Coefficients(c, NORMALIZERS[rl.normalization](rows, totals), 1.0, rows.parts, False)


def _elbo(rl: RlConfig, rows: Rows, totals: Totals) -> Coefficients:
    """ESPO: the bound of the completion's log-likelihood; its ratio and divergence are per token (d = P)."""
    c = rows.scored * (rows.weight * _inverse(rows.q) / len(rows.q))[:, None]
    return Coefficients(c, np.array([1.0 / totals.num_completions]), float(rows.scored.shape[1]), rows.parts, True)


def _masked_sequence(rl: RlConfig, rows: Rows, totals: Totals) -> Coefficients:
    """UniGRPO's eq. 4: the mean of the masked tokens' log-probabilities, with one ratio a completion."""
    count, length = rows.scored.sum(1), rows.scored.shape[1]
    size = {MASKED: count, "length": np.full_like(count, length), "elbo": length * rows.q}[rl.normalization]
    c = rows.scored * (rows.weight * _inverse(size) / len(rows.q))[:, None]
    return Coefficients(c, np.array([1.0 / totals.num_completions]), 1.0, rows.parts, True)


Estimator = Callable[[RlConfig, Rows, Totals], Coefficients]
ESTIMATORS: dict[tuple[str, str], Estimator] = {
    ("one_step", "token"): _one_step,
    (MASKED, "token"): _masked_tokens,
    ("coupled", "token"): _coupled,
    ("elbo", "sequence"): _elbo,
    (MASKED, "sequence"): _masked_sequence,
}


def _by_length(rows: Rows, totals: Totals) -> Floats:
    return _scored(rows) * rows.weight[0] / (totals.num_completions * rows.scored.shape[1])


def _by_tokens(rows: Rows, totals: Totals) -> Floats:
    return _scored(rows) * rows.weight[0] / totals.num_tokens


def _by_masked(rows: Rows, totals: Totals) -> Floats:
    scored = _scored(rows)
    return scored * rows.weight[0] / (totals.num_completions * max(scored.sum(), 1.0))


def _by_rate(rows: Rows, totals: Totals) -> Floats:
    shares = rows.scored * (rows.weight * _inverse(rows.q))[:, None]
    return shares.sum(0) / (totals.num_completions * rows.scored.size)


Normalizer = Callable[[Rows, Totals], Floats]
NORMALIZERS: dict[str, Normalizer] = {  # by rl.normalize: n [P] at token level, 1/p(t) included
    "length": _by_length,
    "tokens": _by_tokens,
    MASKED: _by_masked,
    "elbo": _by_rate,
}


def _scored(rows: Rows) -> Floats:
    """[P]: 1 where any row scores a token."""
    return np.minimum(rows.scored.sum(0), 1.0)


def _inverse(values: Floats) -> Floats:
    """1/x, and 0 for the 0 of an empty row."""
    return np.divide(1.0, values, out=np.zeros(len(values)), where=values > 0)
