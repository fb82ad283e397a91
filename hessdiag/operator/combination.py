"""Sums of multiples of operators."""

from __future__ import annotations

import torch
from torch import Tensor

from hessdiag.operator.symmetric import SymmetricOperator


class Combination(SymmetricOperator):
    """A sum of multiples of operators of one size, in the first one's dtype.

    Where terms cancel, the rounding of each is relative to more than the sum: ``floor`` grows as products show it.
    """

    def __init__(self, terms: tuple[tuple[float, SymmetricOperator], ...]) -> None:
        first = terms[0][1]
        super().__init__(first.size, dtype=first.dtype, device=first.device, layout=first.layout)
        self.terms = terms
        self.floor = max(self.floor, *(op.floor for _, op in terms)) if len(terms) > 1 else first.floor
        self.block = min(op.block for _, op in terms)
        self.semidefinite = all(factor >= 0 and op.semidefinite for factor, op in terms)
        self._lost = self._largest = 0.0

    def _apply(self, rows: Tensor) -> Tensor:
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
