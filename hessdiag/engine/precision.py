"""The same function in double precision, where the model allows it, and the precision it really computes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.curvature import Curvature
from hessdiag.engine.functional import Functional, graph_nodes
from hessdiag.engine.slopes import gradient
from hessdiag.samples import divide


def in_double(operator: Curvature) -> Functional | None:
    """The same function in float64, or None where the model insists on another precision."""
    if operator.dtype == torch.float64:
        return operator.function
    try:
        function = Functional(operator.problem, dtype=torch.float64, device=operator.device)
        with function.measuring():
            gradient(function, function.place(next(divide(operator.samples.batches[0], 2))))
    except (RuntimeError, TypeError, ValueError):
        return None
    return function


def narrowest(function: Functional, batch: Any) -> torch.dtype:
    """The least precise floating type in the graph of a batch's loss: models may cast inside."""
    with function.measuring():
        total = function.total(function.theta, batch)
    found: set[torch.dtype] = {function.dtype}
    found |= {value.dtype for node in graph_nodes(total) for value in node._input_metadata}
    return max((dtype for dtype in found if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)


def norm(tensor: Tensor) -> float:
    """The Euclidean norm, taken in double precision."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(tensor, dtype=wide).real)
