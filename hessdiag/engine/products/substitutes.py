"""Operations that torch cannot differentiate twice, as compositions of operations that it can.

Each has the same values and, where they exist, the same derivatives. They stand in while a measurement runs, for
calls from anywhere (``torch.nn`` looks each of them up when it is called), and are taken back afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EMBEDDING = torch.embedding
REDUCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (lambda losses: losses, torch.mean, torch.sum)
SUM, MEAN, MAX = range(3)  # torch's numbers for the modes of an embedding bag


def hardsigmoid(x: Tensor) -> Tensor:
    """Piecewise linear: its second derivative is 0 almost everywhere, and missing in torch."""
    return F.relu6(x + 3) / 6


def hardsigmoid_(x: Tensor) -> Tensor:
    """The same in place."""
    return x.copy_(hardsigmoid(x))


def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001
) -> Tensor:
    """With a dense gradient: a sparse one has no derivative."""
    found = EMBEDDING(weight, indices, padding_idx, scale_grad_by_freq, False)
    lookups = _lookups.get()
    if lookups is None or padding_idx < 0 or not weight.requires_grad:
        return found
    row = weight.detach().new_zeros(weight.shape[1], requires_grad=True)
    lookups.append((weight, row))
    return found + (indices == padding_idx)[..., None] * row


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,  # noqa: ARG001
    mode: int = SUM,
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows looked up one by one, then summed, averaged or compared bag by bag."""
    bags = len(offsets) - 1 if include_last_offset else len(offsets)
    places = torch.arange(len(indices), device=indices.device)
    bag = torch.searchsorted(offsets[:bags].contiguous(), places.to(offsets.dtype), right=True) - 1
    counts_here = torch.ones_like(indices, dtype=torch.bool)
    if padding_idx is not None:
        counts_here = indices != padding_idx % len(weight)
    kept, bag = indices[counts_here], bag[counts_here]
    rows = EMBEDDING(weight, kept)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[counts_here][:, None]
    sizes = torch.bincount(bag, minlength=bags)
    if mode == MAX:
        found = _largest(rows, bag, bags)
    else:
        found = rows.new_zeros(bags, weight.shape[1]).index_add(0, bag, rows)
        if mode == MEAN:
            found = found / sizes.clamp(min=1)[:, None]
    return found, bag, sizes, offsets


def _largest(rows: Tensor, bag: Tensor, bags: int) -> Tensor:
    """The largest entry of each column in each bag; 0 in an empty bag."""
    columns = [rows[bag == b] for b in range(bags)]
    return torch.stack([c.max(0).values if len(c) else rows.new_zeros(rows.shape[1]) for c in columns])


def multi_margin_loss(
    x: Tensor, target: Tensor, p: float = 1, margin: float = 1, weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    """Σ_{j ≠ y} max(0, margin − x_y + x_j)^p over the number of classes."""
    rows, labels = (x[None], target.reshape(1)) if x.dim() < 2 else (x, target)
    hinge = (margin - rows.gather(1, labels[:, None]) + rows).clamp(min=0) ** int(p)
    if weight is not None:
        hinge = hinge * weight[labels][:, None]
    wrong = torch.ones_like(rows).scatter(1, labels[:, None], 0.0)
    losses = (hinge * wrong).sum(1) / rows.shape[1]
    return REDUCTIONS[reduction](losses if x.dim() > 1 else losses[0])


def multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """Σ over a row's labels j and its other classes i of max(0, 1 − x_j + x_i), over the number of classes."""
    rows, labels = (x[None], target[None]) if x.dim() < 2 else (x, target)
    named = (labels >= 0).cumprod(1).bool()  # labels end at the first negative one
    places = labels.clamp(min=0)
    right = torch.zeros_like(rows).scatter_add(1, places, named.to(rows)) > 0
    hinge = (1 - rows.gather(1, places)[:, :, None] + rows[:, None, :]).clamp(min=0)
    pairs = named[:, :, None] & ~right[:, None, :]
    losses = (hinge * pairs).sum((1, 2)) / rows.shape[1]
    return REDUCTIONS[reduction](losses if x.dim() > 1 else losses[0])


SUBSTITUTES: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (torch._C._nn, "hardsigmoid", hardsigmoid),
    (torch._C._nn, "hardsigmoid_", hardsigmoid_),
    (torch._C._nn, "multi_margin_loss", multi_margin_loss),
    (torch._C._nn, "multilabel_margin_loss", multilabel_margin_loss),
    (torch, "embedding", embedding),
    (torch, "embedding_bag", embedding_bag),
)

_lookups: ContextVar[list[tuple[Tensor, Tensor]] | None] = ContextVar("lookups", default=None)
_lock = Lock()
_originals: list[Any] = []
_users = 0


@contextmanager
def masked_rows() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within `twice_differentiable`: each table whose gradient a lookup masks, and zeros added to the masked row.

    The gradient by these zeros is what the mask leaves out.
    """
    lookups: list[tuple[Tensor, Tensor]] = []
    token = _lookups.set(lookups)
    try:
        yield lookups
    finally:
        _lookups.reset(token)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """The substitutes in force, in every thread: their values are the same, so that others notice nothing."""
    global _users  # torch is one for all threads: whoever leaves last puts it back
    with _lock:
        _users += 1
        if _users == 1:
            _originals[:] = [getattr(room, name) for room, name, _ in SUBSTITUTES]
            for room, name, substitute in SUBSTITUTES:
                setattr(room, name, substitute)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for (room, name, _), original in zip(SUBSTITUTES, _originals, strict=True):
                    setattr(room, name, original)


@contextmanager
def uncompiled() -> Iterator[None]:
    """What torch.compile has compiled runs eagerly: compiled code has no second derivatives."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
