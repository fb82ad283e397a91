"""How far rounding moves a product: measured, against the same product in float64 where the model allows it.

Asymmetry and repetition see rounding that is random. What single precision does to the loss itself is neither: a
confident example leaves 1 − p to the last digits of p, and its part of H is wrong by a few percent in a way that
is symmetric and repeats. Only another precision shows it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessdiag.engine.checks.planner import trial_vectors
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.graphs import GradientGraph
from hessdiag.engine.products.methods import METHODS
from hessdiag.engine.products.precision import in_double
from hessdiag.engine.products.preconditioned import Preconditioned
from hessdiag.engine.products.windows import WINDOW, distance, norm

MARGIN = 8.0
"""The largest rounding over the vectors of a run, against that of one trial vector on 16 examples: with 4 one
value of 656 passed the truth, by 1.4 floors (a transformer with a loss of 1e-5)."""
SMALLEST = 32.0
"""Units of rounding. In 328 cases of small networks the value of lambda_max passed the truth by 11 at worst."""


def rounding_floor(
    operator: Curvature,
    double: Functional | None,
    unit: float,
    row: Tensor,
    product: Tensor,
    scale: float,
    *others: float,
) -> float:
    """Relative rounding of a product, at least `SMALLEST` units.

    Args:
        operator: in its own precision.
        double: the same function in float64, if there is one.
        unit: of rounding, of the least precise type that the model computes in.
        row: a trial vector (P,).
        product: of the trial examples with it, unscaled.
        scale: what rounding of it is relative to: its length, and more where it is next to none.
        *others: what the self-test measured of random rounding, each relative to the product.

    Returns:
        The largest of all, with a margin. Cost: a product of the trial examples in float64.
    """
    measured = max(*others, _against_double(operator, double, row, product) / scale)
    return max(SMALLEST * unit, MARGIN * measured)


def preconditioned_floor(scaled: Preconditioned, operator: Curvature) -> float:
    """Relative rounding of a product of P^-1/2 H P^-1/2: that of H, or more as its own trial product shows.

    Where P spans orders of magnitude, rounding that is nothing beside H v may be much beside the rescaled product.

    Args:
        scaled: of the operator.
        operator: H, after its self-test.

    Returns:
        The larger of H's floor and what was measured, with a margin. Cost: two products of the trial examples.
    """
    if operator.dtype == torch.float64 or operator.method == "finite_difference":
        return operator.floor
    double, diagonal = in_double(operator), scaled.diagonal.double()
    row = scaled.diagonal * trial_vectors(operator, 1)[0]
    piece = operator.function.place(operator.trial)
    with operator.function.measuring():
        product = METHODS[operator.method](operator.function, operator.kind, piece, row[None])[0].double()
        off = _difference(operator, double, row, product)
    if off is None:
        return operator.floor
    size = float(torch.linalg.vector_norm(diagonal * product))
    return max(operator.floor, MARGIN * float(torch.linalg.vector_norm(diagonal * off)) / max(size, 1e-300))


def _against_double(operator: Curvature, double: Functional | None, row: Tensor, product: Tensor) -> float:
    if operator.dtype == torch.float64 or operator.method == "finite_difference":
        return 0.0
    if double is not None and operator.method == "retained_graph" and operator.size > WINDOW:
        return _long_difference(operator, double, row, product)
    off = _difference(operator, double, row, product)
    return 0.0 if off is None else norm(off)


def _long_difference(operator: Curvature, double: Functional, row: Tensor, product: Tensor) -> float:
    """The norm of `_difference`, a tensor at a time."""
    pieces, squares = double.split(product), []

    def look(index: int, exact: Tensor) -> None:
        squares.append(distance(exact, pieces[index]) ** 2)

    try:
        graph = GradientGraph(double, operator.kind, double.place(operator.trial))
        graph.each_product(row.double(), look)
    except (RuntimeError, TypeError, ValueError):
        return 0.0  # the other measures have to do
    return math.sqrt(math.fsum(squares))


def _difference(operator: Curvature, double: Functional | None, row: Tensor, product: Tensor) -> Tensor | None:
    """The product in float64 less the given one; None where an operation has no float64, or memory does not do."""
    if double is None:
        return None
    try:
        piece = double.place(operator.trial)
        exact = METHODS[operator.method](double, operator.kind, piece, row.double()[None])[0]
    except (RuntimeError, TypeError, ValueError):
        return None  # the other measures have to do
    return exact - product.double()
