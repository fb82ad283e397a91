"""Bounds on the extreme eigenvalues from traces alone (Wolkowicz and Styan 1980), and tighter ones.

With m = T₁/d and s² = T₂/d − m², where Tⱼ = tr Hʲ:

    m + s/√(d−1) ≤ λ_max ≤ m + s√(d−1)        m − s√(d−1) ≤ λ_min ≤ m − s/√(d−1)        λ_max − λ_min ≤ s√(2d)

The upper bound tends to ‖H‖_F, so on trained networks it is √(stable rank) = 1.1 to 2.2 times λ_max; the
inner and lower ones are nearly empty there. A bound whose traces were estimated is not a guarantee:
``exact_inputs`` says which it is, and [lo, hi] is what the traces' own intervals allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import UsageError
from hessdiag.results import Bound, Estimate, Provenance
from hessdiag.results.interval import mean_interval

Number = Estimate | float
Side = Literal["upper", "lower"]
EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, kw_only=True)
class WS:
    """The Wolkowicz-Styan bounds.

    Attributes:
        upper: λ_max ≤ this.
        lower: λ_min ≥ this.
        inner_max: λ_max ≥ this.
        inner_min: λ_min ≤ this.
        spread: λ_max − λ_min ≤ this.
    """

    upper: Bound
    lower: Bound
    inner_max: Bound
    inner_min: Bound
    spread: Bound


def wolkowicz_styan(
    trace: Number,
    frobenius_squared: Number,
    dimension: int,
    *,
    confidence: float = 0.95,
    lambda_max: float | None = None,
    lambda_min: float | None = None,
) -> WS:
    """The bounds from tr H and tr H².

    Estimates from the same probes (equally many values in ``per_probe``) are used jointly, with their covariance;
    estimates from different probes as independent ones. The bias of s² and of its root is taken out.

    Args:
        trace: tr H, a number where it is exact.
        frobenius_squared: tr H².
        dimension: d, or any upper bound on the rank of H: the bounds hold for it too, and are tighter.
        confidence: of the intervals of bounds with estimated inputs.
        lambda_max: measured value, for the bounds' looseness.
        lambda_min: likewise.

    Raises:
        UsageError: ``dimension`` < 1 or a negative tr H².

    >>> import hessdiag
    >>> hessdiag.wolkowicz_styan(4.0, 14.0, 3).upper  # the eigenvalues are 3, 2 and -1
    <Bound ws_upper = 3.73703 [3.73703, 3.73704], bound>
    """
    inputs = _Inputs.of(trace, frobenius_squared, dimension)
    d = dimension
    outer, inner = math.sqrt(d - 1), 1 / math.sqrt(d - 1) if d > 1 else 0.0

    def make(quantity: str, of: str, side: Side, mean: float, spread: float, measured: float | None) -> Bound:
        return inputs.bound(quantity, of, side, mean, spread, confidence, measured)

    return WS(
        upper=make("ws_upper", "lambda_max", "upper", 1.0, outer, lambda_max),
        lower=make("ws_lower", "lambda_min", "lower", 1.0, -outer, lambda_min),
        inner_max=make("ws_inner_max", "lambda_max", "lower", 1.0, inner, lambda_max),
        inner_min=make("ws_inner_min", "lambda_min", "upper", 1.0, -inner, lambda_min),
        spread=make(
            "ws_spread", "lambda_max - lambda_min", "upper", 0.0, math.sqrt(2 * d) if d > 1 else 0.0, None
        ),
    )


def bound(
    quantity: str,
    of: str,
    side: Side,
    interval: tuple[float, float, float],
    inputs: tuple[Number, ...],
    measured: float | None,
    confidence: float | None = None,
) -> Bound:
    """A `Bound` with the provenance of its inputs; ``interval`` is (lo, value, hi)."""
    estimates = [x for x in inputs if isinstance(x, Estimate)]
    exact = all(x.kind == "exact" for x in estimates)
    believed = min((x.confidence for x in estimates), default=1.0) if confidence is None else confidence
    longest = max(estimates, key=lambda x: x.provenance.products, default=None)
    lo, value, hi = interval
    return Bound(
        quantity=quantity,
        value=value,
        lo=min(lo, value),
        hi=max(hi, value),
        kind="bound",
        confidence=1.0 if exact else believed,
        provenance=longest.provenance if longest else Provenance(method="given traces"),
        of=of,
        side=side,
        exact_inputs=exact,
        looseness=value / measured if measured else None,
    )


def ends(number: Number) -> tuple[float, float, float]:
    """(lo, value, hi) of an input; a plain number is exact to rounding."""
    if isinstance(number, Estimate):
        return number.lo, number.value, number.hi
    value = float(number)
    return value - 4 * EPS * abs(value), value, value + 4 * EPS * abs(value)


@dataclass(frozen=True)
class _Inputs:
    """tr H and tr H² with what is random about them: paired samples, or two independent means."""

    trace: Number
    square: Number
    dimension: int
    samples: tuple[NDArray[np.float64], NDArray[np.float64]]  # deviations of joint per-probe values, (n,) or (0,)

    @classmethod
    def of(cls, trace: Number, square: Number, dimension: int) -> _Inputs:
        if dimension < 1 or ends(square)[2] < 0:
            msg = f"dimension={dimension}, tr H² up to {ends(square)[2]:.3g}: it needs d ≥ 1 and tr H² ≥ 0"
            raise UsageError(msg)
        first, second = _deviations(trace), _deviations(square)
        if len(first) != len(second):
            first, second = _independent(first, second)
        return cls(trace, square, dimension, (first, second))

    def bound(
        self,
        quantity: str,
        of: str,
        side: Side,
        mean: float,
        spread: float,
        confidence: float,
        measured: float | None,
    ) -> Bound:
        """The bound ``mean · m + spread · s`` with its interval."""
        d, (t1, t2) = self.dimension, (ends(self.trace)[1], ends(self.square)[1])
        v1, v2 = self.samples
        n = len(v1)
        variance = max(t2 / d - (t1**2 - _overstated(v1)) / d**2, 0.0)
        s = math.sqrt(variance)
        centre, reach = mean * t1 / d, spread * s
        slack = self._rounding()
        low_s, high_s = math.sqrt(max(variance - slack, 0.0)), math.sqrt(variance + slack)
        shift = abs(mean) * self._half(self.trace) / d
        down = min(spread * low_s, spread * high_s) - reach - shift
        up = max(spread * low_s, spread * high_s) - reach + shift
        value = centre + reach
        influence = np.zeros(0)
        if n > 1 and variance > 0:
            slope = v2 / d - 2 * t1 * v1 / d**2  # what each probe says of s²
            value += spread * _short_root(variance, float(slope.std(ddof=1)) / math.sqrt(n))
            influence = mean * v1 / d + spread * slope / (2 * s)
            _, lo, hi = mean_interval(influence, confidence)
            down, up = down + lo, up + hi
        interval = (value + down, value, value + up)
        found = bound(quantity, of, side, interval, (self.trace, self.square), measured, confidence)
        return replace(found, per_probe=tuple((value + influence).tolist()))

    def _rounding(self) -> float:
        """How far rounding of the inputs can move s²."""
        t1, t2, d = ends(self.trace)[1], ends(self.square)[1], self.dimension
        inherited = self._half(self.square) / d + 2 * abs(t1) * self._half(self.trace) / d**2
        return inherited + 4 * EPS * t2 / d

    @staticmethod
    def _half(number: Number) -> float:
        """Half the interval of an exact input; a random one is dealt with by its samples."""
        if isinstance(number, Estimate) and number.kind != "exact":
            return 0.0
        low, value, high = ends(number)
        return max(high - value, value - low)


def _overstated(deviations: NDArray[np.float64]) -> float:
    """What E[T̂₁²] = T₁² + Var(T̂₁) has too much; left in, a bound from three probes is 3 to 6% too low."""
    n = len(deviations)
    return float(deviations.var(ddof=1)) / n if n > 1 else 0.0


def _short_root(x: float, error: float) -> float:
    """How far E[√x̂] falls short of √x, Var(x̂)/(8 x^{3/2}); no more than half a standard error is believed."""
    return min(error**2 / (8 * x * math.sqrt(x)), error / (4 * math.sqrt(x)))


def _deviations(number: Number) -> NDArray[np.float64]:
    if not isinstance(number, Estimate) or number.kind == "exact":
        return np.zeros(0)
    samples: NDArray[np.float64] = np.asarray(number.per_probe, dtype=np.float64)
    if len(samples) < 2:
        msg = f"{number.quantity} has no per-probe values to take its error from: measure it with 2 probes or more"
        raise UsageError(msg)
    deviations: NDArray[np.float64] = samples - samples.mean()
    return deviations


def _independent(
    first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One exact: the other's deviations alone. Both random, of unlike number: the longer cut to the shorter.

    Cut deviations are rescaled so that the mean's variance stays that of all samples.
    """
    n = min(len(first), len(second))
    if n == 0:
        n = max(len(first), len(second))
        return (first if len(first) else np.zeros(n)), (second if len(second) else np.zeros(n))
    return _cut(first, n), _cut(second, n)


def _cut(deviations: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    part: NDArray[np.float64] = deviations[:n] - deviations[:n].mean()
    spread = float(part.std(ddof=1))
    wanted = float(deviations.std(ddof=1)) * math.sqrt(n / len(deviations))
    return part * (wanted / spread) if spread > 0 else part
