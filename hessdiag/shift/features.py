"""Of inputs alone: features as a shift moves them, the weights of moved examples, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.special import logsumexp

from hessdiag.errors import BudgetError, UsageError
from hessdiag.shift.results import Array
from hessdiag.shift.settings import SCALE, SHIFTS
from hessdiag.spectral.probes import stream

MISFIT = 0.25  # |log mean weight| worth a note; 0.04 is chance at 360 examples and |δ|² = 0.16
CONSTANT = 1e-10  # relative variance below which a direction of the training data is taken as constant
LESS, SMALLER = 0.8, 16  # a smaller scale is looked for in steps of a fifth, down to a thirtieth
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
            msg += " (`samples`), or fewer `components`" if components else ""
            raise BudgetError(msg)
        if any(not 0 <= feature < width for feature in exclude):
            msg = f"`exclude={','.join(map(str, exclude))}`: features are 0 to {width - 1}"
            raise UsageError(msg)
        mean, variance = x.mean(0), x.var(0)
        varying = variance > CONSTANT * variance.max()
        dropped = int((~varying).sum())
        varying[list(exclude)] = False
        kept = np.flatnonzero(varying)
        if not len(kept) or (components is not None and not 1 <= components <= len(kept)):
            msg = f"`components={components}`: {len(kept)} features vary in the reference; allowed: 1 to that"
            raise UsageError(msg)
        if components is None:
            scaled = np.zeros((width, len(kept)))
            scaled[kept, np.arange(len(kept))] = 1 / np.sqrt(variance[kept])
            return cls(mean, scaled, "standardized", dropped)
        spread, axes = _principal(x[:, kept] - mean[kept], components)
        if spread[-1] <= CONSTANT * spread[0]:
            rank = int((spread > CONSTANT * spread[0]).sum())
            msg = f"`components={components}`: the reference varies in {rank} directions only; allowed: 1 to that"
            raise UsageError(msg)
        whitened = np.zeros((width, components))
        whitened[kept] = axes / np.sqrt(spread)
        return cls(mean, whitened, "principal components", dropped)


def _principal(x: Array, components: int) -> tuple[Array, Array]:
    """Leading variances (k,) and axes (d, k) of centred inputs (m, d), from the smaller of the two products."""
    size, width = x.shape
    wide = width > size
    small = (x @ x.T if wide else x.T @ x) / size
    spread, vectors = eigh(small, subset_by_index=[len(small) - components, len(small) - 1])
    spread, vectors = spread[::-1], vectors[:, ::-1]
    if not wide:
        return spread, vectors
    lengths = np.sqrt(np.maximum(spread, np.finfo(float).tiny) * size)
    return spread, x.T @ vectors / lengths


@dataclass(frozen=True)
class Weighted:
    """Test examples weighted as if the features' mean had moved, for many moves.

    Attributes:
        shifts: |δ|₁ of each move, (shifts,).
        weights: of each example, 1 at most in a row, (shifts, n).
        notes: what was shifted, and whether the weights average to 1, as densities' ratios must.
    """

    shifts: Array
    weights: Array
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        x: Array,
        reference: Array,
        *,
        shifts: int = SHIFTS,
        scale: float = SCALE,
        components: int | None = None,
        exclude: Sequence[int] = (),
        seed: int = 0,
    ) -> Weighted:
        """Weights of test inputs (n, d) by training inputs (m, d); arguments are those of `covariate_shift`.

        Raises:
            UsageError: shapes that do not fit.
            BudgetError: too few shifts or training inputs.
        """
        if shifts < 3 or not scale > 0:
            msg = f"`shifts={shifts}`, `scale={scale}`: a line needs at least 3 shifts of a positive scale"
            raise BudgetError(msg)
        known = Features.of(reference, components, exclude)
        z = known(x)
        generator = stream(seed, "shift", "covariate")
        delta = scale * torch.randn(shifts, z.shape[1], generator=generator, dtype=torch.float64).numpy()
        logs = delta @ z.T - np.square(delta).sum(1, keepdims=True) / 2
        notes = [f"features shifted: {z.shape[1]} ({known.kind}), {known.dropped} constant ones dropped"]
        off = float(np.quantile(np.abs(logsumexp(logs, axis=1) - np.log(len(x))), 0.9))
        if off > MISFIT:
            notes.append(
                f"mean weights are off 1 by up to a factor {np.exp(off):.2g}: not independent normals; take "
                "`components`, or a smaller `scale`"
            )
        return cls(np.abs(delta).sum(1), np.exp(logs - logs.max(1, keepdims=True)), tuple(notes))

    def fitting(self, scale: float, least: float, share: float) -> float | None:
        """The largest of ever smaller scales at which enough shifts keep enough effective examples, or None.

        A shift t δ weighs an example by the t-th power of what δ does, up to a factor that all examples share.

        Args:
            scale: of the shifts as they are.
            least: effective examples that a shift needs.
            share: of the shifts that must have them.
        """
        for step in range(1, SMALLER + 1):
            part = LESS**step
            weights = self.weights**part
            effective = weights.sum(1) ** 2 / np.square(weights).sum(1)
            if (effective >= least).mean() >= share:
                unit = 10.0 ** (np.floor(np.log10(scale * part)) - 1)
                return float(np.floor(scale * part / unit) * unit)  # to two digits, as it is written
        return None


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
        msg = f"measure={measure!r}: allowed: euclidean, cosine"
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
