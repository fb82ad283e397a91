"""The second error bar: how well the sample set stands for the population it was drawn from.

The quadratic forms v·H_b v of every batch b are by-products of the products; their spread over batches, or of
per-example traces over examples, is the sampling error of the data. First order: an extreme eigenvalue of a
sample is biased outwards by its own noise, which this does not contain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hessdiag.engine.products.curvature import Curvature
from hessdiag.results import DataError
from hessdiag.results.interval import block_spread
from hessdiag.samples import row_count

Array = NDArray[np.float64]
Blocks = tuple[Array, Array, Sequence[int]]  # per batch: the quantity, the weight, the examples in it


def data_error(
    values: Array, weights: Array, centre: float, confidence: float, *, what: str, batches: Blocks
) -> DataError | None:
    """The interval of a weighted mean over independent blocks of data.

    Args:
        values: (blocks,) of the quantity.
        weights: (blocks,) what each block's mean stands for.
        centre: the quantity on the whole sample set.
        confidence: of the interval.
        what: "examples" or "batches".
        batches: the same per batch, for the record: other checkpoints are compared batch by batch.

    Returns:
        The error; None with fewer than 6 blocks that count.
    """
    spread = block_spread(values, weights, confidence)
    if spread is None:
        return None
    stderr, half, n = spread
    return DataError(
        stderr=stderr,
        lo=centre - half,
        hi=centre + half,
        blocks=n,
        method=f"spread over {n} {what}",
        block_values=tuple(batches[0].tolist()),
        block_weights=tuple(batches[1].tolist()),
        block_examples=tuple(batches[2]),
    )


def batch_error(operator: Curvature, values: Array, centre: float, confidence: float) -> DataError | None:
    """`data_error` of a quantity known per batch, (batches,)."""
    batches = by_batch(operator, values)
    return data_error(values, batches[1], centre, confidence, what="batches", batches=batches)


def by_batch(operator: Curvature, values: Array) -> Blocks:
    """Values per batch with the batches' weights and sizes."""
    return values, operator.weights.numpy(), [row_count(batch) or 1 for batch in operator.batches]
