"""Derivatives of an elementwise function, for activations without a formula of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessdiag.errors import UsageError, one_line

Derivatives = tuple[Tensor, Tensor, Tensor, Tensor]


def derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> Derivatives:
    """The function and its first three derivatives at every element of x, by repeated autograd.

    Args:
        function: elementwise, three times differentiable almost everywhere (ReLU: zeros from the second).
        x: any shape, float64.

    Returns:
        Four tensors shaped like x. Cost: one pass over x per derivative.

    Raises:
        UsageError: it fails, does not keep the shape, or is not a function of each element alone.
    """
    # on one axis: what mixes elements along another shows in the values
    flat = x.detach().reshape(-1).requires_grad_()
    with torch.enable_grad():
        try:
            value, whole = function(flat), function(x.detach())
        except (IndexError, TypeError, RuntimeError) as error:
            msg = f"the activation fails on a vector ({one_line(error, 100)}): an elementwise function is needed"
            raise UsageError(msg) from error
        if value.shape != flat.shape or whole.shape != x.shape or not _same(value, whole):
            msg = "the activation mixes elements: an elementwise function such as torch.tanh is needed"
            raise UsageError(msg)
        found = [value]
        for _ in range(3):
            grad = None
            if found[-1].requires_grad:
                (grad,) = torch.autograd.grad(found[-1].sum(), flat, create_graph=True, allow_unused=True)
            found.append(torch.zeros_like(flat) if grad is None else grad)
    value, first, second, third = (tensor.detach().view(x.shape) for tensor in found)
    return value, first, second, third


def _same(flat: Tensor, whole: Tensor) -> bool:
    # not bit by bit: vectorised loops and their remainders round apart
    return torch.allclose(flat.detach(), whole.detach().reshape(-1), rtol=1e-12, atol=0.0)
