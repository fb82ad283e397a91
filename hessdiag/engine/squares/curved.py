"""The tensors in which the residual R = H − G has a diagonal block: there tr(H) is not tr(G).

R = H − G has no diagonal block for a tensor the outputs are piecewise linear in (ReLU, max-pool, BatchNorm in
evaluation mode, convolutions). Whether that is so is decided per tensor by `curved_tensors`, not by trust.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import output_gradient
from hessdiag.engine.products.precision import in_double
from hessdiag.engine.products.windows import WINDOW, norm, together
from hessdiag.samples import divide

CURVED = 1e-6  # relative: piecewise linear tensors give exactly 0 or rounding, curved ones 1e-3 and more
PROBED_EXAMPLES = 4
LARGE = 1 << 24  # parameters


def curved_tensors(operator: Curvature) -> tuple[str, ...]:
    """Names of the tensors whose diagonal block of R does not vanish.

    For a random v inside one tensor, the block applied to v is the double backward of c·outputs, c the loss's
    gradient by the outputs, weighted at random per example: zero where the outputs are piecewise linear in the
    tensor, and where only a log-softmax curves them, since the entries of c sum to zero. Costs one second backward
    pass of 4 examples per tensor; tensors these do not reach (an expert nobody was sent to) are looked at again on
    the next. What autograd gets wrong here the self-test has refused before.
    """
    generator = torch.Generator().manual_seed(7)
    # a long θ and its gradient in float64 would be the most that is ever held; single precision errs to "curved"
    function = (in_double(operator) if operator.size < LARGE else None) or operator.function
    curved: dict[str, bool] = {}
    pieces = (piece for batch in operator.batches for piece in divide(batch, PROBED_EXAMPLES))
    with operator.timed():
        for piece in pieces:
            curved |= _curved_in(function, function.place(piece), curved, generator)
            if len(curved) == len(operator.function.names):
                break
    return tuple(name for name in operator.function.names if curved.get(name, False))


def _curved_in(
    function: Functional, piece: Any, decided: dict[str, bool], generator: Generator
) -> dict[str, bool]:
    """Of the tensors not decided yet and reached by these examples, whether they are curved."""
    outputs = function.outputs(function.theta, piece)
    cotangent = _cotangent(function, outputs, piece, generator)
    if not outputs.requires_grad:
        return {}
    grads = torch.autograd.grad(
        (outputs * cotangent).sum(), function.theta, create_graph=True, materialize_grads=True
    )
    theta = [t.detach() for t in function.theta]
    whole = norm(function.flat(tuple(theta))) if function.size <= WINDOW else together(map(norm, theta))
    typical = whole / math.sqrt(function.size)
    found = {}
    for name, tensor, grad in zip(function.names, function.theta, grads, strict=True):
        length = norm(grad.detach())
        if name in decided or length == 0:
            continue
        found[name] = False
        if grad.requires_grad:
            v = torch.randn(tensor.shape, generator=generator).to(tensor)
            (block,) = torch.autograd.grad(grad, tensor, v, retain_graph=True, materialize_grads=True)
            # biases often begin at zero: their size is then that of a typical weight
            size = max(norm(tensor.detach()), typical * math.sqrt(tensor.numel())) or 1.0
            scale = length / size
            found[name] = norm(block) > CURVED * scale * norm(v)
    return found


def _cotangent(function: Functional, outputs: Tensor, piece: Any, generator: Generator) -> Tensor:
    if function.dtype != torch.float64:
        # in single precision a confident example's p − y does not sum to zero: any cotangent is the safe choice
        return torch.randn(outputs.shape, generator=generator).to(outputs)
    weights = 0.5 + torch.rand(len(outputs), generator=generator).to(outputs)
    return output_gradient(function, piece) * weights.view(-1, *[1] * (outputs.dim() - 1))
