"""What (model, loss, data) are, in whatever form they come; and refusals that say what to type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hessdiag.criteria import CRITERIA, TARGET_KEYS, Criterion, how_called, recognized
from hessdiag.errors import ProblemError

Role = Literal["model", "loss", "data", "nothing"]
ORDER: tuple[Role, ...] = ("model", "loss", "data")
LOSSES = ", ".join(f'"{name}"' for name in CRITERIA)
EXAMPLE = "for example nn.CrossEntropyLoss(), and a DataLoader, a Dataset or tensors (inputs, targets)"


def splits_of(data: Any) -> Mapping[str, Any]:
    """The data by split: a mapping of splits as it is. All else is "train", a dict of tensors with targets too.

    Raises:
        ProblemError: there is none, or it is no data.
    """
    if role_of(data) == "loss":
        msg = f"data is a loss, {_kind(data)}: give Problem(model, data, criterion=loss), or "
        raise ProblemError(msg + "Problem.of(model, loss, data)")
    if data is None or isinstance(data, nn.Module) or (isinstance(data, Mapping) and not data):
        msg = 'data must name at least one split, data={"train": dataset}, or be one: a DataLoader, a Dataset, '
        raise ProblemError(msg + "tensors (inputs, targets)")
    if not isinstance(data, Mapping):
        return {"train": data}
    arrays = all(isinstance(value, Tensor | np.ndarray) for value in data.values())
    return {"train": data} if arrays and any(key in TARGET_KEYS for key in data) else data


def fields_of(model: Any, loss_fn: Any, data: Any, call: str) -> dict[str, Any]:
    """The fields of a `Problem` that model, loss and data stand for.

    Args:
        model: an ``nn.Module``.
        loss_fn: a name, one of torch's losses, ``f(outputs, targets)``, ``f(outputs, batch)`` or
            ``f(model, batch)``.
        data: a loader, a data set, tensors; or several, by split.
        call: how the caller is spelled, for refusals.

    Raises:
        ProblemError: they are something else, or come in another order.
    """
    roles = tuple(map(role_of, (model, loss_fn, data)))
    said = f"{call}(model, loss_fn, data)"
    if roles[1:] == ("data", "nothing"):
        roles, data = ("model", "nothing", "data"), loss_fn
    lacking = [name for name, role in zip(ORDER, roles, strict=True) if role == "nothing"]
    if lacking:
        msg = f"{said}: {' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing; give {EXAMPLE}"
        raise ProblemError(msg)
    if roles[0] != "model" or roles[1] == "data" or roles[2] != "data":
        given = ", ".join(
            f"{_kind(value)} ({role})" for value, role in zip((model, loss_fn, data), roles, strict=True)
        )
        msg = f"{said}: given were {given}; give them in that order"
        raise ProblemError(msg)
    loss = require_loss(loss_fn)
    by_model = not isinstance(loss, str | Criterion) and how_called(loss) == "f(model, batch)"
    return {"model": model, "data": splits_of(data), ("loss" if by_model else "criterion"): loss_fn}


def require_loss(loss: Any) -> str | Criterion | Callable[..., Any]:
    """A criterion, if that is what it is.

    Raises:
        ProblemError: an unknown name, or nothing that can be called.
    """
    if (known := recognized(loss)) is not None:
        return known
    if isinstance(loss, str) or not callable(loss) or isinstance(loss, type):
        what = repr(loss) if isinstance(loss, str) else _kind(loss)
        msg = f"criterion {what}: allowed: {', '.join(CRITERIA)}, torch's losses such as nn.MSELoss(), "
        raise ProblemError(msg + "f(outputs, targets) and f(outputs, batch)")
    how_called(loss)  # refuses what does not take two arguments
    found: Callable[..., Any] = loss
    return found


def role_of(value: Any) -> Role:
    """What a value can be taken for."""
    if value is None:
        return "nothing"
    if isinstance(value, str | Criterion | nn.modules.loss._Loss | type):
        return "loss"
    if isinstance(value, nn.Module):
        return "model"
    plain = isinstance(value, DataLoader | Dataset | Mapping | Sequence | Tensor | np.ndarray | Iterator)
    return "data" if plain or not callable(value) else "loss"


def _kind(value: Any) -> str:
    return "nothing" if value is None else getattr(value, "__name__", type(value).__name__)
