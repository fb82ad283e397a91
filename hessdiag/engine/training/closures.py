"""What a user's closure may be: evaluated once, with refusals that say what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from hessdiag.errors import MeasurementError, UsageError, one_line

Closure = Callable[[], Tensor]
Closures = Closure | Sequence[Closure]
ANEW = (
    "the closure must compute the loss anew at each call, forward pass included, and not call backward() "
    "(or say backward_inside=True)"
)


def closures(closure: Closures) -> list[Closure]:
    """One function per micro-batch.

    Raises:
        UsageError: there is none, or something else.
    """
    parts: list[Any] = (
        [closure] if callable(closure) else list(closure) if isinstance(closure, Sequence) else [closure]
    )
    if not parts or not all(callable(part) for part in parts):
        msg = "step(closure) takes a function returning the loss, or a list of them, one per micro-batch"
        raise UsageError(msg)
    return parts


def left_in_grad(
    closure: Closure, params: Sequence[Tensor], share: float
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss and share · gradient of a closure that calls backward() by itself; ``.grad`` is put back."""
    held = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        with torch.enable_grad(), refusals():
            loss = closure()
        pieces = tuple(None if param.grad is None else param.grad * share for param in params)
    finally:
        for param, grad in zip(params, held, strict=True):
            param.grad = grad
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        msg = f"the closure returned {type(loss).__name__}: return the loss, a scalar tensor, after its backward()"
        raise UsageError(msg)
    if all(piece is None for piece in pieces):
        msg = "the closure left no gradient: with backward_inside=True it calls zero_grad() and backward() itself"
        raise UsageError(msg)
    return loss.detach().reshape(()), pieces


def evaluated(closure: Closure, params: Sequence[Tensor]) -> Tensor:
    """One forward pass: the scalar loss with its graph."""
    versions = [param._version for param in params]
    with torch.enable_grad():
        loss = closure()
    if not isinstance(loss, Tensor):
        msg = f"the closure returned {type(loss).__name__}: return the loss, a scalar tensor, without .item()"
        raise UsageError(msg)
    if loss.numel() != 1 or not loss.is_floating_point():
        msg = (
            f"the closure returned a {loss.dtype} tensor of shape {tuple(loss.shape)}: return one number, the mean"
        )
        raise UsageError(msg)
    if not loss.requires_grad:
        msg = (
            "the closure's loss has no graph: compute it anew from the model, without no_grad() and .detach(), "
            "or say backward_inside=True if the closure calls backward()"
        )
        raise UsageError(msg)
    if loss.grad_fn is not None:
        notes = cast(dict[str, Any], loss.grad_fn.metadata)  # torch's stub calls it a function
        if "hessdiag" in notes:
            raise UsageError(ANEW)
        notes["hessdiag"] = True
    changed = [index for index, param in enumerate(params) if param._version != versions[index]]
    if changed:
        shape = tuple(params[changed[0]].shape)
        msg = f"the closure changed parameter {changed[0]} {shape} in place: leave updates to step()"
        raise UsageError(msg)
    return loss.reshape(())


@contextmanager
def refusals() -> Iterator[None]:
    """Torch's errors about graphs, as one line with the way out."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "second time" in text or "inplace operation" in text:
            raise UsageError(ANEW) from error
        if "support double backward" in text:
            msg = "torch.compile's graphs are differentiated once: call the model itself in the closure, "
            raise UsageError(msg + "not the compiled one; or take one of gradients alone (SAM, NSO)") from error
        if "not implemented" in text or "once_differentiable" in text or "CudnnRNN" in text:
            msg = f"the loss has no second derivatives: {one_line(error, 160)}; replace that layer"
            raise MeasurementError(msg) from error
        raise


def refuse_sparse(pieces: Sequence[Tensor | None]) -> None:
    """Refuses gradients that are not dense, such as those of embeddings with ``sparse=True``."""
    for index, piece in enumerate(pieces):
        if piece is not None and piece.layout != torch.strided:
            msg = (
                f"parameter {index} {tuple(piece.shape)} has a sparse gradient: set sparse=False in its embedding"
            )
            raise UsageError(msg)
