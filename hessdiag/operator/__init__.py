"""Symmetric operators: products, sums, multiples, powers and rescaled ones, and what becomes one."""

from hessdiag.operator.combination import Combination
from hessdiag.operator.conversion import ClosureOperator, as_operator
from hessdiag.operator.powers import Identity, Power
from hessdiag.operator.scaled import Scaled
from hessdiag.operator.symmetric import SymmetricOperator, full_precision

__all__ = [
    "ClosureOperator",
    "Combination",
    "Identity",
    "Power",
    "Scaled",
    "SymmetricOperator",
    "as_operator",
    "full_precision",
]
