"""An operator between two diagonal matrices: D A D, the same in rescaled coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator.symmetric import SymmetricOperator


class Scaled(SymmetricOperator):
    """D A D for a diagonal D; each product costs one of A's.

    Room and what is kept are those of A, so that a budget or an interrupt of A's measurement ends its runs too.

    Args:
        base: A, of size d.
        diagonal: the diagonal of D, (d,); finite, of any sign.

    Attributes:
        base: A.
        diagonal: that of D, in A's dtype.

    Raises:
        UsageError: a diagonal of another shape, or one that is not finite.

    >>> import hessdiag, torch
    >>> from hessdiag.operator import Scaled
    >>> A = hessdiag.as_operator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    >>> Scaled(A, torch.tensor([1.0, 2.0])).dense().tolist()
    [[2.0, 2.0], [2.0, 12.0]]
    """

    def __init__(self, base: SymmetricOperator, diagonal: Tensor) -> None:
        if diagonal.shape != (base.size,):
            msg = f"a diagonal of shape {tuple(diagonal.shape)} for an operator of size {base.size}: give (d,)"
            raise UsageError(msg)
        self.base = base
        super().__init__(base.size, dtype=base.dtype, device=base.device, layout=base.layout, shapes=base.shapes)
        self.diagonal = diagonal.to(device=base.device, dtype=base.dtype)
        if not bool(torch.isfinite(self.diagonal).all()):
            msg = f"a diagonal with numbers that are not finite in {base.dtype}: try `dtype='float64'`"
            raise UsageError(msg)
        self.floor, self.block, self.semidefinite = base.floor, base.block, base.semidefinite
        self.room = lambda: base.left
        self.kept = base.kept

    def multiply(self, rows: Tensor) -> Tensor:
        """Scaled, multiplied by A, and scaled again."""
        return self.base.multiplied(rows * self.diagonal)[0].mul_(self.diagonal)  # not finite shows in ours
