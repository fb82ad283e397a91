"""The eigenvalue density as raw quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hessdiag.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from hessdiag.results.metrics import Estimate


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Quadrature:
    """A discrete measure: Gauss quadrature nodes and weights, weights ≥ 0."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]

    def __repr__(self) -> str:
        """How many nodes, and what they weigh."""
        return f"<Quadrature of {len(self.nodes)} nodes, weight {math.fsum(self.weights):.4g}>"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Spectrum:
    """The eigenvalue density as raw quadrature: the result. Smoothing is for pictures only.

    The density is ``known`` (the subspace the sweep has explored, weights summing to its share of the
    dimension) plus the mean of ``probes`` (each summing to the rest). All weights together sum to 1.

    Attributes:
        known: eigenvalues counted one by one, or the run's subspace.
        probes: one rule per start.
        dimension: d.
        steps: Lanczos steps of each start.
        outliers: converged Ritz values outside the bulk, descending.
        resolution: rounding of a product: no number of steps tells a smaller |λ| from zero.
        error: estimated area between the cumulative density and the true one, as a share of the mean |λ|; null
            unless the density is that of the run's own start.
        unresolved: an |λ| from which on signs are known (the shares below −x and above x to 5% of all eigenvalues
            each). Nodes nearer to zero may lie on either side of it: counts of eigenvalues beyond a threshold
            nearer than that say nothing. 0: every sign is known, down to ``resolution``.
        semidefinite: whether no eigenvalue is negative, by structure: ``unresolved`` then hides what is positive.

    >>> import hessdiag, torch
    >>> density = hessdiag.spectrum(torch.diag(torch.tensor([3.0, 2.0, -1.0])), probes=3, steps=3)
    >>> isinstance(density, hessdiag.Spectrum), round(density.mass(hi=0.0), 3)
    (True, 0.333)
    """

    known: Quadrature
    probes: tuple[Quadrature, ...]
    dimension: int
    steps: int
    outliers: tuple[float, ...] = ()
    resolution: float = 0.0
    error: float | None = None
    unresolved: float = 0.0
    semidefinite: bool = False

    def __repr__(self) -> str:
        """Size, starts and range."""
        nodes = self.merged()
        starts = "every eigenvalue" if self.whole else f"{len(self.probes)} start(s) of {self.steps} steps"
        return f"<Spectrum of {self.dimension:,} eigenvalues in [{nodes[0][0]:.4g}, {nodes[-1][0]:.4g}], {starts}>"

    @property
    def whole(self) -> bool:
        """Whether every eigenvalue is known."""
        return not any(probe.nodes for probe in self.probes)

    def per_probe_mass(self, lo: float, hi: float) -> tuple[float, ...]:
        """Share of eigenvalues in [lo, hi], one value per probe, from raw nodes and weights."""
        known = _mass(self.known, lo, hi)
        return tuple(known + _mass(probe, lo, hi) for probe in self.probes)

    def mass(self, lo: float = -math.inf, hi: float = math.inf) -> float:
        """Share of eigenvalues in [lo, hi], mean over probes, from raw nodes and weights.

        An end nearer to zero than ``unresolved`` says nothing of the eigenvalues: nodes there are on either side.
        """
        shares = self.per_probe_mass(lo, hi)
        return math.fsum(shares) / len(shares)

    def quantile(self, q: float) -> float:
        """The eigenvalue below which a share ``q`` of the spectrum lies (raw quadrature, no interpolation).

        Raises:
            UsageError: ``q`` outside [0, 1].
        """
        if not 0 <= q <= 1:
            msg = f"quantile {q}: it must be 0 to 1"
            raise UsageError(msg)
        below = 0.0
        nodes = self.merged()
        for node, weight in nodes:
            below += weight
            if below >= q - 1e-12:
                return node
        return nodes[-1][0]

    def apply(
        self,
        f: Callable[[NDArray[np.float64]], NDArray[np.float64]],
        *,
        confidence: float = 0.95,
        within: tuple[float, float] | None = None,
    ) -> Estimate:
        """Tr f(H) = Σ f(λᵢ), with an interval for chance and depth; no product.

        Log-determinants: ``apply(lambda x: np.log(x + damping))``. Schatten norms, to the power p:
        ``apply(lambda x: abs(x) ** p)``.

        Args:
            f: of an array of eigenvalues, gives an array of real numbers. Rough functions (steps, poles just
                outside of the spectrum) need more ``steps``.
            confidence: of the interval.
            within: ends of the spectrum, where they are known (`hessdiag.extremes`): f is looked at between them,
                and nodes outside count as the end. By default between the outermost nodes.

        Returns:
            Estimate; ``kind`` is "exact" where every eigenvalue is known.

        Raises:
            UsageError: f is not finite somewhere between the ends of the spectrum, or is no such function.

        Example:
            >>> import hessdiag, numpy as np
            >>> density = hessdiag.spectrum(np.diag([1.0, 2.0, 4.0]), probes=3, steps=3)
            >>> round(density.apply(np.log2).value, 6)
            3.0
        """
        from hessdiag.results.functions import trace_of  # who reads a run needs no SciPy

        return trace_of(self, f, confidence, within)

    def merged(self) -> list[tuple[float, float]]:
        """All (node, weight) pairs, ascending, probes averaged: the empirical spectral measure."""
        share = 1 / len(self.probes)
        pairs = list(zip(self.known.nodes, self.known.weights, strict=True))
        for probe in self.probes:
            pairs += [(n, w * share) for n, w in zip(probe.nodes, probe.weights, strict=True)]
        return sorted(pairs)

    def to_frame(self) -> pd.DataFrame:
        """Columns probe (−1: the known part), node, weight."""
        import pandas as pd

        rows = [(-1, n, w) for n, w in zip(self.known.nodes, self.known.weights, strict=True)]
        for i, probe in enumerate(self.probes):
            rows += [(i, n, w) for n, w in zip(probe.nodes, probe.weights, strict=True)]
        return pd.DataFrame(rows, columns=["probe", "node", "weight"])


def _mass(quadrature: Quadrature, lo: float, hi: float) -> float:
    pairs = zip(quadrature.nodes, quadrature.weights, strict=True)
    return math.fsum(weight for node, weight in pairs if lo <= node <= hi)
