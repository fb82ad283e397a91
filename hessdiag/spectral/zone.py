"""The zone next to zero in which the signs of eigenvalues are not resolved: a matter of depth.

A Jacobi matrix of m steps bounds its measure below any cut (Chebyshev, Markov, Stieltjes), and leaves open the
weight of a Radau node there, which falls like 1/m within a continuum. The first steps go to what stands out, so
the zone falls more slowly at first: from 30 to 100 steps, twice as many made it 1.5 to 4 times smaller, three
times as many 2.0 times at least (two digits networks, an MLP, a convolutional network and a transformer of 3,466
to 55,050 parameters, two starts each).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hessdiag.results.quadrature import share_below

Array = NDArray[np.float64]
Part = tuple[Array, Array, float]  # alphas (m,), betas (m,) with a last 0 where complete, and share of the whole

KNOWN_TO = 0.05  # of all eigenvalues: the share on each side of the zone is known this well
FINE = 0.01  # of the zone, to which its end is found


def unresolved(parts: Sequence[Part], resolution: float, *, semidefinite: bool = False) -> float:
    """An |λ| from which on signs are known: the shares below −x and above x to 5% each.

    Args:
        parts: the measures of which the density is made.
        resolution: rounding of a product, absolute.
        semidefinite: whether no eigenvalue is negative: the share below −x is zero, whatever x.

    Returns:
        x, rounded upwards; 0 where every eigenvalue above the rounding is told from zero.
    """
    largest = max((float(np.abs(a).max() + 2 * np.abs(b).max()) for a, b, _ in parts if len(a)), default=0.0)
    low, high = max(resolution, 1e-9 * largest), largest
    sides = (1,) if semidefinite else (-1, 1)
    if largest <= low or _told_apart(parts, low, sides):
        return 0.0
    while high > (1 + FINE) * low:  # signs are told apart at ``high``, and not at ``low``
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _told_apart(parts, middle, sides) else (middle, high)
    return high


def _told_apart(parts: Sequence[Part], x: float, sides: Sequence[int]) -> bool:
    return all(sum(share * _open(a, b, side * x) for a, b, share in parts) <= KNOWN_TO for side in sides)


def _open(alphas: Array, betas: Array, cut: float) -> float:
    """How far apart the limits of the share below ``cut`` are."""
    return share_below(alphas, betas, cut, closed=True) - share_below(alphas, betas, cut, closed=False)
