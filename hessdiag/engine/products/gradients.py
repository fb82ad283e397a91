"""First derivatives of a batch, and the scalar functions of θ whose Hessians are H and R."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hessdiag.engine.products.failures import KEPT_GRAPH, is_kept_graph
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.windows import joined
from hessdiag.errors import MeasurementError

Kind = Literal["hessian", "ggn", "residual"]


def gradient(function: Functional, batch: Any, theta: tuple[Tensor, ...] | None = None) -> Tensor:
    """The gradient (P,) of the batch's summed loss at ``theta``, by default at the checkpoint."""
    theta = function.theta if theta is None else theta
    return joined([*gradients(function.total(theta, batch), theta)])


def gradients(total: Tensor, theta: tuple[Tensor, ...], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """The gradient in pieces, zero for parameters that take no part."""
    if not total.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in theta)
    try:
        return torch.autograd.grad(total, theta, create_graph=create_graph, materialize_grads=True)
    except RuntimeError as error:
        if not is_kept_graph(error):
            raise
        raise MeasurementError(KEPT_GRAPH) from error


def each_gradient(
    total: Tensor,
    theta: tuple[Tensor, ...],
    look: Callable[[int, Tensor], None],
    among: Iterable[int] | None = None,
    *,
    keep: bool = False,
) -> None:
    """``look(index, gradient)`` of every parameter as soon as a backward pass has it; none is kept.

    Args:
        total: a scalar.
        theta: leaves without a ``.grad``.
        look: may be called in any order, once for each; with zeros where a parameter takes no part.
        among: positions of the parameters looked at; None for all.
        keep: whether the graph may be gone through again.
    """
    left = set(range(len(theta)) if among is None else among)

    def arrive(index: int, leaf: Tensor) -> None:
        found, leaf.grad = leaf.grad, None
        left.discard(index)
        assert found is not None
        look(index, found)

    leaves = {index: theta[index] for index in left}
    hooks = [
        leaf.register_post_accumulate_grad_hook(partial(arrive, index))  # type: ignore[no-untyped-call]
        for index, leaf in leaves.items()
    ]
    try:
        if total.requires_grad:
            torch.autograd.backward(total, inputs=list(leaves.values()), retain_graph=keep)
    except RuntimeError as error:
        if not is_kept_graph(error):
            raise
        raise MeasurementError(KEPT_GRAPH) from error
    finally:
        for hook in hooks:
            hook.remove()
    for index in sorted(left):
        look(index, torch.zeros_like(theta[index]))


def depends(function: Functional, batch: Any) -> bool:
    """Whether any parameter takes part in the batch's loss."""
    total = function.total(function.theta, batch)
    grads = torch.autograd.grad(total, function.theta, allow_unused=True) if total.requires_grad else ()
    return any(grad is not None for grad in grads)


def scalar_of(function: Functional, kind: Kind, batch: Any) -> Callable[..., Tensor]:
    """The function of θ whose Hessian is H, or R: the outputs weighted by the loss's gradient, held constant."""
    if kind == "hessian":
        return lambda *theta: function.total(theta, batch)
    cotangent = output_gradient(function, batch)
    return lambda *theta: (function.outputs(theta, batch) * cotangent).sum()


def output_gradient(function: Functional, batch: Any) -> Tensor:
    """d(summed loss) / d(outputs), detached, shaped like the outputs."""
    with torch.no_grad():
        outputs = function.outputs(function.theta, batch)
    leaf = outputs.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function.problem.loss_sum(leaf, batch), leaf)
    return grad


def loss_gradient(function: Functional, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """The outputs as a leaf, and the summed loss's gradient by them with its graph."""
    leaf = outputs.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function.problem.loss_sum(leaf, batch), leaf, create_graph=True)
    return leaf, grad
