"""Products of an operator with itself, and the identity: what stays symmetric when it is composed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator.combination import Combination
from hessdiag.operator.symmetric import SymmetricOperator


class Identity(SymmetricOperator):
    """I of an operator's size, dtype and layout."""

    def __init__(self, like: SymmetricOperator) -> None:
        super().__init__(like.size, dtype=like.dtype, device=like.device, layout=like.layout, shapes=like.shapes)
        self.floor, self.semidefinite = torch.finfo(self.dtype).eps, True

    def multiply(self, rows: Tensor) -> Tensor:
        """The rows themselves."""
        return rows


class Power(SymmetricOperator):
    """An operator applied ``exponent`` >= 1 times; each product costs as many of the base's.

    The rounding of each application is relative to the largest eigenvalue, so that they add up.
    """

    def __init__(self, base: SymmetricOperator, exponent: int) -> None:
        super().__init__(base.size, dtype=base.dtype, device=base.device, layout=base.layout, shapes=base.shapes)
        self.base, self.exponent, self.block = base, exponent, base.block
        self.floor = exponent * base.floor
        self.semidefinite = base.semidefinite or exponent % 2 == 0

    def multiply(self, rows: Tensor) -> Tensor:
        """The base's products, ``exponent`` times over."""
        for _ in range(self.exponent):
            rows = self.base.rows(rows)
        self.floor = max(self.floor, self.exponent * self.base.floor)
        return rows


def power(op: SymmetricOperator, exponent: Any) -> SymmetricOperator:
    """``op ** exponent``.

    Raises:
        UsageError: the exponent is no whole number, or negative.
    """
    if not isinstance(exponent, int) or isinstance(exponent, bool) or exponent < 0:
        msg = f"H ** {exponent}: whole exponents from 0; to solve, scipy.sparse.linalg.cg(H.to_scipy(), b)"
        raise UsageError(msg)
    factor, base, times = _parts(op)
    if base is None or times * exponent == 0:
        return op.identity * factor**exponent if factor != 1 else op.identity
    return _scaled(factor**exponent, _powered(base, times * exponent))


def composed(left: SymmetricOperator, right: SymmetricOperator) -> SymmetricOperator:
    """``left @ right`` where both are multiples of powers of one operator, or one is a multiple of I.

    Raises:
        UsageError: other operators, whose product is not symmetric, or another size.
    """
    if left.size != right.size:
        msg = f"operators of size {left.size} and {right.size} are multiplied: they must be of one size"
        raise UsageError(msg)
    (a, first, n), (b, second, m) = _parts(left), _parts(right)
    if first is None or second is None:
        found = right if first is None else left
        return _scaled(a if first is None else b, found)
    if first is not second:
        msg = "H @ G of two operators is not symmetric: form H @ (G @ v), or H.to_scipy() @ G.to_scipy()"
        raise UsageError(msg)
    return _scaled(a * b, _powered(first, n + m))


def _parts(op: SymmetricOperator) -> tuple[float, SymmetricOperator | None, int]:
    """Factor, base and exponent; without a base for a multiple of I."""
    if isinstance(op, Combination) and len(op.terms) == 1:
        factor, inner = op.terms[0]
        more, base, exponent = _parts(inner)
        return factor * more, base, exponent
    if isinstance(op, Identity):
        return 1.0, None, 0
    return (1.0, op.base, op.exponent) if isinstance(op, Power) else (1.0, op, 1)


def _powered(base: SymmetricOperator, exponent: int) -> SymmetricOperator:
    return base if exponent == 1 else Power(base, exponent)


def _scaled(factor: float, op: SymmetricOperator) -> SymmetricOperator:
    return op if factor == 1 else factor * op
