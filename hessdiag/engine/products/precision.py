"""The same function in double precision, where the model allows it, and the precision it really computes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import each_gradient, gradient
from hessdiag.engine.products.nodes import graph_nodes
from hessdiag.engine.products.windows import distance, norm
from hessdiag.samples import divide

SAME_GRADIENT = 1e-2
"""Relative, of gradients: as for the self-test. Bits that were read as a wider type make another function."""


class _Widening(TorchFunctionMode):
    """Every mention of float32 means float64."""

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return Tensor.double(*args, **(kwargs or {}))
        return func(*map(_wider, args), **{name: _wider(value) for name, value in (kwargs or {}).items()})


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class _Widened(Functional):
    """A function whose own casts to single precision are casts to double precision."""

    @contextmanager
    def measuring(self) -> Iterator[None]:
        with super().measuring(), _Widening():
            yield


def in_double(operator: Curvature) -> Functional | None:
    """The same function in float64, or None where the model insists on another precision.

    Casts to float32 inside the model (in its normalization, its attention) are widened where that gives the same
    loss: a function that is rounded to single precision has no differences between the kinks of its ReLUs.
    """
    with operator.function.measuring():
        return _in_double(operator)


def _in_double(operator: Curvature) -> Functional | None:
    double = operator.dtype == torch.float64
    try:
        function = operator.function if double else _as(Functional, operator)
        _require_gradient(operator, function)
        if narrowest(function, _two(operator, function)) != torch.float32:
            return function
    except (RuntimeError, TypeError, ValueError):
        return operator.function if double else None
    try:
        wide = _as(_Widened, operator)
        grad, same = _gradient(operator, function), _gradient(operator, wide)
        whole = narrowest(wide, _two(operator, wide)) == torch.float64
    except (RuntimeError, TypeError, ValueError):
        return function
    return wide if whole and distance(grad, same) <= SAME_GRADIENT * max(norm(grad), norm(same)) else function


def _as(kind: type[Functional], operator: Curvature) -> Functional:
    return kind(operator.problem, dtype=torch.float64, device=operator.device)


def _require_gradient(operator: Curvature, function: Functional) -> None:
    """Take the gradient of two examples: not all models can have it in float64."""
    with function.measuring():
        each_gradient(function.total(function.theta, _two(operator, function)), function.theta, lambda *_: None)


def _gradient(operator: Curvature, function: Functional) -> Tensor:
    with function.measuring():
        return gradient(function, _two(operator, function))


def _two(operator: Curvature, function: Functional) -> Any:
    return function.place(next(divide(operator.samples.batches[0], 2)))


def narrowest(function: Functional, batch: Any) -> torch.dtype:
    """The least precise floating type in the graph of a batch's loss: models may cast inside."""
    with function.measuring():
        total = function.total(function.theta, batch)
    found: set[torch.dtype] = {function.dtype}
    found |= {value.dtype for node in graph_nodes(total) for value in node._input_metadata}
    return max((dtype for dtype in found if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps)
