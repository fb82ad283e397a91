"""Losses that compare outputs and targets element by element: value and second derivative of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hessdiag.criteria.layout import is_index, kind_of, same_numbers, single
from hessdiag.errors import ProblemError

if TYPE_CHECKING:
    from hessdiag.criteria.criterion import Criterion

Law = Callable[[Tensor, Tensor, float, Tensor | float], Tensor]


class Element(NamedTuple):
    """One loss of outputs x and targets y, with its width and the weight of positive targets."""

    loss: Law
    bend: Law  # d²loss/dx²


def _binary(x: Tensor, y: Tensor, _: float, positive: Tensor | float) -> Tensor:
    return (1 - y) * x - (1 + (positive - 1) * y) * F.logsigmoid(x)


def _binary_bend(x: Tensor, y: Tensor, _: float, positive: Tensor | float) -> Tensor:
    return (1 + (positive - 1) * y) * torch.sigmoid(x) * torch.sigmoid(-x)


def _huber(x: Tensor, y: Tensor, width: float, _: Tensor | float) -> Tensor:
    far = (x - y).abs()
    return torch.where(far < width, far.square() / 2, width * (far - width / 2))


def _smooth(x: Tensor, y: Tensor, width: float, one: Tensor | float) -> Tensor:
    return _huber(x, y, width, one) / width if width > 0 else (x - y).abs()


def _inside(x: Tensor, y: Tensor, width: float) -> Tensor:
    return ((x - y).abs() < width).to(x)


LAWS: dict[str, Element] = {
    # not F.mse_loss: its forward-mode derivative fails in torch 2.13 (pytorch#123996)
    "mse": Element(lambda x, y, _, __: (x - y).square(), lambda x, *_: torch.full_like(x, 2.0)),
    "binary_cross_entropy": Element(_binary, _binary_bend),
    "huber": Element(_huber, lambda x, y, width, _: _inside(x, y, width)),
    "smooth_l1": Element(_smooth, lambda x, y, width, _: _inside(x, y, width) / width if width else x * 0),
    "l1": Element(lambda x, y, *_: (x - y).abs(), lambda x, *_: x * 0),
}


def factors(criterion: Criterion, outputs: Tensor) -> Tensor | float:
    """What positive targets weigh.

    Raises:
        ProblemError: weights that do not fit the outputs, or are one per example of a batch.
    """
    for name in ("weight", "pos_weight"):
        weights = getattr(criterion, name)
        if weights is None:
            continue
        shape = f"{name} {tuple(weights.shape)} of {criterion.given} and outputs {tuple(outputs.shape)}"
        if weights.dim() >= outputs.dim() and weights.dim() and weights.shape[0] != 1:
            msg = (
                f"{shape}: one per example of a batch, which says nothing of other batches: put it into the data, "
            )
            raise ProblemError(msg + "and give criterion=lambda outputs, batch: (batch[2] * losses).mean()")
        pairs = zip(weights.shape[::-1], outputs.shape[::-1], strict=False)
        if weights.dim() > outputs.dim() or any(ours not in (1, theirs) for ours, theirs in pairs):
            msg = f"{shape} do not broadcast: give one number per output"
            raise ProblemError(msg)
    return 1.0 if criterion.pos_weight is None else criterion.pos_weight.to(outputs)


def aligned(outputs: Any, targets: Tensor, given: str) -> tuple[Tensor, Tensor]:
    """Outputs, and targets in their dtype, of one shape: torch broadcasts others, every row with every other.

    Raises:
        ProblemError: with the line to type.
    """
    outputs = single(outputs, given)
    if outputs.is_complex() or targets.is_complex():
        msg = f"{given} is of real numbers: give criterion=lambda outputs, batch: ... for complex ones"
        raise ProblemError(msg)
    if targets.shape == outputs.shape:
        return outputs, targets.to(outputs.dtype)
    shapes = f"outputs {tuple(outputs.shape)} and targets {kind_of(targets)}"
    if is_index(targets) and outputs.dim() == targets.dim() + 1 and outputs.shape[1] > 1:
        msg = f"{shapes}: these are class indices; give nn.CrossEntropyLoss() in the place of {given}, or one-hot "
        raise ProblemError(msg + "targets, torch.nn.functional.one_hot(targets, classes).float()")
    if same_numbers(outputs, targets):
        cure = "targets.unsqueeze(-1)" if outputs.dim() > targets.dim() else "targets.squeeze(-1)"
        msg = f"{shapes}: {given} would compare every row with every other: give {cure}"
        raise ProblemError(msg)
    msg = f"{shapes} differ in shape: {given} needs one shape; change either, in data or forward="
    raise ProblemError(msg)
