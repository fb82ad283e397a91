"""Trace, squared Frobenius norm and effective rank from the same probes, with intervals that cover.

All intervals are Hall's t (`hessdiag.results.interval`); the effective rank's is taken on tr H / ‖H‖_F, which
stays regular where the trace changes sign. Coverage is measured in ``tests/test_stderr_is_honest.py``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import UsageError
from hessdiag.former import formerly
from hessdiag.operator import SymmetricOperator, as_operator
from hessdiag.results import Estimate, Provenance, a_share, at_least
from hessdiag.results.interval import mean_interval
from hessdiag.spectral.deflation import Forms, forms_to
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.lanczos import lanczos

Array = NDArray[np.float64]


@formerly(probes="num_probes")
def trace(
    operator: Any,
    *,
    probes: int,
    seed: int = 0,
    deflate: int = 0,
    krylov: Krylov | None = None,
    confidence: float = 0.95,
    rtol: float | None = None,
) -> Estimate:
    """Estimate tr H, unbiased, with its interval.

    Args:
        operator: anything `as_operator` takes; H, d x d.
        probes: products to spend on probes, at least 2. Where they cover all directions the result is exact.
        seed: names the probes' stream.
        deflate: Lanczos steps to spend first, so that probes see only the bulk. On trained networks 10 to 20
            cut the error several times; without them the outliers also skew the distribution.
        krylov: a run to deflate with, instead of ``deflate``.
        confidence: of the interval.
        rtol: relative standard error that is enough: 8 of ``probes`` then say how many of the others it takes.

    Returns:
        Estimate; ``kind`` is "exact" where no direction was left to chance. Cost: probes + deflate, or
            less with ``rtol``.

    Raises:
        BudgetError: fewer than 2 probes: one has no standard error.
        UsageError: ``confidence`` or ``rtol`` outside (0, 1), or both ``deflate`` and ``krylov``.

    >>> import hessdiag, torch
    >>> A = torch.diag(torch.arange(100.0))
    >>> found = hessdiag.trace(A, probes=16)
    >>> found.lo <= 4950 <= found.hi
    True
    """
    if rtol is not None:
        a_share(rtol, "rtol", 0.01)
    return trace_from(_draw(operator, probes, seed, deflate, krylov, rtol), confidence=confidence)


@formerly(probes="num_probes")
def frobenius_squared(
    operator: Any,
    *,
    probes: int,
    seed: int = 0,
    deflate: int = 0,
    krylov: Krylov | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate tr H² = ‖H‖²_F, unbiased, with its interval; arguments as for `trace`.

    >>> import hessdiag, torch
    >>> round(hessdiag.frobenius_squared(torch.diag(torch.tensor([3.0, 2.0, -1.0])), probes=3).value, 3)
    14.0
    """
    return frobenius_squared_from(_draw(operator, probes, seed, deflate, krylov), confidence=confidence)


@formerly(probes="num_probes")
def effective_rank(
    operator: Any,
    *,
    probes: int,
    seed: int = 0,
    deflate: int = 0,
    krylov: Krylov | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate (tr H)² / tr H², how many directions share the trace; arguments as for `trace`.

    >>> import hessdiag, torch
    >>> round(hessdiag.effective_rank(torch.eye(7), probes=7).value, 3)
    7.0
    """
    return effective_rank_from(_draw(operator, probes, seed, deflate, krylov), confidence=confidence)


def trace_from(values: Forms, *, confidence: float = 0.95) -> Estimate:
    """Tr H from forms already drawn. Raises as `trace`."""
    mean = float(values.trace.mean())
    stderr, lo, hi = _interval(values.trace, values, confidence)
    # what is random adds up like ‖H‖_F, what single precision does to the loss itself like the trace
    rounding = values.floor * (math.sqrt(max(float(values.squares.mean()), 0.0)) + abs(mean))
    return _estimate("trace", values, mean, lo - rounding, hi + rounding, stderr, values.trace, confidence)


def frobenius_squared_from(values: Forms, *, confidence: float = 0.95) -> Estimate:
    """Tr H² from forms already drawn. Raises as `trace`."""
    mean = float(values.squares.mean())
    stderr, lo, hi = _interval(values.squares, values, confidence)
    rounding = 2 * values.floor * mean
    lo = max(lo - rounding, min(values.known_squares - rounding, mean))
    return _estimate("frobenius_squared", values, mean, lo, hi + rounding, stderr, values.squares, confidence)


def effective_rank_from(values: Forms, *, confidence: float = 0.95) -> Estimate:
    """(tr H)² / tr H² from forms already drawn. Raises as `trace`; 0 for the zero matrix."""
    t1, t2 = float(values.trace.mean()), float(values.squares.mean())
    if t2 <= 0:
        return _estimate("effective_rank", values, 0.0, 0.0, 0.0, 0.0, np.zeros(0), confidence)
    root = t1 / math.sqrt(t2)
    # Linearized: what each probe says of tr H / ‖H‖_F.
    influence = root + (values.trace - t1) / math.sqrt(t2) - root / 2 * (values.squares - t2) / t2
    spread, lo, hi = _interval(influence, values, confidence)
    rounding = values.floor * (1 + abs(root))
    lo, hi = lo - rounding, hi + rounding
    smallest = 0.0 if lo <= 0 <= hi else min(lo**2, hi**2)
    largest = max(min(max(lo**2, hi**2), float(values.dimension)), root**2)
    per_probe = root**2 + 2 * root * (influence - root)
    stderr = 2 * abs(root) * spread
    return _estimate("effective_rank", values, root**2, smallest, largest, stderr, per_probe, confidence)


def _interval(samples: Array, values: Forms, confidence: float) -> tuple[float, float, float]:
    """Standard error and interval; an exact value has neither error nor width."""
    if values.exact:
        return 0.0, float(samples.mean()), float(samples.mean())
    return mean_interval(samples, confidence)


def _estimate(
    quantity: str,
    values: Forms,
    value: float,
    lo: float,
    hi: float,
    stderr: float,
    per_probe: Array,
    confidence: float,
) -> Estimate:
    settings = {"probes": len(values.trace), "deflated": values.known, "seed": values.seed}
    return Estimate(
        quantity=quantity,
        value=value,
        lo=lo,
        hi=hi,
        kind="exact" if values.exact else "probes",
        confidence=1.0 if values.exact else confidence,
        provenance=Provenance(
            method=values.method,
            settings={} if values.exact else settings,
            products=values.products,
            dtype=values.dtype,
        ),
        stderr=stderr,
        per_probe=() if values.exact else tuple(per_probe.tolist()),
    )


def _draw(
    operator: Any, probes: int, seed: int, deflate: int, krylov: Krylov | None, rtol: float | None = None
) -> Forms:
    op: SymmetricOperator = as_operator(operator)
    if deflate and krylov is not None:
        msg = f"deflate={deflate} and a run were given: one of them, the run is used as it is"
        raise UsageError(msg)
    if deflate:
        krylov = lanczos(op, steps=deflate, seed=seed)
    left = op.size - (krylov.size if krylov is not None else 0)
    at_least(probes, min(2, left), "probes", "a standard error")
    return forms_to(op, krylov, probes, seed, rtol)


def ws_derivatives(
    t1: float, t2: float, size: int, *, mean: float, spread: float, rounding: float
) -> tuple[float, float, float]:
    """A bound, ``mean`` · m + ``spread`` · s, and its derivatives by T₁ = tr H and T₂ = tr H².

    With d the size, m = T₁/d and s² = T₂/d − m². An s² below ``rounding`` · T₂/d is none: s has its minimum there,
    and only m moves.
    """
    m, variance = t1 / size, t2 / size - (t1 / size) ** 2
    s = math.sqrt(variance) if variance > rounding * t2 / size else 0.0
    by_t1, by_t2 = (-t1 / (size**2 * s), 1 / (2 * size * s)) if s else (0.0, 0.0)
    return mean * m + spread * s, mean / size + spread * by_t1, spread * by_t2
