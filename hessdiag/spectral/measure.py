"""The eigenvalue density that a run has seen from its own start: no product beside those of the extremes.

The spectral measure of a start v gives the set of eigenvalues below t the weight Σ (v·uᵢ)². For v uniform on the
sphere that is a Beta variable with the share of these eigenvalues as its mean, and a standard deviation of at most
1/√(2d): 0.2% for 100,000 parameters. One start says as much as anyone needs, if it is followed far enough: what is
left unknown is depth, not chance. On four spectra one run of 80 products had a smaller error than 8 runs of 40.

Two things make it better than its Gauss rule. The average of the rule and Laurie's (1996) anti-Gauss rule, whose
error is the opposite one up to degree 2m + 1, halves the error; half their distance estimates it. And eigenvalues
that have converged outside the bulk are counted, 1/d each, instead of weighed by (v·u)², whose standard deviation
is 1.4 times its mean. Counting takes each for a simple one: where the start leans towards them more than it would
towards as many simple eigenvalues (`Measure.simple`), they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.special import betainc

from hessdiag.results import Quadrature, Spectrum
from hessdiag.results.chance import deviation
from hessdiag.results.quadrature import Rule, average, gauss, without
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.zone import unresolved

Array = NDArray[np.float64]

CONVERGED = 1e-2
"""Residual of a Ritz pair, of its distance to the next value, below which its eigenvector is known: to 1e-4 of its
weight."""
OUTSIDE = 3.0  # root mean squares of the rest: a semicircle ends at 2
FEWEST_NODES, UNKNOWN = 3, 2.0  # no two distributions of the same mean |λ| are further apart than twice that
EARLY = 18.0
"""In the first steps both rules err alike: half their distance covered 55% of runs of 10 to 24 steps on an MNIST
MLP. Taken 1 + (18/m)⁴ times it covers all of 4 to 60 steps on that, a digits MLP and a GPT, 16 starts each."""
SIMPLE = 1e-3  # chance at which simple eigenvalues are taken for multiple ones


@dataclass(frozen=True)
class Measure:
    """The Jacobi matrix of a start's spectral measure.

    Attributes:
        alphas: (m,) diagonal.
        betas: (m,) norms after each step; a last 0 where the measure is known completely.
        dimension: d.
        semidefinite: whether no eigenvalue is negative: nodes below zero are moved there.
    """

    alphas: Array
    betas: Array
    dimension: int
    semidefinite: bool = False

    @cached_property
    def _ritz(self) -> tuple[Array, Array, Array]:
        """Ritz values ascending, their weights, and their residuals."""
        if len(self.alphas) == 1:
            return self._possible(self.alphas), np.ones(1), self.betas[-1:]
        values, vectors = eigh_tridiagonal(self.alphas, self.betas[:-1])
        return self._possible(values), vectors[0] ** 2, self.betas[-1] * np.abs(vectors[-1])

    def _possible(self, values: Array) -> Array:
        """The values as eigenvalues can be."""
        return values.clip(min=0.0) if self.semidefinite else values

    @property
    def values(self) -> Array:
        """Ritz values, ascending, (m,)."""
        return self._ritz[0]

    @cached_property
    def converged(self) -> NDArray[np.bool_]:
        """Which Ritz values are eigenvalues away from the rest, (m,)."""
        values, weights, residuals = self._ritz
        if len(values) < FEWEST_NODES:
            return np.zeros(len(values), dtype=bool)
        steps = np.diff(values)
        gaps = np.minimum(np.append(steps, np.inf), np.append(np.inf, steps))
        sure = residuals <= CONVERGED * gaps
        # the bulk is what is left when all that stands out of it is gone: one pass at a time, largest first
        outside = np.zeros(len(values), dtype=bool)
        for _ in range(len(values)):
            rest = ~outside
            mean, width = _moments(values[rest], weights[rest])
            found = sure & rest & (np.abs(values - mean) > OUTSIDE * width)
            if not found.any() or rest.sum() <= 2:
                break
            outside |= found
        return outside

    @cached_property
    def counted(self) -> Array:
        """The eigenvalues that have converged away from the rest, ascending."""
        return self.values[self.converged]

    @property
    def simple(self) -> bool:
        """Whether the converged values can be simple: the start leans towards them no more than by chance."""
        _, weights, _ = self._ritz
        if self.complete and len(weights) < self.dimension:
            return False  # fewer values than eigenvalues
        leaning, d = weights[self.converged], self.dimension
        count = len(leaning)
        if not count or count >= d:
            return True
        # rounding finds further copies in the end, towards which the start leans by next to nothing
        least = 1 - (1 - float(betainc(0.5, (d - 1) / 2, leaning.min()))) ** count
        most = 1 - float(betainc(count / 2, (d - count) / 2, min(float(leaning.sum()), 1.0)))
        return min(least, most) >= SIMPLE

    def agrees(self, square: float, half: float) -> bool:
        """Whether the density's tr H² is that of probes, within ``half`` and three standard deviations of its own.

        Copies of values that were counted once are missing from it.
        """
        nodes, weights, _ = self.rest
        mean, width = _moments(np.square(nodes), weights)
        left = self.dimension - len(self.counted)
        own = float(np.square(self.counted).sum()) + left * mean
        return bool(abs(own - square) <= half + 3 * left * width * np.sqrt(2 / (left + 2)))

    @property
    def complete(self) -> bool:
        """Whether no further step would tell more."""
        return bool(self.betas[-1] == 0)

    @cached_property
    def _rules(self) -> tuple[Rule, Rule]:
        """The rest's Gauss rule of m − 1 nodes and its anti-Gauss rule of m, of mass 1; equal where exact."""
        values, weights, _ = self._ritz
        if self.complete or len(values) < FEWEST_NODES:
            rule = without((values, weights), self.counted)
            return rule, rule
        wider = self.betas[:-1].copy()
        wider[-1] *= np.sqrt(2)
        rules = gauss(self.alphas[:-1], self.betas[:-2]), gauss(self.alphas, wider)
        first, second = (without((self._possible(nodes), weights), self.counted) for nodes, weights in rules)
        return first, second

    @cached_property
    def rule(self) -> Rule:
        """Nodes, ascending, and weights of all eigenvalues, of mass 1."""
        nodes, weights, share = self.rest
        nodes = np.concatenate([nodes, self.counted])
        weights = np.concatenate([weights * share, self._ones])
        order = np.argsort(nodes)
        return nodes[order], weights[order]

    @cached_property
    def rest(self) -> tuple[Array, Array, float]:
        """Nodes and weights, of mass 1, of what is not counted one by one, and its share of all eigenvalues."""
        return (*average(*self._rules), 1 - len(self.counted) / self.dimension)

    @property
    def _ones(self) -> Array:
        """The weights of the eigenvalues that are counted."""
        return np.full(len(self.counted), 1 / self.dimension)

    @cached_property
    def error(self) -> float:
        """Area between the cumulative density and the true one, as a share of the mean |λ|: an estimate.

        What is left of depth, and two standard deviations of the Beta law for chance, which no step makes smaller.
        """
        x, first, second = self._stairs
        left = max(self.dimension - len(self.counted), 1)
        spread = deviation((first + second)[:-1] / 2, left)
        return self.depth + self.rest[2] * 2 * float((spread * np.diff(x)).sum()) / self._size

    @cached_property
    def depth(self) -> float:
        """The part of `error` that further steps make smaller: by the distance of the two rules (`EARLY`)."""
        m = len(self.alphas)
        if m < FEWEST_NODES and not self.complete:
            return UNKNOWN  # one rule cannot be held against itself
        x, first, second = self._stairs
        half = self.rest[2] * float((np.abs(first - second)[:-1] * np.diff(x)).sum()) / 2 / self._size
        return min((1 + (EARLY / m) ** 4) * half, UNKNOWN)

    @cached_property
    def _stairs(self) -> tuple[Array, Array, Array]:
        """All nodes of both rules, ascending, and the cumulative weights of each from there on."""
        x = np.unique(np.concatenate([nodes for nodes, _ in self._rules]))
        first, second = (
            np.append(0.0, np.cumsum(weights))[np.searchsorted(nodes, x, side="right")]
            for nodes, weights in self._rules
        )
        return x, first, second

    @property
    def _size(self) -> float:
        nodes, weights = self.rule
        return float(np.dot(np.abs(nodes), weights)) or 1.0

    def spectrum(self, resolution: float) -> Spectrum:
        """The density: counted eigenvalues as the known part, the rest as one probe.

        Args:
            resolution: rounding of a product, absolute.
        """
        nodes, weights, share = self.rest
        return Spectrum(
            known=Quadrature(nodes=tuple(self.counted.tolist()), weights=tuple(self._ones.tolist())),
            probes=(Quadrature(nodes=tuple(nodes.tolist()), weights=tuple((weights * share).tolist())),),
            dimension=self.dimension,
            steps=len(self.alphas),
            outliers=tuple(self.counted[::-1].tolist()),
            resolution=resolution,
            error=self.error,
            unresolved=unresolved([(self.alphas, self.betas, 1.0)], resolution, semidefinite=self.semidefinite),
            semidefinite=self.semidefinite,
        )


def measure_of(krylov: Krylov) -> Measure | None:
    """The measure of a run's start, which must have been uniform on the sphere; None after a restart.

    Where the start's own subspace was exhausted, the measure is complete; what fresh vectors added is left out.
    """
    if krylov.restarted or not krylov.alphas:
        return None
    betas = np.array(krylov.betas)
    if krylov.breakdowns or (krylov.exhausted and len(krylov.alphas) == krylov.size):
        betas[-1] = 0.0
    return Measure(np.array(krylov.alphas), betas, krylov.dimension, krylov.semidefinite)


def _moments(values: Array, weights: Array) -> tuple[float, float]:
    """Mean and standard deviation of a discrete measure."""
    total = float(weights.sum())
    if total <= 0:
        return 0.0, 0.0
    mean = float(np.dot(weights, values)) / total
    return mean, float(np.sqrt(max(np.dot(weights, (values - mean) ** 2) / total, 0.0)))
