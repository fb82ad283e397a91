"""What is said of eigenpairs: an interval for the eigenvalue of each rank, and where all others lie.

With Q the pairs found, R = HQ − QΘ, and no eigenvalue of PHP above μ (P = I − QQᵀ; by certificate), the i-th
largest eigenvalue of H obeys

    θᵢ ≤ λᵢ ≤ max(θᵢ, μ) + 2r² / (η + √(η² + 4r²)),    r = ‖R‖,  η = max(θᵢ − μ, 0):

from below by Cauchy's interlacing, from above by Weyl and, where a gap η is known, by Li and Li (2005, theorem 2).
The smallest ones likewise.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.operator import SymmetricOperator
from hessdiag.results import Provenance, RitzValue
from hessdiag.spectral.inner import norms
from hessdiag.spectral.subspace import Search, Subspace

TURNED = 0.1
"""A vector is known alone where sin of its angle to the eigenvector, at most residual / gap, is smaller."""


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """Eigenvalues with their vectors.

    Attributes:
        pairs: one `RitzValue` per eigenvalue, in the order asked for: value θ, [lo, hi] for the eigenvalue of that
            rank, ``residual`` ‖Hy − θy‖ of a fresh product, ``floor`` its rounding.
        vectors: (d, k) unit columns, in the operator's dtype: ``H @ vectors ≈ vectors * values``.
        clusters: ranks (from 0) of neighbours too close together for their vectors to be known one by one; the
            space that they span is.
        others: no other eigenvalue lies beyond: above ``others[1]``, below ``others[0]``; infinite on a side that
            was not looked at.
        confidence: that all intervals, and ``others``, hold.
        products: spent.
        warnings: what fell short, and what would mend it.
    """

    pairs: tuple[RitzValue, ...]
    vectors: Tensor
    clusters: tuple[tuple[int, ...], ...]
    others: tuple[float, float]
    confidence: float
    products: int
    warnings: tuple[str, ...]
    operator: SymmetricOperator

    @property
    def values(self) -> NDArray[np.float64]:
        """The eigenvalues, (k,)."""
        return np.array([pair.value for pair in self.pairs])

    def named(self, rank: int) -> dict[str, Tensor]:
        """The vector of one rank (from 0) by parameter name, in parameter shape."""
        return self.operator.named(self.vectors[:, rank])

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        """One line."""
        shown = ", ".join(f"{value:.4g}" for value in self.values[:5])
        more = ", ..." if len(self) > 5 else ""
        return f"<{len(self)} eigenpairs: {shown}{more}; {self.products} products>"


def ranked(found: Subspace, wanted: Search, provenance: Provenance, *, whole: bool, settled: bool) -> Eigenpairs:
    """Intervals by rank around the wanted values.

    Args:
        found: the pairs.
        wanted: what was asked for.
        provenance: of each of them.
        whole: whether every direction was multiplied: only rounding is left.
        settled: whether everything asked for is certified.
    """
    op, r = found.op, found.coupling()
    margin = op.floor * found.scale * math.sqrt(len(found.values) + 1)
    order, residuals = wanted.best(found.values), norms(found.residuals).cpu().numpy()
    confidence = 1.0 if whole else 1.0 - wanted.failure

    def pair(place: int) -> RitzValue:
        value = float(found.values[place])
        top = wanted.which == "LA" or (wanted.which == "LM" and value > 0)
        limit = found.upper if top else found.lower
        reach = _reach(value - limit if top else limit - value, r)
        lo, hi = (value - margin, value + reach + margin) if top else (value - reach - margin, value + margin)
        return RitzValue(
            quantity="eigenvalue",
            value=value,
            lo=lo,
            hi=hi,
            kind="ritz",
            confidence=confidence,
            provenance=provenance,
            residual=float(residuals[place]),
            floor=margin,
        )

    pairs = tuple(pair(int(place)) for place in order)
    others = _others(found, order, r + margin)
    clusters, open_end = _clusters(pairs, others, wanted)
    sides = len(wanted.ends())
    return Eigenpairs(
        pairs=pairs,
        vectors=found.vectors[torch.from_numpy(order.copy())].T,
        clusters=clusters,
        others=others,
        confidence=1.0 if whole else 1.0 - sides * wanted.failure,
        products=provenance.products,
        warnings=tuple(_warnings(pairs, settled, open_end, wanted)),
        operator=op,
    )


def _reach(gap: float, r: float) -> float:
    """How far beyond θ its eigenvalue can lie, if the complement ends a gap before θ (negative: beyond it)."""
    if r == 0 or gap == math.inf:
        return max(-gap, 0.0)
    apart = max(gap, 0.0)
    return max(-gap, 0.0) + 2 * r**2 / (apart + math.sqrt(apart**2 + 4 * r**2))


def _others(found: Subspace, order: NDArray[np.int64], margin: float) -> tuple[float, float]:
    """Between which values every other eigenvalue lies."""
    rest = np.delete(found.values, order)
    lower, upper = min([found.lower, *rest.tolist()]), max([found.upper, *rest.tolist()])
    if lower > upper:  # none is left
        return (math.nan, math.nan)
    return lower - margin, upper + margin


def _clusters(
    pairs: tuple[RitzValue, ...], others: tuple[float, float], wanted: Search
) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """Neighbours whose vectors mix, and whether the last of them goes on beyond the pairs."""

    def mixed(one: RitzValue, gap: float) -> bool:
        return TURNED * gap <= one.residual + one.floor

    order = sorted(range(len(pairs)), key=lambda rank: pairs[rank].value)
    groups: list[list[int]] = [[order[0]]]
    for before, rank in itertools.pairwise(order):
        gap = pairs[rank].value - pairs[before].value
        if mixed(pairs[rank], gap) or mixed(pairs[before], gap):
            groups[-1].append(rank)
        else:
            groups.append([rank])
    last = pairs[-1]
    top = wanted.which == "LA" or (wanted.which == "LM" and last.value > 0)
    gap = last.value - others[1] if top else others[0] - last.value
    return tuple(sorted(tuple(sorted(group)) for group in groups if len(group) > 1)), mixed(last, gap)


def _warnings(pairs: tuple[RitzValue, ...], settled: bool, open_end: bool, wanted: Search) -> list[str]:
    found = []
    if not settled:
        found.append(
            f"{len(pairs)} pairs are not certified to rtol={wanted.rtol:g} within {wanted.most} products: "
            "raise max_products, or rtol"
        )
    if open_end:
        found.append(
            f"eigenvalue {len(pairs)} may belong to a cluster that goes on beyond the {len(pairs)} asked for"
        )
    return found
