"""The same function in double precision, where the model allows it."""

from __future__ import annotations

import torch

from hessdiag.engine.curvature import Curvature
from hessdiag.engine.functional import Functional
from hessdiag.engine.slopes import gradient
from hessdiag.samples import divide


def in_double(operator: Curvature) -> Functional | None:
    """The same function in float64, or None where the model insists on another precision."""
    if operator.dtype == torch.float64:
        return operator.function
    try:
        function = Functional(operator.problem, dtype=torch.float64, device=operator.device)
        gradient(function, function.place(next(divide(operator.samples.batches[0], 1))))
    except (RuntimeError, TypeError, ValueError):
        return None
    return function
