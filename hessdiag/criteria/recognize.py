"""Torch's own losses, as modules and as functions, become a `Criterion`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.criteria.criterion import CRITERIA, Criterion
from hessdiag.errors import ProblemError

MODULES: Mapping[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.NLLLoss: "nll",
    nn.MSELoss: "mse",
    nn.BCEWithLogitsLoss: "binary_cross_entropy",
    nn.HuberLoss: "huber",
    nn.SmoothL1Loss: "smooth_l1",
    nn.L1Loss: "l1",
}
FUNCTIONS: Mapping[Callable[..., Any], str] = {
    F.cross_entropy: "cross_entropy",
    F.nll_loss: "nll",
    F.mse_loss: "mse",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy",
    F.huber_loss: "huber",
    F.smooth_l1_loss: "smooth_l1",
    F.l1_loss: "l1",
}
OF_NAME = {name: function for function, name in FUNCTIONS.items()}
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "cross_entropy": ("weight", "label_smoothing", "ignore_index"),
    "nll": ("weight", "ignore_index"),
    "binary_cross_entropy": ("weight", "pos_weight"),
    "huber": ("delta",),
    "smooth_l1": ("beta",),
}
"""What a loss may be given beside ``reduction``, by torch's names."""
WIDTHS = ("delta", "beta")
KNOWN = ", ".join(f"nn.{module.__name__}()" for module in MODULES)


def recognized(criterion: Any) -> Criterion | None:
    """The criterion that a name, one of torch's loss modules or functions, or a partial of one stands for.

    Args:
        criterion: whatever `Problem.criterion` was given. A subclass of torch's is a loss of its own.

    Returns:
        None where it is something else: a loss to be called.

    Raises:
        ProblemError: reduction="none", which gives no scalar.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        return Criterion(criterion) if criterion in CRITERIA else None
    if isinstance(criterion, type) and criterion in MODULES:
        msg = f"criterion nn.{criterion.__name__} is a class: give an instance, nn.{criterion.__name__}()"
        raise ProblemError(msg)
    if type(criterion) in MODULES:
        name = MODULES[type(criterion)]
        options = {key: getattr(criterion, key) for key in (*OPTIONS.get(name, ()), "reduction")}
        return _with(name, f"nn.{type(criterion).__name__}", options)
    options, function = {}, criterion
    while isinstance(function, partial):
        if function.args:
            return None
        options, function = {**function.keywords, **options}, function.func
    name = FUNCTIONS.get(function, "") if callable(function) and _hashable(function) else ""
    if not name or not set(options) <= {*OPTIONS.get(name, ()), "reduction"}:
        return None
    return _with(name, f"F.{function.__name__}", options)


def by_torch(criterion: Criterion, outputs: Any, targets: Tensor) -> Tensor:
    """The mean by torch's own function on the tensors as they come, times ``scale``."""
    if not criterion.given:
        return AS_NAMED[criterion.name](outputs, targets)
    taken = OPTIONS.get(criterion.name, ())
    options = {key: getattr(criterion, "width" if key in WIDTHS else key) for key in taken}
    options = {k: v.to(outputs) if isinstance(v, Tensor) else v for k, v in options.items()}
    whole = criterion.name in ("cross_entropy", "nll") and not targets.is_floating_point()
    targets = targets.long() if whole else targets.to(outputs.dtype)
    mean: Tensor = OF_NAME[criterion.name](outputs, targets, reduction="mean", **options)
    return mean if criterion.scale is None else mean * criterion.scale


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """As torch takes it, classes second; language models have them last."""
    last = outputs.dim() > 2 and outputs.shape[:-1] == targets.shape
    if last and outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        outputs, targets = outputs.flatten(0, -2), targets.flatten()
    return F.cross_entropy(outputs, targets if targets.is_floating_point() else targets.long())


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape != targets.shape and outputs.squeeze(-1).shape == targets.squeeze(-1).shape:
        targets = targets.reshape(outputs.shape)
    return F.mse_loss(outputs, targets.to(outputs.dtype))


def _next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten().long())


AS_NAMED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "mse": _squared_error,
    "causal_lm": _next_token,
}
"""Criteria given by name, on tensors as our names take them."""


def _with(name: str, given: str, options: Mapping[str, Any]) -> Criterion:
    if options.get("reduction", "mean") not in ("mean", "sum"):
        msg = f"{given}(reduction={options['reduction']!r}) gives no scalar: take reduction='mean' or 'sum'"
        raise ProblemError(msg)
    fields = {("width" if key in WIDTHS else key): value for key, value in options.items() if value is not None}
    fields = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in fields.items()}
    return replace(Criterion(name, given), **fields)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return not isinstance(value, torch.Tensor)
