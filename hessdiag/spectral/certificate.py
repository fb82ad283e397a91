"""How far beyond the Ritz values an eigenvalue can lie: the Lanczos certificate, restarts included.

Every basis vector is a polynomial in H of the start v: qⱼ = φⱼ(H) v. For a unit eigenvector u of λ,
Bessel gives (u·v)² Σⱼ φⱼ(λ)² ≤ 1. With v uniform on the sphere, (u·v)² is Beta(1/2, (d−1)/2): it lies below
its ε-quantile δ² with probability ε. So with probability 1 − ε no eigenvalue lies where Σⱼ φⱼ(t)² > 1/δ²,
and beyond the outermost Ritz value that sum only grows.

After a thick restart the kept Ritz vectors obey φᵢ(t) (t − θᵢ) = σᵢ φ(t) with φ of the vector they couple
to, so the same sum can be carried through any number of restarts. The event (u·v)² < δ² is one and the
same for every step and cycle: looking often, and taking the best, costs no confidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from hessdiag.results import Convergence
from hessdiag.spectral.krylov import Cycle
from hessdiag.spectral.lanczos import Lanczos

Array = NDArray[np.float64]

Side = Literal["max", "min"]

HUGE = 1e140  # past any 1/δ², and its square is still finite


def certificate(
    cycles: Sequence[Cycle], ritz: float, sign: int, *, dimension: int, failure: float, stretch: float = 1.0
) -> float:
    """The value no eigenvalue exceeds, with probability ``1 - failure`` over the start vector.

    Args:
        cycles: the recurrences of a run whose start was uniform on the sphere.
        ritz: its outermost Ritz value on the side asked for.
        sign: +1 for an upper bound on lambda_max, −1 for a lower bound on lambda_min.
        dimension: d, at least 2.
        failure: probability of being wrong, in (0, 1).
        stretch: of the start, where it leans towards a known direction (`hessdiag.spectral.warm`).

    Returns:
        The bound, beyond ``ritz`` in the direction of ``sign``; far beyond while the run is short.
    """
    target = stretch / float(betaincinv(0.5, (dimension - 1) / 2, failure))
    size = max(abs(ritz), *(abs(a) for c in cycles for a in c.alphas), *(b for c in cycles for b in c.betas))
    if size == 0:
        return ritz
    # Three refinements of 64 points bring the distance to 5e-4 of itself, rounded outwards.
    low, high = math.log(1e-15 * size), math.log(1e30 * size)
    for _ in range(3):
        grid = np.linspace(low, high, 64)
        reached = _exceeds(cycles, ritz + sign * np.exp(grid), target)
        first = len(grid) - int(np.argmin(reached[::-1])) if not reached.all() else 0
        low, high = float(grid[max(first - 1, 0)]), float(grid[first])
    return ritz + sign * math.exp(high)


def _exceeds(cycles: Sequence[Cycle], t: Array, target: float) -> NDArray[np.bool_]:
    """Where Σ φⱼ(t)² of some basis of the run passes ``target``."""
    reached = np.zeros(t.shape, dtype=bool)
    current = np.ones_like(t)
    for cycle in cycles:
        total, pull = current**2, np.zeros_like(t)
        for theta, sigma in zip(cycle.thetas, cycle.sigmas, strict=True):
            gap = np.where(t == theta, 1e-300, t - theta)  # an earlier cycle's θ may be this one's, to rounding
            with np.errstate(over="ignore"):
                kept = np.clip(sigma * current / gap, -HUGE, HUGE)
            total, pull = total + kept**2, pull + sigma * kept
        before, beta_before = np.zeros_like(t), 0.0
        for alpha, beta in zip(cycle.alphas, cycle.betas, strict=True):
            reached |= total > target
            if beta == 0:
                break
            after = ((t - alpha) * current - beta_before * before - pull) / beta
            before, current = current, np.clip(after, -HUGE, HUGE)
            beta_before, pull = beta, np.zeros_like(t)
            total = total + current**2
        reached |= total > target
    return reached


@dataclass
class Watch:
    """The certificates of a run as it grows, and the record of how they moved.

    Attributes:
        run: the run, started uniformly on the sphere.
        which: sides to certify.
        failure: probability, per side, of being wrong.
        stretch: of the start, see `certificate`.
        upper: no eigenvalue lies above; inf until first looked at.
        lower: no eigenvalue lies below.
        history: (products, largest and smallest Ritz value, upper, lower) after each step.
    """

    run: Lanczos
    which: Sequence[Side]
    failure: float
    stretch: float = 1.0
    upper: float = math.inf
    lower: float = -math.inf
    history: list[tuple[int, float, float, float, float]] = field(default_factory=list)

    def look(self, *, certify: bool) -> None:
        """Note the Ritz values; every certificate stays true, so the tightest so far counts."""
        ritz, size = self.run.ritz_values(), self.run.op.size
        low, high = float(ritz[0]), float(ritz[-1])
        if self.run.exhausted:
            self.lower, self.upper = low, high
        elif certify:
            bound = partial(
                certificate, self.run.cycles, dimension=size, failure=self.failure, stretch=self.stretch
            )
            if "max" in self.which:
                self.upper = min(self.upper, bound(high, +1))
            if "min" in self.which:
                self.lower = max(self.lower, bound(low, -1))
        self.history.append((self.run.products, high, low, self.upper, self.lower))

    def gaps(self, rtol: float, top: int) -> dict[str, tuple[float, float]]:
        """How far what is wanted is known at the last look, and how far was asked: relative ``rtol``."""
        run = self.run
        _, high, low, upper, lower = self.history[-1]
        radius = max(abs(high), abs(low))
        gaps: dict[str, tuple[float, float]] = {}
        if "max" in self.which:
            gaps["lambda_max"] = (upper - high, rtol * abs(high))
        if "min" in self.which:
            gaps["lambda_min"] = (low - lower, rtol * radius)
        if top > 1:
            _, vectors = np.linalg.eigh(run.T[: run.size, : run.size])
            gaps[f"top {top}"] = (float(run.beta * np.abs(vectors[-1, -top:]).max()), rtol * radius)
        return gaps

    def convergence(self) -> Convergence:
        """The record, as columns."""
        steps, high, low, upper, lower = zip(*self.history, strict=True)
        return Convergence(steps=steps, ritz_max=high, ritz_min=low, certificate_max=upper, certificate_min=lower)
