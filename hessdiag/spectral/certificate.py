"""How far beyond the Ritz values an eigenvalue can lie: the Lanczos certificate, restarts included.

Every basis vector is a polynomial in H of the start v: qⱼ = φⱼ(H) v. For a unit eigenvector u of λ,
Bessel gives (u·v)² Σⱼ φⱼ(λ)² ≤ 1. With v uniform on the sphere, (u·v)² is Beta(1/2, (d−1)/2): it lies below
its ε-quantile δ² with probability ε. So with probability 1 − ε no eigenvalue lies where Σⱼ φⱼ(t)² > 1/δ²,
and beyond the outermost Ritz value that sum only grows.

After a thick restart the kept Ritz vectors obey φᵢ(t) (t − θᵢ) = σᵢ φ(t) with φ of the vector they couple
to, so the same sum can be carried through any number of restarts. The event (u·v)² < δ² is one and the
same for every step and cycle: looking often, and taking the best, costs no confidence.

After a breakdown (`hessdiag.spectral.lanczos`) H is block diagonal to what was dropped: T on the basis Q, and PHP
on its complement, where a fresh v is uniform on the sphere. Let u be an eigenvector of λ beyond every Ritz value,
and ωᵢ the length² of its part outside the first i stretches of the run (ω₀ = 1). Bessel for stretch i alone says
ωᵢ = ωᵢ₋₁ (1 − bᵢ Sᵢ(λ)) ≥ 0, with Sᵢ = Σⱼ φⱼ² of its own recurrence and bᵢ the square of vᵢ's component along
that part, divided by ωᵢ₋₁. Given all that came before, bᵢ is Beta(1/2, (dᵢ−1)/2) with dᵢ the dimension of the
complement, since vᵢ was drawn after u, H and Q were fixed. So every stretch by itself must have bᵢ ≤ 1/Sᵢ(λ), and
the uniform Uᵢ = F(bᵢ) are independent: Π Uᵢ ≤ Π F(1/Sᵢ(λ)), which for m stretches has a probability below ε as
soon as −Σ ln F(1/Sᵢ(λ)) passes the (1−ε)-quantile of a gamma distribution of shape m (Fisher 1932). With one
stretch that is the certificate above. Looks after other numbers of breakdowns are other events: of the probability
asked for the first has all but a thousandth, each further one half of what is left. What was dropped moves an
eigenvalue by no more than twice its norm, and belongs to the interval's margin.

Rounding makes the vectors obey the recurrences of H + E, with E known only after the vectors were drawn. To first
order that moves u·v by a sum of terms (u·fⱼ)/((λ − α₁) ⋯) in which the start does not appear; taken as independent
of it, such a shift makes no small value more likely (as in `hessdiag.spectral.warm`). That is an assumption on
rounding, tried in benchmarks/certificates.py; eigenvalues within the rounding itself are in the margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, gammainccinv

from hessdiag.results import Convergence
from hessdiag.spectral.krylov import Cycle
from hessdiag.spectral.lanczos import Lanczos
from hessdiag.spectral.measure import Measure

Array = NDArray[np.float64]

Side = Literal["max", "min"]

HUGE = 1e140  # past any 1/δ², and its square is still finite
EPS = float(np.finfo(np.float64).eps)
SPARED = 1e-3
"""Share of the failure probability kept for looks after a breakdown; it moves a bound without one by 5e-4 of its
distance."""


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
    size = max(abs(ritz), *(abs(a) for c in cycles for a in c.alphas), *(b for c in cycles for b in c.betas))
    if size == 0:
        return ritz
    stretches = _stretches(cycles, dimension)
    count = len(stretches)
    allowed = failure * (1 - SPARED if count == 1 else SPARED / 2 ** (count - 1))
    needed = float(gammainccinv(count, allowed))
    # Three refinements of 64 points bring the distance to 5e-4 of itself, rounded outwards.
    low, high = math.log(1e-15 * size), math.log(1e30 * size)
    for _ in range(3):
        grid = np.linspace(low, high, 64)
        reached = _surprise(stretches, ritz + sign * np.exp(grid), stretch) > needed
        if not reached[-1]:
            return sign * math.inf
        first = len(grid) - int(np.argmin(reached[::-1])) if not reached.all() else 0
        low, high = float(grid[max(first - 1, 0)]), float(grid[first])
    return ritz + sign * math.exp(high)


Stretch = tuple[int, list[Cycle]]  # dimension of the space its start was drawn from, and its cycles


def _stretches(cycles: Sequence[Cycle], dimension: int) -> list[Stretch]:
    """The run cut at its breakdowns; a stretch without a step says nothing and is left out."""
    found: list[Stretch] = [(dimension, [])]
    for cycle in cycles:
        if cycle.fresh:
            found.append((cycle.fresh, []))
        found[-1][1].append(cycle)
    return [(size, part) for size, part in found if any(cycle.alphas for cycle in part)]


def _surprise(stretches: Sequence[Stretch], t: Array, stretch: float) -> Array:
    """−Σ ln of the probability that each start leans as little towards an eigenvector of t as its run says."""
    total = np.zeros_like(t)
    for index, (dimension, cycles) in enumerate(stretches):
        lean = (1.0 if index else stretch) / _evidence(cycles, t)
        share = betainc(0.5, (dimension - 1) / 2, np.minimum(lean, 1.0))
        total -= np.log(np.maximum(share, 1e-300))
    return total


def _evidence(cycles: Sequence[Cycle], t: Array) -> Array:
    """The largest Σ φⱼ(t)² of any basis of a stretch."""
    best, current = np.ones_like(t), np.ones_like(t)
    for cycle in cycles:
        total: Array = current**2
        pull: Array | float = 0.0
        for theta, sigma in zip(cycle.thetas, cycle.sigmas, strict=True):
            gap = np.where(t == theta, 1e-300, t - theta)  # an earlier cycle's θ may be this one's, to rounding
            with np.errstate(over="ignore"):
                kept = np.clip(sigma * current / gap, -HUGE, HUGE)
            total, pull = total + kept**2, pull + sigma * kept
        before, beta_before = np.zeros_like(t), 0.0
        for alpha, beta in zip(cycle.alphas, cycle.betas, strict=True):
            left = beta or EPS * np.abs(t) + 1e-300  # a product of zero is zero to rounding
            after = ((t - alpha) * current - beta_before * before - pull) / left
            # np.clip takes as long as the rest of the step together
            before, current = current, np.minimum(np.maximum(after, -HUGE), HUGE)
            beta_before, pull = beta, 0.0
            total = total + current**2
        best = np.maximum(best, total)
    return best


@dataclass(frozen=True)
class Wanted:
    """How well a run is to know what.

    Attributes:
        rtol: lambda_max and the ``top`` values, relative; lambda_min relative to the spectral radius.
        rtol_min: of lambda_min, where it is another.
        top: how many of the largest values to settle.
        density: error of the density by depth (`hessdiag.spectral.measure`); None where it is not wanted.
        least: steps to take at least.
    """

    rtol: float = 1e-3
    rtol_min: float | None = None
    top: int = 1
    density: float | None = None
    least: int = 0


@dataclass
class Watch:
    """The certificates of a run as it grows, and the record of how they moved.

    Attributes:
        run: the run, started uniformly on the sphere.
        which: sides to certify.
        failure: probability, per side, of being wrong.
        stretch: of the start, see `certificate`.
        upper: no eigenvalue lies above; inf until first looked at.
        lower: no eigenvalue lies below; at least 0 where the operator is known to be positive semidefinite.
        depth: error of the density by depth at the last look; None where it was not looked at.
        history: (products, largest and smallest Ritz value, upper, lower) after each step.
    """

    run: Lanczos
    which: Sequence[Side]
    failure: float
    stretch: float = 1.0
    upper: float = math.inf
    lower: float = -math.inf
    depth: float | None = None
    history: list[tuple[int, float, float, float, float]] = field(default_factory=list)

    def look(self, *, certify: bool) -> None:
        """Note the Ritz values; every certificate stays true, so the tightest so far counts."""
        ritz, size = self.run.ritz_values(), self.run.op.size
        low, high = float(ritz[0]), float(ritz[-1])
        if self.run.op.semidefinite:
            low, self.lower = max(low, 0.0), max(self.lower, 0.0)
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

    def gaps(self, wanted: Wanted) -> dict[str, tuple[float, float]]:
        """How far what is wanted is known at the last look, and how far was asked."""
        run, rtol, top = self.run, wanted.rtol, wanted.top
        _, high, low, upper, lower = self.history[-1]
        radius = max(abs(high), abs(low))
        gaps: dict[str, tuple[float, float]] = {}
        if "max" in self.which:
            gaps["lambda_max"] = (upper - high, rtol * abs(high))
        if "min" in self.which:
            gaps["lambda_min"] = (low - lower, (wanted.rtol_min or rtol) * radius)
        if top > 1:
            _, vectors = np.linalg.eigh(run.T[: run.size, : run.size])
            gaps[f"top {top}"] = (float(run.beta * np.abs(vectors[-1, -top:]).max()), rtol * radius)
        if wanted.density is not None:
            cycle = run.cycles[0]
            begun_afresh = len(run.cycles) > 1
            if begun_afresh or run.exhausted:
                return gaps  # the start's measure is complete, or the run was restarted: no step tells more of it
            seen = Measure(np.array(cycle.alphas), np.array(cycle.betas), run.op.size, run.op.semidefinite)
            self.depth = seen.depth
            gaps["density"] = (self.depth, wanted.density)
        return gaps

    def convergence(self) -> Convergence:
        """The record, as columns."""
        steps, high, low, upper, lower = zip(*self.history, strict=True)
        return Convergence(steps=steps, ritz_max=high, ritz_min=low, certificate_max=upper, certificate_min=lower)
