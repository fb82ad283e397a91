"""The bulk of a spectrum and its outliers as numbers to draw on linear axes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hessdiag.present.axes import Array, bootstrap
from hessdiag.results import Quadrature, Spectrum

TAIL = 0.005  # of the bulk on either side that its panel leaves to the other one
ROOM = 3.0  # times the zone of unresolved signs that the panel shows at least
POINTS = 320
MOST_ROWS = 20  # outliers that have a row: as many labels as can be read
LEAST = 0.05  # of an eigenvalue: nodes that weigh less do not tell how far the bulk reaches


@dataclass(frozen=True, slots=True)
class Bulk:
    """What its panel draws.

    Attributes:
        eigenvalues: the grid, (points,), uniform.
        counts: eigenvalues per ``unit``, (points,); NaN where less than a tenth of one is, or nothing is resolved.
        band: of several probes, twice (points,); None for one start.
        sigma: width of the kernel, in eigenvalues.
        unit: the length that counts are of: a lone eigenvalue peaks near 1.
        beyond: eigenvalues of the bulk outside of the panel, about.
    """

    eigenvalues: Array
    counts: Array
    band: tuple[Array, Array] | None
    sigma: float
    unit: float
    beyond: float

    @property
    def floor(self) -> float:
        """A tenth of a lone eigenvalue's peak."""
        return 0.1 * self.unit / (self.sigma * math.sqrt(2 * math.pi))


def bulk_of(spectrum: Spectrum) -> Bulk:
    """The bulk smoothed on a linear grid."""
    parts = [_without(spectrum.known, spectrum.outliers), *spectrum.probes]
    nodes = bulk_nodes(spectrum)
    lo, hi = _window(spectrum)
    inside = sum(lo <= node <= hi for node in nodes)
    sigma = (hi - lo) / float(np.clip(inside, 24, 80))
    x = np.linspace(lo, hi, POINTS)
    unit = _round(sigma * math.sqrt(2 * math.pi))
    scale = spectrum.dimension * unit
    lines = scale * (_smooth(x, sigma, parts[0]) + np.stack([_smooth(x, sigma, probe) for probe in parts[1:]]))
    counts = lines.mean(axis=0)
    beyond = (x > max(nodes, default=hi)) | (x < min(nodes, default=lo)) if len(set(nodes)) > 1 else False
    out = sum(not lo <= one <= hi for one in spectrum.outliers)
    away = spectrum.dimension * (1 - spectrum.mass(lo, hi)) - out
    drawn = Bulk(x, counts, bootstrap(lines), sigma, unit, max(away, 0.0))
    untold = (np.abs(x) < spectrum.unresolved) | beyond  # the kernel spreads mass to where none is
    return replace(drawn, counts=np.where(untold | (counts < drawn.floor), np.nan, counts))


def _window(spectrum: Spectrum) -> tuple[float, float]:
    """Where all of the bulk is but its tails, and the zone of unresolved signs with room on either side."""
    pairs = [(n, w) for n, w in spectrum.merged() if n not in set(spectrum.outliers)] or [(0.0, 1.0)]
    nodes, weights = np.array(pairs).T
    shares = np.cumsum(weights) / weights.sum()
    lo = float(nodes[np.searchsorted(shares, TAIL)])
    hi = float(nodes[min(np.searchsorted(shares, 1 - TAIL), len(nodes) - 1)])
    zone = ROOM * spectrum.unresolved
    lo, hi = min(lo, -zone, 0.0), max(hi, zone, 0.0)
    if lo == hi:
        lo, hi = -1.0, 1.0
    margin = 0.04 * (hi - lo)
    return lo - margin, hi + margin


def chosen(values: tuple[float, ...]) -> tuple[list[float], int]:
    """The outliers that have a row, descending, the furthest out of too many; and how many have none."""
    kept = sorted(values, key=abs, reverse=True)[:MOST_ROWS]
    return sorted(kept, reverse=True), len(values) - len(kept)


def bulk_nodes(spectrum: Spectrum) -> list[float]:
    """Where the bulk is, ascending."""
    counted, least = set(spectrum.outliers), LEAST / spectrum.dimension
    return [node for node, weight in spectrum.merged() if node not in counted and weight >= least]


def _without(known: Quadrature, counted: tuple[float, ...]) -> Quadrature:
    kept = [pair for pair in zip(known.nodes, known.weights, strict=True) if pair[0] not in set(counted)]
    return Quadrature(nodes=tuple(n for n, _ in kept), weights=tuple(w for _, w in kept))


def _smooth(x: Array, sigma: float, rule: Quadrature) -> Array:
    """Density per unit of λ, (points,)."""
    distance = (x[:, None] - np.array(rule.nodes, dtype=np.float64)[None, :]) / sigma
    weights = np.array(rule.weights, dtype=np.float64)
    return np.asarray(np.exp(-0.5 * distance**2) @ weights / (sigma * math.sqrt(2 * math.pi)))


def _round(size: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return min((1, 2, 5, 10), key=lambda step: abs(math.log(size / (step * power)))) * power
