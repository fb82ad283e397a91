"""The loss of a LightningModule: its own method for hessdiag, or its training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hessdiag.errors import ProblemError
from hessdiag.schemes.models.stand_in_trainer import WAY_OUT, StandInTrainer

OWN = "hessdiag_loss"
HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
"""What a module or its data do to each batch before the step."""


def loss_of_module(model: Any, trainer: StandInTrainer) -> Callable[[nn.Module, Any], Tensor]:
    """The loss ``f(model, batch)``.

    Raises:
        ProblemError: the step moves the weights by itself, or takes more than a batch and its number.
    """
    kind = type(model)
    name = OWN if hasattr(kind, OWN) else "training_step"
    rest = () if name == OWN else _rest(model)
    prepared = hooks_of(model, trainer)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result = getattr(model, name)(prepared(model, batch), *rest)
        return _scalar(result.get("loss") if isinstance(result, Mapping) else result, f"{kind.__name__}.{name}")

    loss.__qualname__ = f"{kind.__name__}.{name}"  # how results name the loss
    return loss


def hooks_of(model: Any, trainer: StandInTrainer) -> Callable[[Any, Any], Any]:
    """What is done to a batch before the step; the data module's own come first, as in Lightning."""
    data = trainer.datamodule
    used = [(hook, data if data is not None and overrides(data, hook) else None) for hook in HOOKS]
    used = [(hook, owner) for hook, owner in used if owner is not None or overrides(model, hook)]

    def prepared(model: Any, batch: Any) -> Any:
        for hook, owner in used:
            batch = getattr(model if owner is None else owner, hook)(batch, 0)
        return batch

    return prepared


def overrides(value: Any, name: str) -> bool:
    """Whether an object's class has a method of its own, not Lightning's."""
    function = getattr(type(value), name, None)
    module = str(getattr(inspect.unwrap(function), "__module__", "")) if callable(function) else ""
    return callable(function) and module.partition(".")[0] not in ("pytorch_lightning", "lightning")


def _rest(model: Any) -> tuple[int, ...]:
    """What the step takes behind the batch: its number, and that of its loader."""
    if not getattr(model, "automatic_optimization", True):
        msg = f"{type(model).__name__} optimizes by itself (automatic_optimization=False), its step is no loss: "
        raise ProblemError(msg + WAY_OUT)
    if not overrides(model, "training_step"):
        msg = f"{type(model).__name__} has no training_step: {WAY_OUT}"
        raise ProblemError(msg)
    parameters = list(inspect.signature(model.training_step).parameters.values())
    if parameters and parameters[0].name == "dataloader_iter":
        msg = f"{type(model).__name__}.training_step takes an iterator instead of a batch: {WAY_OUT}"
        raise ProblemError(msg)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return (0,) * max(len(named) - 1, int(several))


def _scalar(loss: Any, what: str) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    msg = f"{what} returned {kind}, no mean loss of the batch: {WAY_OUT}"
    raise ProblemError(msg)
