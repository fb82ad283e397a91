"""tr f(H) from a density: log-determinants, Schatten norms, counts weighted by any function, with an interval.

tr f(H) = Σ over the known part + (d − k) E[uᵀf(H)u], and each start's rule gives uᵀf(H)u. Two things are unknown.
Chance: the spread of the starts, or the law of one start's weights where there is one only. Depth: how far a rule
of m nodes is from the start's own measure, estimated as the distance of the rules of m and m − 1 nodes, or half
that of the latter from Laurie's (1996) anti-Gauss rule, whose error is the opposite one, if that is larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import hessenberg

from hessdiag.errors import UsageError
from hessdiag.results.chance import deviation
from hessdiag.results.interval import mean_interval, quantile
from hessdiag.results.metrics import Estimate, Provenance, a_share
from hessdiag.results.quadrature import gauss

if TYPE_CHECKING:
    from hessdiag.results.spectrum import Spectrum

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

GRID = 257  # points between the ends where the function must be finite; and 0, where most poles are


def trace_of(spectrum: Spectrum, f: Function, confidence: float, within: tuple[float, float] | None) -> Estimate:
    """Tr f(H), see `hessdiag.results.Spectrum.apply`."""
    a_share(confidence, "confidence")
    f = _finite(f, spectrum, within)
    d = spectrum.dimension
    counted = round(d * math.fsum(spectrum.known.weights))
    left = d - counted
    known, known_depth = _known(spectrum, f, counted)
    rules = [(np.array(probe.nodes), np.array(probe.weights)) for probe in spectrum.probes if probe.nodes]
    values = np.array([known + d * float(weights @ f(nodes)) for nodes, weights in rules])
    depths = [_depth(nodes, weights, f, spectrum, left) for nodes, weights in rules]
    depth = known_depth + d * (math.fsum(depths) / len(depths) if depths else 0.0)
    exact = len(rules) in (0, left)
    value = float(values.mean()) if len(rules) else known
    if exact:
        stderr, lo, hi = 0.0, value, value
    elif len(rules) == 1:
        stderr = _law(*rules[0], f, left)
        half = quantile(confidence) * stderr
        lo, hi = value - half, value + half
    else:
        stderr, lo, hi = mean_interval(values, confidence)
    known_whole = exact and depth == 0
    return Estimate(
        quantity="trace of a function",
        value=value,
        lo=lo - depth,
        hi=hi + depth,
        kind="exact" if known_whole else "probes",
        confidence=1.0 if known_whole else confidence,
        provenance=Provenance(
            method="stochastic Lanczos quadrature",
            settings={"probes": len(rules), "steps": spectrum.steps},
        ),
        stderr=stderr,
        per_probe=() if exact else tuple(values.tolist()),
    )


def _finite(f: Function, spectrum: Spectrum, within: tuple[float, float] | None) -> Function:
    """The function in float64, refused where it is not finite between the ends of the spectrum.

    Raises:
        UsageError: with the place, and the way out.
    """
    nodes = np.array([node for node, _ in spectrum.merged()])
    lo, hi = nodes.min() - spectrum.resolution, nodes.max() + spectrum.resolution
    if within is not None:
        lo, hi = within  # rules of a run's own density may have a node just outside of the spectrum

    def applied(x: Array) -> Array:
        with np.errstate(all="ignore"):
            try:
                found = np.asarray(f(np.clip(np.asarray(x, dtype=np.float64), lo, hi)))
                real = np.broadcast_to(found, np.shape(x)).astype(np.float64, casting="same_kind")
            except (TypeError, ValueError) as error:
                msg = "f must take an array of eigenvalues and give as many real numbers, e.g. np.log"
                raise UsageError(msg) from error
        return real

    zero = [0.0] if lo < 0 < hi else []
    places = nodes if spectrum.whole else np.concatenate([np.linspace(lo, hi, GRID), nodes, zero])
    bad = places[~np.isfinite(applied(places))]
    if len(bad):
        worst = float(bad.min())
        msg = f"f is not finite at {worst:.4g}, within the spectrum's [{lo:.4g}, {hi:.4g}]: shift it, "
        raise UsageError(
            msg + f"f = lambda x: ...(x + c) with c > {max(-lo, 0.0):.4g}, or give within=(lambda_min, lambda_max)"
        )
    return applied


def _known(spectrum: Spectrum, f: Function, counted: int) -> tuple[float, float]:
    """The known part of tr f(H), and how far its depth may leave it from the truth."""
    nodes, weights = np.array(spectrum.known.nodes), np.array(spectrum.known.weights)
    if not len(nodes):
        return 0.0, 0.0
    value = spectrum.dimension * float(weights @ f(nodes))
    steps = len(nodes) - counted
    if steps <= 0:
        return value, 0.0
    return value, spectrum.dimension * _between_rules(nodes, weights, f, steps)


def _depth(nodes: Array, weights: Array, f: Function, spectrum: Spectrum, left: int) -> float:
    """How far a start's rule may be from its measure."""
    if spectrum.error is not None:
        return _of_average(nodes, weights, f)
    if len(nodes) < spectrum.steps or spectrum.steps >= left:
        return 0.0  # the run ended by itself: the rule is the measure
    return _between_rules(nodes, weights, f, len(nodes))


def _of_average(nodes: Array, weights: Array, f: Function) -> float:
    """Half the distance of the two rules that a run's own density is the mean of: their nodes alternate."""
    terms = weights * f(nodes)
    return abs(float(terms[::2].sum() - terms[1::2].sum()))


def _between_rules(nodes: Array, weights: Array, f: Function, steps: int) -> float:
    """Distances between the rules of ``steps`` nodes and fewer of a discrete measure."""
    total = float(weights.sum())
    if steps < 3:
        return total * float(np.ptp(f(nodes)))
    a, b = _jacobi(nodes, weights, steps)
    wider = b.copy()
    wider[-1] *= math.sqrt(2)
    rules = [gauss(a, b), gauss(a[:-1], b[:-1]), gauss(a, wider)]
    longest, shorter, opposite = (float(w @ f(x)) for x, w in rules)
    apart = abs(longest - shorter)
    if math.isfinite(opposite):  # its outer nodes can lie where f is not
        apart = max(apart, abs(opposite - shorter) / 2)
    return total * apart


def _jacobi(nodes: Array, weights: Array, steps: int) -> tuple[Array, Array]:
    """Diagonal (steps,) and off-diagonal of the Jacobi matrix of a discrete measure.

    By Householder reflections of the diagonal bordered with the roots of the weights, which keep the border.
    """
    size = len(nodes)
    bordered = np.zeros((size + 1, size + 1))
    bordered[0, 1:] = bordered[1:, 0] = np.sqrt(weights.clip(min=0) / weights.sum())
    bordered[range(1, size + 1), range(1, size + 1)] = nodes
    reduced = hessenberg(bordered)
    return np.diag(reduced)[1 : steps + 1].copy(), np.abs(np.diag(reduced, -1))[1:steps]


def _law(nodes: Array, weights: Array, f: Function, left: int) -> float:
    """Standard deviation of left · uᵀf(H)u for one start u, uniform on the sphere of that many dimensions."""
    share = weights / weights.sum()
    values = f(nodes)
    variance = float(share @ np.square(values - share @ values))
    return left * 2 * float(deviation(0.5, left)) * math.sqrt(variance)
