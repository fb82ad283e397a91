"""Features as a shift moves them: standardized, or whitened principal components; and nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessdiag.errors import BudgetError, UsageError
from hessdiag.generalization.shift.results import Array

CONSTANT = 1e-10  # relative variance below which a direction of the training data is taken as constant
BLOCK = 2**24  # distances held at a time: 128 MiB


@dataclass(frozen=True)
class Features:
    """z = (x − mean) @ map: mean 0 and variance 1 of each column on the training inputs.

    Attributes:
        mean: (d,).
        map: (d, k).
        kind: "standardized" or "principal components".
        dropped: constant features.
    """

    mean: Array
    map: Array
    kind: str
    dropped: int

    def __call__(self, x: Array) -> Array:
        """Features of inputs (n, d), (n, k).

        Raises:
            UsageError: they have another number of features than the training inputs.
        """
        if x.shape[1] != len(self.mean):
            msg = f"inputs have {x.shape[1]} features, the reference {len(self.mean)}: give inputs of one kind"
            raise UsageError(msg)
        z: Array = (x - self.mean) @ self.map
        return z

    @classmethod
    def of(cls, x: Array, components: int | None = None, exclude: Sequence[int] = ()) -> Features:
        """Learnt from training inputs (m, d).

        Args:
            x: the inputs.
            components: number of leading principal components; None: each feature by itself.
            exclude: features to leave alone.

        Raises:
            UsageError: no such feature or number of components, or all features are constant.
            BudgetError: fewer than two inputs, or for components than twice their number.
        """
        size, width = x.shape
        if size < 2 or (components is not None and size < 2 * components):
            needed = max(2, 2 * (components or 1))
            msg = f"reference of {size} inputs: features need at least {needed}, {needed - size} more"
            raise BudgetError(msg)
        if any(not 0 <= feature < width for feature in exclude):
            msg = f"exclude={tuple(exclude)}: features are 0 to {width - 1}"
            raise UsageError(msg)
        mean, variance = x.mean(0), x.var(0)
        varying = variance > CONSTANT * variance.max()
        dropped = int((~varying).sum())
        varying[list(exclude)] = False
        kept = np.flatnonzero(varying)
        if not len(kept) or (components is not None and not 1 <= components <= len(kept)):
            msg = f"components={components}: {len(kept)} features vary in the reference; allowed are 1 to that"
            raise UsageError(msg)
        chosen = np.zeros((width, len(kept)))
        chosen[kept, np.arange(len(kept))] = 1.0
        if components is None:
            return cls(mean, chosen / np.sqrt(variance[kept]), "standardized", dropped)
        spread, axes = np.linalg.eigh(np.cov(x[:, kept].T, bias=True).reshape(len(kept), -1))
        spread, axes = spread[::-1][:components], axes[:, ::-1][:, :components]
        if spread[-1] <= CONSTANT * spread[0]:
            rank = int((spread > CONSTANT * spread[0]).sum())
            msg = f"components={components}: the reference varies in {rank} directions only; allowed are 1 to that"
            raise UsageError(msg)
        return cls(mean, chosen @ (axes / np.sqrt(spread)), "principal components", dropped)


def nearest(x: Array, reference: Array, measure: str) -> Array:
    """Distance of each row of (n, d) to the nearest row of (m, d): (n,).

    Args:
        x: inputs.
        reference: what distances are taken to.
        measure: "euclidean", or "cosine" for 1 − the largest similarity, 0 to 2.

    Raises:
        UsageError: no such measure, different numbers of features, or a zero vector, which has no direction.
    """
    if measure not in ("euclidean", "cosine"):
        msg = f"measure={measure!r}: allowed are euclidean, cosine"
        raise UsageError(msg)
    if x.shape[1] != reference.shape[1]:
        msg = f"inputs have {x.shape[1]} features, the reference {reference.shape[1]}: give inputs of one kind"
        raise UsageError(msg)
    if measure == "cosine":
        lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in (x, reference)]
        if min(length.min() for length in lengths) == 0:
            msg = "measure='cosine': an example is all zeros and has no direction; take euclidean"
            raise UsageError(msg)
        x, reference = x / lengths[0], reference / lengths[1]
    rows = max(1, BLOCK // len(reference))
    closest = [_closest(x[start : start + rows], reference) for start in range(0, len(x), rows)]
    distance: Array = np.linalg.norm(x - reference[np.concatenate(closest)], axis=1)
    # of unit vectors |x - y|² = 2 (1 - x·y), without the cancellation in 1 - x·y
    return distance**2 / 2 if measure == "cosine" else distance


def _closest(x: Array, reference: Array) -> Array:
    index: Array = (np.square(reference).sum(1) - 2 * x @ reference.T).argmin(1)
    return index
