"""The diagonal of any operator; of a model's, what its outputs give exactly is not left to chance."""

from __future__ import annotations

from typing import Any

import torch

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.fisher import Fisher
from hessdiag.engine.squares.curved import curved_tensors
from hessdiag.engine.squares.diagonals import squares_diagonal
from hessdiag.errors import Refused
from hessdiag.operator import SymmetricOperator, as_operator
from hessdiag.results import a_share, at_least
from hessdiag.spectral import lanczos
from hessdiag.spectral.diagonal import Diagonal, estimated, exact_diagonal, known, probed

PILOT = 4
"""Probes of a stream of their own that say whether R or H itself spreads less; the mean does not use them."""


def diagonal(
    operator: Any, *, probes: int = 32, seed: int = 0, deflate: int = 0, confidence: float = 0.95
) -> Diagonal:
    """The diagonal of H with an error for each entry, and one for all together.

    Exact where it is cheap: d products where d is no more than ``probes``; the squares of what the examples
    pull back for a Gauss-Newton or a Fisher matrix, and for the Hessian in every tensor that the outputs are
    piecewise linear in (ReLU networks: all), with at most 32 outputs per example. Random signs elsewhere.

    Args:
        operator: anything `as_operator` takes; H, d x d.
        probes: products to spend on probes, at least 2; 32 leave a sixth of a row's off-diagonal length.
        seed: names the probes' stream.
        deflate: Lanczos steps to spend first, so that probes see only the bulk; not beside what is exact.
        confidence: of the intervals.

    Returns:
        Diagonal. Cost: ``probes`` and ``deflate`` products; for what is exact one per-example backward pass
            per output; where H has both parts 8 products more.

    Raises:
        BudgetError: fewer than 2 probes where they are needed: one has no standard error.
        UsageError: ``confidence`` outside (0, 1).

    Example:
        >>> import torch, hessdiag
        >>> hessdiag.diagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).value.tolist()
        [2.0, 3.0]
    """
    op = as_operator(operator)
    a_share(confidence, "confidence")
    if op.size <= probes:
        return exact_diagonal(op)
    at_least(probes, 2, "probes", "a standard error")
    if isinstance(op, Curvature):
        found = _of_model(op, probes, seed, confidence)
        if found is not None:
            return found
    before = op.products
    krylov = lanczos(op, steps=deflate, seed=seed) if deflate else None
    samples = probed(op, probes, seed, krylov=krylov)
    method = f"Hutchinson, {deflate} directions deflated" if deflate else "Hutchinson"
    return estimated(op, samples, confidence, method, op.products - before)


def _of_model(op: Curvature, probes: int, seed: int, confidence: float) -> Diagonal | None:
    """What the outputs give exactly, and probes for the rest; None if they give nothing, or probes do better."""
    if op.problem.has_outputs is False:
        return None
    found = 0.0 if op.kind == "residual" else squares_diagonal(op)
    if isinstance(found, Refused):
        op.notes.append(f"diagonal: {found.reason}")
        return None
    exact = torch.zeros(op.size, dtype=torch.float64, device=op.device) + found
    rounding = op.floor * exact.abs()
    if isinstance(op, Fisher) or op.kind == "ggn":
        return known(op, exact, rounding, "squares of the examples' gradients", 0)
    curved = set(curved_tensors(op))
    among = torch.cat([torch.full((size,), name in curved, device=op.device) for name, size in op.layout])
    if not curved:
        return known(op, exact, rounding, "squares of the examples' gradients: R has no diagonal", 0)
    R = op.with_kind("residual") if op.kind == "hessian" else op
    spent = _products(op, R)
    if op.kind == "hessian" and not _spreads_less(R, op, among, seed):
        return None
    samples = probed(R, probes, seed, among=among)
    method = "squares of the examples' gradients, and Hutchinson for R in the tensors that are curved"
    return estimated(op, samples, confidence, method, _products(op, R) - spent, (exact, rounding))


def _products(op: SymmetricOperator, other: SymmetricOperator) -> int:
    return op.products + (other.products if other is not op else 0)


def _spreads_less(R: Curvature, H: Curvature, among: torch.Tensor, seed: int) -> bool:
    left = probed(R, PILOT, seed, among=among, quantity="diagonal pilot").spread.sum()
    return bool(left <= probed(H, PILOT, seed, quantity="diagonal pilot").spread.sum())
