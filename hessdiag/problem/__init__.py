"""What is measured: a model, its loss, its data and the parameters that count."""

from hessdiag.problem.names import matching
from hessdiag.problem.passes import require_scalar
from hessdiag.problem.problem import Problem

__all__ = ["Problem", "matching", "require_scalar"]
