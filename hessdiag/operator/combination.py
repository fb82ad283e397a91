"""Sums of multiples of operators."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator.conversion import as_operator
from hessdiag.operator.symmetric import SymmetricOperator


class Combination(SymmetricOperator):
    """A sum of multiples of operators of one size, in the first one's dtype.

    Where terms cancel, the rounding of each is relative to more than the sum: ``floor`` grows as products show it.
    """

    def __init__(self, terms: tuple[tuple[float, SymmetricOperator], ...]) -> None:
        first = terms[0][1]
        known = next((op for _, op in terms if op.shapes), first)
        options: dict[str, Any] = {"layout": known.layout, "shapes": known.shapes}
        super().__init__(first.size, dtype=first.dtype, device=first.device, **options)
        self.terms = terms
        self.floor = max(self.floor, *(op.floor for _, op in terms)) if len(terms) > 1 else first.floor
        self.block = min(op.block for _, op in terms)
        self.semidefinite = all(factor >= 0 and op.semidefinite for factor, op in terms)
        self._lost = self._largest = 0.0

    def multiply(self, rows: Tensor) -> Tensor:
        """The sum of the terms' products; `floor` grows to the rounding that cancellation leaves of it."""
        total, lost = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for factor, op in self.terms:
            image = op.rows(rows).to(rows)
            total += factor * image
            lost += op.floor * abs(factor) * torch.linalg.vector_norm(image, dim=1, dtype=torch.float64)
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).clamp(min=1e-300)
        sizes = torch.linalg.vector_norm(total, dim=1, dtype=torch.float64)
        self._lost = max(self._lost, float((lost / lengths).max()))
        self._largest = max(self._largest, float((sizes / lengths).max()))
        if len(self.terms) > 1 and self._largest > 0:
            self.floor = max(self.floor, min(self._lost / self._largest, 1.0))
        return total


def multiple(op: SymmetricOperator, factor: Any) -> Combination:
    """An operator times a real number.

    Raises:
        UsageError: the factor is no real number.
    """
    if isinstance(factor, Tensor) and factor.dim() == 0:
        factor = factor.item()
    if not isinstance(factor, numbers.Real):
        msg = f"H * {type(factor).__name__}: an operator is multiplied by a real number; products are H @ v"
        raise UsageError(msg)
    return Combination(((float(factor), op),))


def total(op: SymmetricOperator, factor: float, other: Any) -> Combination:
    """An operator plus ``factor`` times what becomes one.

    Raises:
        UsageError: a number, or another size.
    """
    if isinstance(other, numbers.Number):
        msg = f"H + {other}: could mean every entry or the diagonal; for the diagonal H + {other} * H.identity"
        raise UsageError(msg)
    found = as_operator(other)
    if found.size != op.size:
        msg = f"operators of size {op.size} and {found.size} are added: they must be of one size"
        raise UsageError(msg)
    return Combination(((1.0, op), (factor, found)))
