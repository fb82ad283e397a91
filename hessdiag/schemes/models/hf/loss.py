"""The model's own loss against the criterion that stands for it, on the first examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.criteria import TARGET_KEYS, Criterion, recognized, target_of
from hessdiag.errors import HessdiagError
from hessdiag.problem import Problem
from hessdiag.samples import draw
from hessdiag.schemes.models.hf.quiet import quiet

EXAMPLES = 4
RTOL = 1e-5  # of float32 sums; an auxiliary loss or smoothing changes far more


def forward_of(main: str, *, second: bool) -> Callable[[nn.Module, Any], Any]:
    """What gives the logits of a batch.

    Args:
        main: name of the model's input, for batches ``(input, target)``.
        second: whether classes are to come second, as torch's losses have them.
    """

    def logits(model: nn.Module, batch: Any) -> Any:
        found = model(**_inputs(batch, main)).logits
        return found.transpose(1, -1) if second else found

    return logits


def own_loss(main: str, name: str) -> Callable[[nn.Module, Any], Tensor]:
    """The loss that the library's model gives where labels are given.

    Args:
        main: name of the model's input, for batches ``(input, target)``.
        name: of the model's class, for reports.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = model(**_inputs(batch, main), labels=target_of(batch)).loss
        return found

    loss.__qualname__ = f"{name}.loss"
    return loss


def terms_of(criterion: Any) -> Callable[[Any], float]:
    """How many terms the mean of a batch stands for."""
    known = recognized(criterion)
    assert isinstance(known, Criterion)

    def terms(batch: Any) -> float:
        return float(known.terms(known.targets(batch)))

    return terms


def differs(
    model: nn.Module, data: Mapping[str, Any], criterion: Any, forward: Any, loss: Any
) -> tuple[float, float] | str | None:
    """Whether the model's own loss is another than the criterion.

    Args:
        model: with its weights.
        data: by split; the first examples of the first split are looked at.
        criterion: as `Problem.criterion`.
        forward: as `Problem.forward`.
        loss: the model's own, as `Problem.loss`.

    Returns:
        None where they agree; the two values; or why the criterion is none of these outputs.
    """
    split, source = next(iter(data.items()))
    batch = draw(source, split=split, samples=EXAMPLES, batch_size=EXAMPLES).batches[0]
    problem = Problem(model, data, criterion=criterion, forward=forward)
    with torch.no_grad(), quiet():
        own = float(loss(model, batch))
        try:
            found = float(problem.loss_sum(problem.outputs(model, batch), batch)) / problem.count(batch)
        except HessdiagError as error:
            return str(error)
    return None if abs(own - found) <= RTOL * max(abs(own), abs(found)) else (own, found)


def _inputs(batch: Any, main: str) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in TARGET_KEYS}
    return {main: batch[0]}
