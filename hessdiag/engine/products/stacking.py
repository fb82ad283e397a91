"""Batches of one shape as one stacked batch, so that `torch.func.vmap` passes through them together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.samples import leaves, map_tensors, row_count

STACKED_COPIES = 500_000  # most elements of copies of θ in a stack of batches: a ResNet-20 gains nothing
LEAST_COPIES = 4  # 8 x 16 images: an MLP of 55,050 took half the time, one of 199,210, two at a time, a tenth more
STACKED_WORK = 16_000_000  # most examples x parameters of a batch: 128 x 55,050 gained 30%, 1,000 x 55,050 nothing
STACKED_BYTES = 64 * 2**20  # most data to be held a second time


@dataclass(frozen=True)
class Stack:
    """Some batches of one shape.

    Attributes:
        indices: which batches they are.
        tensors: every tensor of a batch with a first dimension of its own for the batches.
        first: the first batch, for its structure.
    """

    indices: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    first: Any

    def batch(self, tensors: Sequence[Tensor]) -> Any:
        """A batch with the structure of the first and these tensors."""
        return filled(self.first, tensors)


def filled(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """The batch with other tensors in its places."""
    left = iter(tensors)
    return map_tensors(batch, lambda _: next(left))


def joined(batches: Sequence[Any]) -> Any | None:
    """All rows as one batch; None where the batches have no rows, or differ in more than their number."""
    if any(row_count(batch) is None for batch in batches):
        return None
    if len({repr(map_tensors(batch, lambda leaf: (leaf.dtype, leaf.shape[1:]))) for batch in batches}) > 1:
        return None
    columns = zip(*(leaves(batch) for batch in batches), strict=True)
    return filled(batches[0], [torch.cat(column) for column in columns])


def stacks(batches: Sequence[Any], most: int) -> tuple[Stack, ...]:
    """The batches, those of one shape together, at most ``most`` of them in a stack; all else must be equal."""
    alike: dict[str, list[int]] = {}
    for index, batch in enumerate(batches):
        shape = repr(map_tensors(batch, lambda leaf: f"{leaf.dtype} {tuple(leaf.shape)}"))
        alike.setdefault(shape, []).append(index)
    found = []
    for indices in alike.values():
        for begin in range(0, len(indices), most):
            some = indices[begin : begin + most]
            columns = zip(*(leaves(batches[index]) for index in some), strict=True)
            found.append(Stack(tuple(some), tuple(torch.stack(c) for c in columns), batches[some[0]]))
    return tuple(found)


def vmapped(function: Callable[..., Any], *columns: Any) -> Any:
    """`torch.func.vmap` over the common first dimension of the columns, in `quiet_vmap`."""
    with quiet_vmap():
        return torch.func.vmap(function)(*columns)


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Without torch's word on operations that vmap takes one by one: they are slow there, and right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


@contextmanager
def batching_rules_only() -> Iterator[None]:
    """Refuse an operation that vmap would take one by one, which makes a stack slower, not faster."""
    before = torch._C._functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
    torch._C._functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(before)  # type: ignore[attr-defined]


def worth_stacking(batches: Sequence[Any], size: int) -> bool:
    """Whether several batches have one shape and are small, and copies of θ and of the data for each too."""
    shapes = [row_count(batch) for batch in batches]
    held = sum(leaf.numel() * leaf.element_size() for batch in batches for leaf in leaves(batch))
    small = size * LEAST_COPIES <= STACKED_COPIES and size * max(rows or 0 for rows in shapes) <= STACKED_WORK
    return small and held <= STACKED_BYTES and len(set(shapes)) < len(shapes)
