"""What one start says of a share of eigenvalues: the law of its weights.

On a share p of d eigenvalues a start that is uniform on the sphere has the weight Beta(pd/2, (1 − p)d/2): of mean
p, and standard deviation √(2p(1 − p)/(d + 2)).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def deviation(share: npt.ArrayLike, dimension: int) -> Array:
    """Standard deviations of a start's weights on these shares of d eigenvalues, of any shape."""
    p = np.asarray(share, dtype=np.float64)
    spread: Array = np.sqrt(2 * p * (1 - p).clip(min=0) / (dimension + 2))
    return spread


def least_share(weights: npt.ArrayLike, dimension: int, tail: float) -> Array:
    """The smallest shares of d eigenvalues on which a start has these weights with a chance of ``tail``.

    The largest ones are 1 − those of the weights of the rest.

    Args:
        weights: of any shape, in [0, 1].
        dimension: d.
        tail: chance, in (0, 1).
    """
    from scipy.special import betainc

    seen = np.asarray(weights, dtype=np.float64)
    low, high = np.zeros_like(seen), seen.copy()
    for _ in range(60):  # the more of them, the likelier such a weight
        middle = (low + high) / 2
        rare = 1 - betainc(middle * dimension / 2, (1 - middle) * dimension / 2, seen) < tail
        low, high = np.where(rare, middle, low), np.where(rare, high, middle)
    return np.where(seen >= 1, 1.0, np.where((seen > 0) & (dimension >= 2), low, 0.0))
