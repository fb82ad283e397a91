"""What is known of G = JᵀSJ before a product: it has no negative eigenvalue where S has none, and the rank of J.

S = d²loss/doutputs² is positive semidefinite where the loss is convex in the outputs: errors by element, and
cross-entropy of targets that sum to no less than nothing, both under weights that are not negative. Of a criterion
of one's own nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.criteria import is_index
from hessdiag.criteria.criterion import Criterion
from hessdiag.problem import Problem
from hessdiag.samples import divide

if TYPE_CHECKING:
    from hessdiag.engine.products.curvature import Curvature


def is_convex(problem: Problem, batches: Sequence[Any], weights: Tensor) -> bool:
    """Whether every batch's summed loss is known to be convex in the outputs; ``weights`` are the batches'."""
    known = problem.built_in
    if known is None or bool((weights < 0).any()):
        return False
    if any(given is not None and bool((given < 0).any()) for given in (known.weight, known.pos_weight)):
        return False
    return all(_is_convex(known, known.targets(batch)) for batch in batches)


def _is_convex(known: Criterion, targets: Tensor) -> bool:
    if known.name == "binary_cross_entropy":
        return bool(((targets >= 0) & (targets <= 1)).all())
    if not known.of_classes or is_index(targets):
        return True
    if known.weight is not None:
        return bool((targets >= 0).all())
    return bool((targets.sum(1 if targets.dim() > 1 else 0) >= 0).all())


def rank_at_most(operator: Curvature) -> int:
    """The number of outputs: a bound on the rank of G. Costs a forward pass of the sample set."""
    function, total = operator.function, 0
    with operator.timed(), torch.no_grad():
        for batch in operator.batches:
            for piece in divide(batch, operator.micro_batch) if operator.micro_batch else [batch]:
                total += function.outputs(function.theta, piece).numel()
    return total
