"""What a batch holds: its tensors, its rows, and pieces of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def row_count(batch: Any) -> int | None:
    """The common first dimension of a batch's tensors, or None if they have none in common."""
    sizes = {leaf.shape[0] if leaf.dim() else -1 for leaf in leaves(batch)}
    return sizes.pop() if len(sizes) == 1 and -1 not in sizes else None


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The batch with ``function`` applied to every tensor in it."""
    return map_leaves(batch, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(batch: Any, function: Callable[[Any], Any], *, whole: Callable[[Any], bool] | None = None) -> Any:
    """The batch with ``function`` applied to everything in it that is no mapping, list or tuple.

    Args:
        batch: to any depth.
        function: of one entry.
        whole: containers that are entries too.
    """
    if whole is not None and whole(batch):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {key: map_leaves(value, function, whole=whole) for key, value in batch.items()}
        return items if isinstance(batch, dict) and type(batch) is dict else type(batch)(items)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(value, function, whole=whole) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_leaves(value, function, whole=whole) for value in batch)
    return function(batch)


def entries(batch: Any, *, whole: Callable[[Any], bool] | None = None) -> list[Any]:
    """Everything in a batch that is no mapping, list or tuple, or that is ``whole``, in a fixed order."""
    found: list[Any] = []
    map_leaves(batch, found.append, whole=whole)
    return found


def leaves(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in a fixed order."""
    return [leaf for leaf in entries(batch) if isinstance(leaf, Tensor)]


def divide(batch: Any, rows: int) -> Iterator[Any]:
    """The batch in pieces of at most ``rows`` examples; whole where its tensors share no first dimension.

    A list of as many texts as there are rows is divided with them.
    """
    total = row_count(batch)
    if total is None or total <= rows:
        yield batch
        return

    def texts(value: Any) -> bool:
        return isinstance(value, list) and len(value) == total and is_texts(value)

    for start in range(0, total, rows):

        def piece(leaf: Any, start: int = start) -> Any:
            return leaf[start : start + rows] if isinstance(leaf, Tensor) or texts(leaf) else leaf

        yield map_leaves(batch, piece, whole=texts)


def is_texts(value: Any) -> bool:
    """Whether it is a list or tuple of nothing but str or bytes, one at least."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str | bytes) for item in value)
