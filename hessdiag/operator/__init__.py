"""Symmetric operators: products, sums, multiples and powers, and what becomes one."""

from hessdiag.operator.combination import Combination
from hessdiag.operator.conversion import as_operator
from hessdiag.operator.powers import Identity, Power
from hessdiag.operator.symmetric import ClosureOperator, SymmetricOperator, full_precision

__all__ = [
    "ClosureOperator",
    "Combination",
    "Identity",
    "Power",
    "SymmetricOperator",
    "as_operator",
    "full_precision",
]
