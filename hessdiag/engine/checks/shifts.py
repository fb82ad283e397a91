"""The parameters moved along a direction, without a second copy of them where that would be long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.real_pairs import real
from hessdiag.engine.products.windows import windows


@contextmanager
def shifted(
    function: Functional, direction: Tensor, step: float, *, in_place: bool
) -> Iterator[tuple[Tensor, ...]]:
    """θ + step · direction, to the bit the same either way.

    Args:
        function: at the checkpoint.
        direction: (P,).
        step: along it.
        in_place: whether the function's own copy of θ moves, and is copied from the model again afterwards; only
            for a function that nobody else uses. Otherwise these are new leaves.
    """
    if not in_place:
        yield function.shifted(direction, step)
        return
    try:
        for tensor, move in zip(function.theta, function.split(direction), strict=True):
            for kept, part in windows(tensor.detach(), move):
                kept.add_(part, alpha=step)
        yield function.theta
    finally:
        own = dict(function.problem.bare_model().named_parameters())
        for name, tensor in zip(function.names, function.theta, strict=True):
            tensor.detach().copy_(real(own[name].detach()))
