"""Symmetric operators: products, sums and multiples, and what becomes one."""

from hessdiag.operator.combination import Combination
from hessdiag.operator.conversion import as_operator
from hessdiag.operator.symmetric import ClosureOperator, SymmetricOperator, full_precision

__all__ = ["ClosureOperator", "Combination", "SymmetricOperator", "as_operator", "full_precision"]
