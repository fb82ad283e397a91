"""Activation checkpointing undone during a measurement.

A recomputation runs in the backward pass, when the model has its own weights back: derivatives would be those of
another function; and its reentrant form refuses `torch.autograd.grad` altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint


@contextmanager
def kept_activations() -> Iterator[None]:
    """A context in which `torch.utils.checkpoint` calls the function and keeps what it computes.

    The two pieces inside of ``checkpoint`` are exchanged, not the function: other packages hold it by name.
    """
    module = torch.utils.checkpoint
    found = {name: getattr(module, name) for name in _PLACES if hasattr(module, name)}
    try:
        for name in found:
            setattr(module, name, _PLACES[name])
        yield
    finally:
        for name, original in found.items():
            setattr(module, name, original)


class _Plain:
    """In place of the reentrant form."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:  # noqa: ARG004
        return function(*args)


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    """In place of what the other form does before and after the call."""
    yield


_PLACES: dict[str, Any] = {
    "CheckpointFunction": _Plain,
    "_checkpoint_without_reentrant_generator": _nothing_around,
    "_checkpoint_without_reentrant_generator_impl": _nothing_around,  # torch 2.14
}
