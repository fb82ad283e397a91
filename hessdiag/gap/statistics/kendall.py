"""Kendall's tau-b between a measure and the generalization gap: interval, p-value, and what the readings allow.

    tau_b = sum_pairs sign(x_i − x_j) sign(y_i − y_j) / sqrt(untied pairs of x · untied pairs of y)

The interval is of Wilson's kind, [tau : (t − tau)² ≤ q² k (1 − tau²)], with k = Var(t) / (1 − t²), the variance
from the jackknife over checkpoints and q Student's quantile with n − 2 degrees of freedom. Two corrections keep it
honest where few checkpoints agree perfectly and the jackknife sees no spread: 1 − t² is taken at t (n − 1)/n, and
k is at least half the variance without association, 2(2n + 5)/9n(n − 1) (Kendall 1938), times the root of 1 − t².

Coverage of the 95% interval over 6,000 samples each (1,500 at n = 50), at n = 8, 12, 20, 50: normal copula,
tau = 0 to 0.98: 95.3 to 99.5%; Clayton's copula, tau = 0.5 and 0.8: 94.6 to 99.4%; Student's t with 3 degrees of
freedom: 95.5 to 96.4%; measures of 3 or 4 levels: 93.3 to 99.9%; of 2 levels, tau = 0: 93.2% (n = 8) to 95.5%.
Of the alternatives, Fisher's z with the jackknife covers 50 and 87% at n = 8, tau = 0.95 and 0.85, with variance
0.437/(n − 4) (Fieller, Hartley and Pearson 1957) 46 and 86%; the BCa bootstrap covers alike (97 to 99% of 150
samples, n = 8 to 20) and gives nothing where a resample is constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import kendalltau, norm, permutation_test

Array = NDArray[np.float64]

DRAWS = 2000  # of the readings: its 2.5% quantile is known to 0.35 points
PERMUTATIONS = 40_320  # all of 8 checkpoints, so the fewest that are allowed get the exact distribution
_AT_ONCE = 2_000_000  # signs of pairs held at a time, 16 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Association:
    """Kendall's tau-b with its interval over checkpoints.

    Attributes:
        tau: in [−1, 1]; positive: the larger the measure, the larger the gap.
        lo: end of the interval; it takes the checkpoints as independent draws of runs one might have trained.
        hi: other end.
        p: that tau is at least this far from 0, were measure and gap paired at random (two-sided).
        p_method: "exact", or "permutation" with the number of draws.
    """

    tau: float
    lo: float
    hi: float
    p: float
    p_method: str


def signs(values: Array) -> Array:
    """Sign of the difference over pairs i < j, shape (..., pairs) of (..., n)."""
    i, j = np.triu_indices(values.shape[-1], 1)
    return np.sign(values[..., i] - values[..., j])


def tau_b(x: Array, y: Array) -> Array:
    """Kendall's tau-b along the last axis, (..., n) with (..., n); NaN where one is constant."""
    one, two = signs(x), signs(y)
    untied = np.sqrt(np.abs(one).sum(-1) * np.abs(two).sum(-1))
    return np.asarray(np.divide((one * two).sum(-1), untied, out=np.full(untied.shape, np.nan), where=untied > 0))


def jackknife(x: Array, y: Array) -> tuple[float, float]:
    """Tau-b and its standard error over the n checkpoints; NaN where leaving one out makes x or y constant."""
    one, two = (np.sign(v[:, None] - v[None, :]) for v in (x, y))
    both, first, second = (matrix.sum(1) for matrix in (one * two, np.abs(one), np.abs(two)))
    untied = (first.sum() - 2 * first) * (second.sum() - 2 * second)
    n = len(x)
    if first.sum() * second.sum() == 0 or untied.min() <= 0:
        return math.nan, math.nan
    left = (both.sum() - 2 * both) / np.sqrt(untied)
    return float(tau_b(x, y)), math.sqrt((n - 1) / n * float(np.square(left - left.mean()).sum()))


def tau_interval(tau: float, stderr: float, n: int, confidence: float) -> tuple[float, float]:
    """Ends of the interval for tau-b of n checkpoints (module docstring: method and coverage)."""
    quantile = float(stdtrit(n - 2, (1 + confidence) / 2))
    room = 1 - (tau * (n - 1) / n) ** 2
    unassociated = 2 * (2 * n + 5) / (9 * n * (n - 1))
    c = quantile**2 * max(stderr**2 / room, unassociated / 2 * math.sqrt(room))
    half = math.sqrt(max(tau**2 - (1 + c) * (tau**2 - c), 0.0))
    # rounding may carry an end past tau itself at ±1
    return max(min((tau - half) / (1 + c), tau), -1.0), min(max((tau + half) / (1 + c), tau), 1.0)


def p_value(x: Array, y: Array, rng: np.random.Generator) -> tuple[float, str]:
    """Two-sided permutation p of tau-b, and how it was found.

    Without ties the permutation distribution is known exactly for any n; with ties it is enumerated for 8
    checkpoints and drawn beyond.

    Args:
        x: (n,) without NaN, not constant.
        y: likewise.
        rng: for the draws.
    """
    n = len(x)
    if len(np.unique(x)) == n == len(np.unique(y)):
        return float(kendalltau(x, y, method="exact").pvalue), "exact"
    fixed = signs(y)
    found = permutation_test(
        (x,),
        _concordance(fixed),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=PERMUTATIONS if n <= 8 else 9_999,
        batch=max(1, _AT_ONCE // len(fixed)),
        rng=rng,
    )
    exact = math.factorial(n) <= PERMUTATIONS
    return float(found.pvalue), "exact" if exact else "permutation, 9999 draws"


def _concordance(fixed: Array) -> Callable[..., Any]:
    # tau-b's denominator does not change when values are paired anew
    def statistic(values: Array, axis: int = -1) -> Array:
        return np.asarray(signs(np.moveaxis(values, axis, -1)) @ fixed)

    return statistic


def associate(x: Array, y: Array, confidence: float, rng: np.random.Generator) -> Association | None:
    """Tau-b with interval and p; None where x or y is constant, or is so without one checkpoint.

    Args:
        x: (n,) the measure, finite.
        y: (n,) the gap, finite.
        confidence: of the interval.
        rng: for permutations, where there are ties.
    """
    tau, stderr = jackknife(x, y)
    if math.isnan(tau):
        return None
    lo, hi = tau_interval(tau, stderr, len(x), confidence)
    p, how = p_value(x, y, rng)
    return Association(tau=tau, lo=lo, hi=hi, p=p, p_method=how)


def reread(
    values: Array, lo: Array, hi: Array, confidence: float, rng: np.random.Generator, draws: int = DRAWS
) -> Array:
    """Readings as they might have come out: (draws, n), each from a normal whose halves fit its interval."""
    z = rng.standard_normal((draws, len(values)))
    scale = np.where(z < 0, values - lo, hi - values) / norm.ppf((1 + confidence) / 2)
    return np.asarray(values + z * scale)


def tau_of(x: Array, y: Array) -> Array:
    """Tau-b per row of (draws, n), NaN dropped, in pieces that fit into memory."""
    pieces = max(1, math.ceil(x.shape[0] * x.shape[1] ** 2 / 2 / _AT_ONCE))
    parts = zip(np.array_split(x, pieces), np.array_split(y, pieces), strict=True)
    found = np.concatenate([tau_b(one, two) for one, two in parts])
    return np.asarray(found[np.isfinite(found)])
