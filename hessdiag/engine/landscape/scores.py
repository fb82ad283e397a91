"""What a model makes of each example: its loss, whether it is right, by what margin and with what confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.criteria import IGNORE_INDEX, align_classes, is_index
from hessdiag.errors import ProblemError
from hessdiag.problem import Problem


@dataclass(frozen=True)
class Scores:
    """Per example; with a class per position (a language model) per position that counts.

    Attributes:
        loss: (n,) float64. Its weighted mean is the loss of the sample set.
        correct: (n,) bool, or None where there are no integer classes.
        margin: (n,) float64, true logit minus the best other one, or None.
        confidence: (n,) float64, largest softmax probability, or None.
    """

    loss: Tensor
    correct: Tensor | None = None
    margin: Tensor | None = None
    confidence: Tensor | None = None


def classes(problem: Problem, outputs: Any, batch: Any) -> tuple[Tensor, Tensor] | None:
    """Logits (n, classes) and integer classes (n,), -100 where a position does not count; or None."""
    known = problem.built_in
    try:
        targets = problem.targets(batch)
        if not is_index(targets) or (known is not None and not known.of_classes):
            return None
        logits, labels = align_classes(outputs, targets) if known is None else known.align(outputs, targets)
    except ProblemError:
        return None
    return (logits, labels) if logits.shape[1] > 1 else None


def right(problem: Problem, outputs: Any, batch: Any) -> Tensor:
    """How many positions are classified right, a scalar; 0 where there are no classes."""
    found = classes(problem, outputs, batch)
    if found is None:
        return torch.zeros(())
    logits, labels = found
    return (logits.argmax(-1) == labels).sum()


def normalized(problem: Problem, outputs: Tensor, batch: Any) -> Tensor:
    """Logits centred over the classes and divided by their length, in the outputs' own layout.

    Raises:
        ProblemError: there are no classes.
    """
    found = classes(problem, outputs, batch)
    if found is None:
        msg = "logits can be normalised for integer classes only"
        raise ProblemError(msg)
    places = problem.targets(batch).shape
    by_torch = problem.built_in is not None and problem.built_in.given  # torch has the classes second, always
    last = not by_torch and outputs.shape[-1] == found[0].shape[1] and outputs.shape[:-1] == places
    axis = -1 if last else 1
    centred = outputs - outputs.mean(axis, keepdim=True)
    tiny = torch.finfo(outputs.dtype).tiny
    return centred / centred.square().sum(axis, keepdim=True).clamp(min=tiny).sqrt()


def from_outputs(problem: Problem, outputs: Tensor, batch: Any) -> Scores | None:
    """The scores of a batch from its outputs alone; None where the loss is not a built-in one."""
    known = problem.built_in
    if known is None or not known.unweighted:
        return None
    if not known.of_classes:
        terms = known.each(outputs.double(), problem.targets(batch))
        return Scores(terms.reshape(len(outputs), -1).mean(1).cpu())
    found = classes(problem, outputs, batch)
    if found is None:
        return Scores(known.each(outputs.double(), problem.targets(batch)).cpu())
    logits, labels = found
    kept = labels != IGNORE_INDEX
    logits, labels = logits[kept].double(), labels[kept]
    return with_classes(known.of_aligned(logits, labels), logits, labels)


def with_classes(loss: Tensor, logits: Tensor, labels: Tensor) -> Scores:
    """Scores of examples with logits (n, classes), float64, and labels (n,)."""
    true = logits.gather(1, labels[:, None])[:, 0]
    best = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    confidence = logits.softmax(1).amax(1)
    return Scores(loss.cpu(), (logits.argmax(1) == labels).cpu(), (true - best).cpu(), confidence.cpu())


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of all batches; what one of them lacks, all lack."""

    def together(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if any(one is None for one in found) else torch.cat(found)

    return Scores(
        torch.cat([part.loss for part in parts]), together("correct"), together("margin"), together("confidence")
    )
