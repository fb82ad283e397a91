"""Bounds that are tighter than Wolkowicz-Styan, for a few products or moments more."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from hessdiag.errors import UsageError
from hessdiag.results import Bound
from hessdiag.spectral.bounds import Number, bound, ends, wolkowicz_styan
from hessdiag.spectral.krylov import Krylov

Array = NDArray[np.float64]


def frobenius_bound(frobenius_squared: Number, *, lambda_max: float | None = None) -> Bound:
    """‖H‖_F ≥ λ_max; never tighter than Wolkowicz-Styan, and free of d."""
    low, value, high = (math.sqrt(max(x, 0.0)) for x in ends(frobenius_squared))
    return bound("frobenius", "lambda_max", "upper", (low, value, high), (frobenius_squared,), lambda_max)


def deflated_ws(
    krylov: Krylov,
    trace: Number,
    frobenius_squared: Number,
    dimension: int,
    *,
    lambda_max: float | None = None,
    lambda_min: float | None = None,
) -> tuple[Bound, Bound]:
    """Wolkowicz-Styan on what a run has not explored, put back as the corner of a bordered T.

    For x = Qa + bu with u a unit vector of the complement, xᵀHx = aᵀTa + 2bβaₖ(q·u) + b² uᵀHu, and
    uᵀHu is at most the upper WS bound of the complement: tr' = tr H − tr T, tr²' = tr H² − ‖T‖² − 2β². With
    exact traces it is a guarantee, up to rounding: 10 steps bound λ_max of trained networks within 7e-6.

    Args:
        krylov: a run of k < d steps.
        trace: tr H.
        frobenius_squared: tr H².
        dimension: d.
        lambda_max: measured value, for the looseness.
        lambda_min: likewise.

    Returns:
        (upper bound on λ_max, lower bound on λ_min). For estimated traces the outer end of [lo, hi] takes the
        traces at the ends of their intervals.
    """
    inputs = (trace, frobenius_squared)
    low1, value1, high1 = ends(trace)
    squares = ends(frobenius_squared)
    upper = [
        _corner_bound(krylov, t, t2, dimension, +1)
        for t, t2 in zip(((low1, high1), (value1, value1), (low1, high1)), squares, strict=True)
    ]
    lower = [
        _corner_bound(krylov, t, t2, dimension, -1)
        for t, t2 in zip(((low1, high1), (value1, value1), (low1, high1)), squares, strict=True)
    ]
    rounding = 64 * float(np.finfo(np.float64).eps) * krylov.scale
    return (
        bound(
            "deflated_ws_upper",
            "lambda_max",
            "upper",
            (upper[0] - rounding, upper[1], upper[2] + rounding),
            inputs,
            lambda_max,
        ),
        bound(
            "deflated_ws_lower",
            "lambda_min",
            "lower",
            (lower[2] - rounding, lower[1], lower[0] + rounding),
            inputs,
            lambda_min,
        ),
    )


def _corner_bound(krylov: Krylov, traces: tuple[float, float], square: float, dimension: int, sign: int) -> float:
    """Outermost eigenvalue of T bordered by β and the complement's WS bound, worst over the traces' interval."""
    k = krylov.size
    if k == dimension:
        return float(krylov.ritz_values[-1 if sign > 0 else 0])
    left = dimension - k
    known = float(np.trace(krylov.T))
    rest = max(square - float(np.square(krylov.T).sum()) - 2 * krylov.beta**2, 0.0)
    low, high = sorted((sign * (traces[0] - known), sign * (traces[1] - known)))
    # As a function of tr' the bound is concave with its maximum ‖·‖_F at tr' = ‖·‖_F.
    worst = min(max(math.sqrt(rest), low), high)
    mean = worst / left
    corner = mean + math.sqrt(max(rest / left - mean**2, 0.0) * (left - 1))
    bordered = np.zeros((k + 1, k + 1))
    bordered[:k, :k] = krylov.T
    bordered[k, k - 1] = bordered[k - 1, k] = krylov.beta
    bordered[k, k] = sign * corner
    values = np.linalg.eigvalsh(bordered)
    return float(values[-1 if sign > 0 else 0])


def blockwise_ws(
    traces: Sequence[float],
    squares: Sequence[Sequence[float]],
    sizes: Sequence[int],
    *,
    lambda_max: float | None = None,
    lambda_min: float | None = None,
) -> tuple[Bound, Bound]:
    """Wolkowicz-Styan layer by layer, put together by the norms of the blocks between the layers.

    With N_ij = ‖H_ij‖_F and the layer's own upper bound on the diagonal, xᵀHx ≤ Σ N_ij ‖xᵢ‖‖xⱼ‖, so λ_max(H) ≤
    λ_max(N) ≤ ‖H‖_F. A guarantee for exact traces; 0 to 10% tighter than plain Wolkowicz-Styan with two layers.

    Args:
        traces: tr H_ii of every layer.
        squares: ‖H_ij‖_F², a symmetric table.
        sizes: parameters of every layer.
        lambda_max: measured value, for the looseness.
        lambda_min: likewise.

    Returns:
        (upper bound on λ_max, lower bound on λ_min).

    Raises:
        UsageError: as of `wolkowicz_styan`, or tables of different lengths.
    """
    table = np.array(squares, dtype=np.float64)
    if not len(sizes) == len(traces) == len(table) or table.shape != (len(sizes), len(sizes)):
        msg = f"{len(traces)} traces, {len(sizes)} sizes, norms {table.shape}: one layer each and pair are needed"
        raise UsageError(msg)
    norms = np.sqrt(table.clip(min=0.0))
    ends_of = [wolkowicz_styan(t, table[i, i], n) for i, (t, n) in enumerate(zip(traces, sizes, strict=True))]
    values = []
    for diagonal in ([ws.upper.hi for ws in ends_of], [-ws.lower.lo for ws in ends_of]):
        block = norms.copy()
        np.fill_diagonal(block, diagonal)
        values.append(float(np.linalg.eigvalsh(block)[-1]))
    inputs = tuple(traces)
    return (
        bound("blockwise_ws_upper", "lambda_max", "upper", ends(values[0]), inputs, lambda_max),
        bound("blockwise_ws_lower", "lambda_min", "lower", ends(-values[1]), inputs, lambda_min),
    )


def moment_lower(t2: float, t3: float, *, lambda_max: float | None = None) -> Bound:
    """T₃/T₂ ≤ λ_max, the mean of the eigenvalues weighted by their squares; 69 to 84% of λ_max when trained.

    Raises:
        UsageError: T₂ is not positive: H is zero.
    """
    if not t2 > 0:
        msg = f"tr H² = {t2}: T₃/T₂ needs a matrix that is not zero"
        raise UsageError(msg)
    lo, value, hi = ends(t3 / t2)
    return bound("t3_over_t2", "lambda_max", "lower", (lo, value, hi), (t3, t2), lambda_max)


def christoffel(
    moments: Sequence[float], *, lambda_max: float | None = None, lambda_min: float | None = None
) -> tuple[Bound, Bound]:
    """Wolkowicz-Styan of higher order, from exact moments T₀ = d, T₁, ..., T₂ₖ.

    For every polynomial p of degree ≤ k, p(λ_max)² ≤ Σ p(λᵢ)². The best p gives Σⱼ pⱼ(λ)² ≤ 1 at every
    eigenvalue, with pⱼ orthonormal for the spectrum's counting measure; k = 1 is Wolkowicz-Styan, and every
    order is at least as tight as the one before. Where the moments leave no room for order k (too few distinct
    eigenvalues for the arithmetic), the largest order there is room for is used.

    Args:
        moments: T₀ to T₂ₖ, an odd number of them, at least 3.
        lambda_max: measured value, for the looseness.
        lambda_min: likewise.

    Returns:
        (upper bound on λ_max, lower bound on λ_min).

    Raises:
        UsageError: not an odd number of moments of a matrix that is not zero.
    """
    if len(moments) < 3 or len(moments) % 2 == 0 or not (moments[0] >= 1 and moments[2] > 0):
        msg = f"{len(moments)} moments: T0 to T2k of a matrix that is not zero are needed, for example 3 of them"
        raise UsageError(msg)
    norm = math.sqrt(moments[2])
    scaled = np.array([t / norm**j for j, t in enumerate(moments)], dtype=np.float64)
    upper, lower = norm * _root(scaled, +1), norm * _root(scaled, -1)
    inputs = tuple(moments)
    return (
        bound("christoffel_upper", "lambda_max", "upper", ends(upper), inputs, lambda_max),
        bound("christoffel_lower", "lambda_min", "lower", ends(lower), inputs, lambda_min),
    )


def _root(moments: Array, sign: int) -> float:
    """Where Σ pⱼ(x)² passes 1 outside the zeros of pₖ, on the side of ``sign``; moments of H/‖H‖_F."""
    moments = moments * float(sign) ** np.arange(len(moments))
    order = (len(moments) - 1) // 2
    alphas, betas = _jacobi(moments, order)
    order = len(alphas)
    if order == 0:
        return sign * float(moments[1] / moments[0])
    largest = float(np.linalg.eigvalsh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))[-1])

    def excess(x: float) -> float:
        total = value = 1 / math.sqrt(moments[0])
        total, before = value**2, 0.0
        for j in range(order):
            link = betas[j - 1] * before if j else 0.0
            before, value = value, ((x - alphas[j]) * value - link) / betas[j]
            total += value**2
        return total - 1

    if excess(largest) >= 0:  # a single eigenvalue of weight one, met to rounding
        return sign * largest
    # Σλ² = 1 after scaling, so no eigenvalue lies beyond 1; the root may, by rounding.
    return sign * float(brentq(excess, largest, 4.0, xtol=1e-15, rtol=1e-14))


def _jacobi(moments: Array, order: int) -> tuple[Array, Array]:
    """Recurrence coefficients from moments by Cholesky of the Hankel matrix (Golub and Welsch 1969)."""
    for k in range(order, 0, -1):
        hankel = moments[np.add.outer(np.arange(k + 1), np.arange(k + 1))]
        diagonal = 1 / np.sqrt(np.diag(hankel))
        scaled = hankel * np.outer(diagonal, diagonal)
        # Below this the smallest pivot is rounding, and the bound would be too.
        if float(np.linalg.eigvalsh(scaled)[0]) < 1e-11:
            continue
        r = np.linalg.cholesky(scaled).T / diagonal
        ratios = [r[j, j + 1] / r[j, j] for j in range(k)]
        alphas = np.array([b - a for a, b in zip([0.0, *ratios], ratios, strict=False)])
        betas = np.array([r[j + 1, j + 1] / r[j, j] for j in range(k)])
        return alphas, betas
    return np.zeros(0), np.zeros(0)
