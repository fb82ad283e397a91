"""What is known of G = JᵀSJ before a product: it has no negative eigenvalue where S has none, and the rank of J.

S = d²loss/doutputs² is positive semidefinite where the loss is convex in the outputs: squared errors, and
cross-entropy of targets that sum to no less than nothing. Of a criterion of one's own nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.criteria import CRITERIA, is_index
from hessdiag.problem import Problem
from hessdiag.samples import divide

if TYPE_CHECKING:
    from hessdiag.engine.products.curvature import Curvature


def is_convex(problem: Problem, batches: Sequence[Any], weights: Tensor) -> bool:
    """Whether every batch's summed loss is known to be convex in the outputs; ``weights`` are the batches'."""
    if problem.criterion not in CRITERIA or bool((weights < 0).any()):
        return False
    return problem.criterion == "mse" or all(_is_distribution(problem.targets(batch)) for batch in batches)


def _is_distribution(targets: Tensor) -> bool:
    """Whether targets are class indices, or weights of classes that sum to no less than nothing."""
    if is_index(targets):
        return True
    return bool((targets.sum(1 if targets.dim() > 1 else 0) >= 0).all())


def rank_at_most(operator: Curvature) -> int:
    """The number of outputs: a bound on the rank of G. Costs a forward pass of the sample set."""
    function, total = operator.function, 0
    with operator.timed(), torch.no_grad():
        for batch in operator.batches:
            for piece in divide(batch, operator.micro_batch) if operator.micro_batch else [batch]:
                total += function.outputs(function.theta, piece).numel()
    return total
