"""The second error bar: how well the sample set stands for the population it was drawn from.

The quadratic forms v·H_b v of every batch b are by-products of the products; their spread over batches, or of
per-example traces over examples, is the sampling error of the data. First order: an extreme eigenvalue of a
sample is biased outwards by its own noise, which this does not contain.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from hessdiag.results import DataError

Array = NDArray[np.float64]

FEWEST_BLOCKS = 6  # with fewer the t-interval is 2.8 standard errors and more: no help to anyone


def data_error(values: Array, weights: Array, centre: float, confidence: float, *, what: str) -> DataError | None:
    """The interval of a weighted mean over independent blocks of data.

    Args:
        values: (blocks,) of the quantity.
        weights: (blocks,) what each block's mean stands for.
        centre: the quantity on the whole sample set.
        confidence: of the interval.
        what: "examples" or "batches".

    Returns:
        The error; None with fewer than 6 blocks that count.
    """
    counted = weights > 0
    values, weights = values[counted], weights[counted]
    n = len(values)
    if n < FEWEST_BLOCKS:
        return None
    share = weights / weights.sum()
    mean = float((share * values).sum())
    # the ratio estimator's variance: blocks of unequal weight vary in both
    variance = n / (n - 1) * float(np.square(share * (values - mean)).sum())
    stderr = math.sqrt(variance)
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * stderr
    return DataError(stderr=stderr, lo=centre - half, hi=centre + half, blocks=n, method=f"spread over {n} {what}")
