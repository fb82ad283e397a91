"""Derivatives of a part of a model along tangents: its own change (forward), and its gradients' (backward)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hessdiag.samples import map_tensors
from hessdiag.shown import leave_out_torchs_own

Tangents = list[tuple[Tensor, ...]]  # per vector, one per input


@functools.cache
def load_forward_mode() -> None:
    """Let torch import what forward mode needs, before the first use: it warns of its own code there."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        leave_out_torchs_own()
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


def push_forward(
    call: Callable[..., tuple[Any, Tensor]], primals: Sequence[Tensor], along: Tangents
) -> tuple[Any, list[Tensor]]:
    """What a call returns, and the change of y along tangents, by forward mode; one call per vector, no graph.

    Args:
        call: of the primals, gives anything and y, a tensor in it.
        primals: what to call it on.
        along: what moves with them.
    """
    load_forward_mode()
    output: Any = None
    moves = []
    with torch.no_grad():
        for tangents in along:
            with forward_ad.dual_level():
                pairs = zip(primals, tangents, strict=True)
                output, y = call(*(forward_ad.make_dual(p.detach(), t) for p, t in pairs))  # type: ignore[no-untyped-call]
                y, move = forward_ad.unpack_dual(y)  # type: ignore[no-untyped-call]
                moves.append(torch.zeros_like(y) if move is None else move)
                output = map_tensors(output, lambda t: forward_ad.unpack_dual(t).primal)  # type: ignore[no-untyped-call]
    return output, moves


def push(y: Tensor, inputs: Sequence[Tensor], along: Tangents) -> list[Tensor]:
    """The change of y along tangents of the inputs, by differentiating Jᵀu with respect to u; keeps y's graph."""
    u = torch.zeros_like(y, requires_grad=True)
    pulled = torch.autograd.grad(y, inputs, u, create_graph=True, materialize_grads=True)
    live = [index for index, piece in enumerate(pulled) if piece.requires_grad]
    if not live:
        return [torch.zeros_like(y) for _ in along]
    heads = [pulled[index] for index in live]
    return [
        torch.autograd.grad(
            heads, u, [tangents[index] for index in live], retain_graph=True, materialize_grads=True
        )[0]
        for tangents in along
    ]


def pull(
    y: Tensor,
    inputs: Sequence[Tensor],
    grad: Tensor | None,
    moves: list[Tensor] | None,
    along: Tangents,
    *,
    last: bool = True,
) -> tuple[Tensor | None, Tangents]:
    """How the gradient of <grad, y> changes along tangents of the inputs, and and with changes of grad itself.

    Returns:
        The gradient by the last input (None without grad), and per vector the changes for all inputs.
    """
    pulled: tuple[Tensor, ...] = ()
    if grad is not None and inputs and y.requires_grad:
        pulled = torch.autograd.grad(y, inputs, grad, create_graph=True, materialize_grads=True)
    first = pulled[-1].detach() if pulled else None
    live = [index for index, piece in enumerate(pulled) if piece.requires_grad]
    heads = [pulled[index] for index in live] + ([] if moves is None else [y])
    if not heads or not inputs or not y.requires_grad:
        return first, [tuple(torch.zeros_like(tensor) for tensor in inputs) for _ in along]
    changes = []
    for number, tangents in enumerate(along):
        weights = [tangents[index] for index in live] + ([] if moves is None else [moves[number]])
        keep = not last or number + 1 < len(along)
        changes.append(torch.autograd.grad(heads, inputs, weights, retain_graph=keep, materialize_grads=True))
    return first, changes
