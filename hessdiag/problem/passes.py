"""What a model takes from a batch, and what a loss must give."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from hessdiag.errors import ProblemError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without DataParallel, DistributedDataParallel or torch.compile around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def takes_each(model: nn.Module, inputs: Any) -> bool:
    """Whether inputs ``(x1, x2)`` are the model's arguments one by one: it cannot be called with one."""
    if not isinstance(inputs, list | tuple):
        return False
    try:
        signature = inspect.signature(model.forward)
        signature.bind(inputs)
    except TypeError:
        return True
    except ValueError:  # code without a signature
        return False
    return False


def require_scalar(value: Any, name: str) -> Tensor:
    """The value, if it is a scalar floating tensor.

    Raises:
        ProblemError: it is not.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        msg = f"{name} returned {shape}, not a scalar: return the mean loss of the batch"
        raise ProblemError(msg)
    return value.reshape(())
