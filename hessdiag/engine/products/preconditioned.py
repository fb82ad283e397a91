"""The Hessian in the coordinates in which an adaptive optimizer makes plain steps."""

from __future__ import annotations

from typing import Any

from hessdiag.errors import ProblemError
from hessdiag.operator import Scaled, SymmetricOperator
from hessdiag.optimizers import Preconditioner, preconditioner_of
from hessdiag.problem import Problem


class Preconditioned(Scaled):
    """P^-1/2 H P^-1/2.

    Attributes:
        preconditioner: P, and what is known of it.

    Those of `Scaled` too: base, which is H, and diagonal.
    """

    def __init__(self, base: SymmetricOperator, preconditioner: Preconditioner) -> None:
        super().__init__(base, preconditioner.diagonal())
        self.preconditioner = preconditioner

    @property
    def threshold(self) -> float:
        """What the largest eigenvalue must stay below for the optimizer's steps not to diverge on a quadratic."""
        return self.preconditioner.threshold

    def __repr__(self) -> str:
        """What it is the matrix of."""
        return f"<{self.base!r}, preconditioned by {self.preconditioner.optimizer}>"


def preconditioner_for(problem: Problem, optimizer: Any = None) -> Preconditioner:
    """The preconditioner for the parameters that count.

    Args:
        problem: whose parameters are meant.
        optimizer: of torch, or its state dict; None for the problem's.

    Raises:
        ProblemError: none, or one that has no preconditioner for these parameters.
    """
    found = problem.optimizer if optimizer is None else optimizer
    if found is None:
        msg = "preconditioned_lambda_max needs the optimizer's state: Problem(optimizer=optimizer), analyze(..., "
        raise ProblemError(msg + "optimizer=optimizer), or a checkpoint file that holds it beside the weights")
    return preconditioner_of(found, dict(problem.bare_model().named_parameters()), problem.parameter_names())
