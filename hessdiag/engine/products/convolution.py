"""A convolution with the derivatives of torch's own, the second ones made of kernels that torch is fast at.

torch 2.13 differentiates a convolution's gradient by its weight with a convolution whose kernel is a whole
image: on a ResNet-20, 64 images, one CPU thread, 160 of a product's 272 ms. Here it is the weight's gradient once
more, as in any backward pass: 123 ms.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class Geometry(NamedTuple):
    """How a kernel moves, one number per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    value: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The convolution of x (n, channels, ...) with a weight (out, channels / groups, ...).

    Args:
        x: floating point, as all the others.
        weight: the kernels.
        bias: (out,) or None.
        geometry: of the convolution.
        value: y, s and t, if the result is known to be y·s + t with s and t (out,): it is then not convolved for.
    """
    found: Tensor = _Convolution.apply(x, weight, bias, geometry, value)  # type: ignore[no-untyped-call]
    return found


def per_channel(entries: Tensor, like: Tensor) -> Tensor:
    """Numbers (channels,) in a shape that multiplies a tensor (n, channels, ...)."""
    return entries.view(-1, *[1] * (like.dim() - 2))


def transformed(*tensors: Tensor) -> bool:
    """Whether one of torch's transforms is at work, which only torch's own operations go through.

    Of vmap there are two: the older one serves losses that take many derivatives at once, and what a hand-written
    function loses in it is lost silently.
    """
    older = torch._C._functorch.is_legacy_batchedtensor
    return torch._C._are_functorch_transforms_active() or any(older(tensor) for tensor in tensors)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients by input, weight and bias, those that are wanted."""
    stride, padding, dilation, groups = geometry
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], stride, padding, dilation, False, [0] * len(stride), groups, wanted
    )
    return found


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, value: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        if value is None:
            return _convolved(x, weight, bias, geometry)
        y, scale, shift = value
        return torch.addcmul(per_channel(shift, y), y, per_channel(scale, y))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        form = _gradients if transformed(grad) else _Gradients.apply
        return *form(grad, x, weight, ctx.geometry, wanted), None, None


class _Gradients(Function):
    """The three gradients of a convolution; each is linear in ``grad``, and in the input or the weight."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
    ) -> Any:
        ctx.save_for_backward(grad, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _gradients(grad, x, weight, geometry, wanted)

    @staticmethod
    def backward(ctx: Any, along_x: Tensor | None, along_weight: Tensor | None, along_bias: Tensor | None) -> Any:
        grad, x, weight = ctx.saved_tensors
        geometry = ctx.geometry
        needs_grad, needs_x, needs_weight = ctx.needs_input_grad[:3]
        by_grad = by_x = by_weight = None
        if needs_grad:
            pairs = ((along_x, weight), (x, along_weight))
            moved = [_convolved(a, b, None, geometry) for a, b in pairs if a is not None and b is not None]
            if along_bias is not None:
                moved.append(per_channel(along_bias, grad))
            by_grad = sum(moved[1:], start=moved[0]).expand_as(grad) if moved else None
        if needs_x and along_weight is not None:
            by_x = _gradients(grad, x, along_weight, geometry, (True, False, False))[0]
        if needs_weight and along_x is not None:
            by_weight = _gradients(grad, along_x, weight, geometry, (False, True, False))[1]
        return by_grad, by_x, by_weight, None, None
