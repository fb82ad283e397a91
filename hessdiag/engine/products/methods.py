"""How one batch's product is formed: same product, different cost, and different tolerance of odd operations.

Reverse over forward is not among them: it is silently wrong through LayerNorm, BatchNorm in training mode
and InstanceNorm in torch 2.13 (pytorch#196700). Costs are gradients per product on one CPU thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.folding import Folded
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import Kind, gradient, loss_gradient, scalar_of
from hessdiag.engine.products.graphs import GradientGraph, StackGraph
from hessdiag.engine.products.stacking import stacks
from hessdiag.engine.products.streaming import layer_streamed
from hessdiag.engine.products.tangents import load_forward_mode, push
from hessdiag.errors import MeasurementError

Method = Callable[[Functional, Kind, Any, Tensor], Tensor]


def retained_graph(function: Functional, kind: Kind, batch: Any, rows: Tensor) -> Tensor:
    """Double backward over one graph kept for the whole block: 1.5 to 2.6 gradients, 2 to 3 held in memory.

    Args:
        function: the loss as a function of θ.
        kind: "hessian", "ggn" or "residual".
        batch: placed on the function's device.
        rows: vectors (k, P).

    Returns:
        Products (k, P), of the batch's summed loss: not yet divided by what the mean stands for.
    """
    if kind == "ggn":
        return _gauss_newton(function, batch, rows)
    return GradientGraph(function, kind, batch).products(rows, keep=False)


def double_backward(function: Functional, kind: Kind, batch: Any, rows: Tensor) -> Tensor:
    """Double backward, the graph rebuilt for each vector: 3.2 to 3.6 gradients; the robust reference."""
    return torch.cat([retained_graph(function, kind, batch, row[None]) for row in rows])


def stacked_graph(function: Functional, kind: Kind, batch: Any, rows: Tensor) -> Tensor:
    """`StackGraph` of one batch alone, which is how this method is tried and tested; it pays with several.

    The Gauss-Newton matrix goes batch by batch.
    """
    if kind == "ggn":
        return _gauss_newton(function, batch, rows)
    (stack,) = stacks([batch], 1)
    return StackGraph(function, kind, stack).products(rows, keep=False)[:, 0]


def forward_over_reverse(function: Functional, kind: Kind, batch: Any, rows: Tensor) -> Tensor:
    """Forward mode through the gradient (``torch.func``): 4 to 5 gradients eager, what a compiler can use."""
    load_forward_mode()
    theta = tuple(tensor.detach() for tensor in function.theta)
    if kind == "ggn":
        return _gauss_newton_forward(function, batch, rows, theta)
    scalar = scalar_of(function, kind, batch)
    gradient = torch.func.grad(scalar, argnums=tuple(range(len(theta))))
    products = [torch.func.jvp(gradient, theta, function.split(row))[1] for row in rows]
    return torch.stack([function.flat(product) for product in products]).detach()


def finite_difference(function: Functional, kind: Kind, batch: Any, rows: Tensor) -> Tensor:
    """Central differences of gradients, only when asked for: 2 gradients and more, off by 1e-5 to 1e-4 in float32.

    The step makes the gradient change by a fixed fraction r of its norm; a fixed step is off by up to 72 % on
    language models. Steps are tried until r lies within [r*/5, 2 r*].

    Raises:
        MeasurementError: asked for G or R, which have no gradient to difference.
    """
    if kind != "hessian":
        msg = f"`method='finite_difference'` gives the Hessian only, not {kind}: take another method"
        raise MeasurementError(msg)
    return torch.stack([_difference(function, batch, row) for row in rows])


METHODS: dict[str, Method] = {
    "retained_graph": retained_graph,
    "stacked_graph": stacked_graph,
    "double_backward": double_backward,
    "forward_over_reverse": forward_over_reverse,
    "layer_streamed": layer_streamed,
    "finite_difference": finite_difference,
}
EXACT_METHODS = ("retained_graph", "stacked_graph", "double_backward", "forward_over_reverse")
GRADIENT_CHANGE = {torch.float32: 3e-2, torch.float64: 2e-5}  # r*, about 4 eps^(1/3): our experiment, five models


def _gauss_newton(function: Functional, batch: Any, rows: Tensor) -> Tensor:
    """Jᵀ S J v with S = d²loss/doutputs²."""
    with Folded():
        outputs = function.outputs(function.theta, batch)
    leaf, grad = loss_gradient(function, outputs, batch)
    if not grad.requires_grad:
        return torch.zeros_like(rows)
    products = []
    for pushed in push(outputs, function.theta, [function.split(row) for row in rows]):
        (curved,) = torch.autograd.grad(grad, leaf, pushed, retain_graph=True)
        product = torch.autograd.grad(outputs, function.theta, curved, retain_graph=True, materialize_grads=True)
        products.append(function.flat(product))
    return torch.stack(products)


def _gauss_newton_forward(function: Functional, batch: Any, rows: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
    outputs, pullback = torch.func.vjp(lambda *t: function.outputs(t, batch), *theta)[:2]
    leaf, grad = loss_gradient(function, outputs, batch)
    products = []
    for row in rows:
        pushed = torch.func.jvp(lambda *t: function.outputs(t, batch), theta, function.split(row))[1]
        (curved,) = torch.autograd.grad(grad, leaf, pushed, retain_graph=True)
        products.append(function.flat(pullback(curved)))
    return torch.stack(products).detach()


def _difference(function: Functional, batch: Any, row: Tensor) -> Tensor:
    length = float(row.double().norm())
    if length == 0:
        return torch.zeros_like(row)
    unit = row / length
    here = float(gradient(function, batch).double().norm())
    target = GRADIENT_CHANGE[function.dtype]
    scale = float(function.flat(function.theta).detach().double().norm()) or 1.0
    step, best, off = target * scale * 1e-2, torch.zeros_like(row), float("inf")
    for _ in range(6):
        change = gradient(function, batch, function.shifted(unit, step)) - gradient(
            function, batch, function.shifted(unit, -step)
        )
        ratio = float(change.double().norm()) / max(here, 1e-30)
        distance = abs(torch.log(torch.tensor(max(ratio, 1e-30) / target)).item())
        if distance < off:
            best, off = change / (2 * step), distance
        if target / 5 <= ratio <= 2 * target:
            break
        step *= min(max(target / max(ratio, 1e-12), 1e-3), 1e3)
    return best * length
