"""Several labels an example: who is right, and the mean AUROC and F1 over labels as numbers per example.

A test set's AUROC is no mean over examples. Its linear part is: the AUROC plus each example's influence on it.
The mean of that is the AUROC, and its variance over the number of examples is that of DeLong, DeLong and
Clarke-Pearson (1988); likewise F1, a ratio of two means. Such numbers are resampled and compared in pairs as
accuracies are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from hessdiag.criteria import target_of
from hessdiag.engine.products.functional import Functional
from hessdiag.errors import NonFiniteError, ProblemError, UsageError
from hessdiag.problem import Problem
from hessdiag.shift.results import Array

FEWEST = 10  # examples with a label, and without it: fewer do not say how well an AUROC is known
BINARY = "binary_cross_entropy"


def hits(problem: Problem, outputs: Any, targets: Tensor) -> Tensor | None:
    """The share of each example's labels that the sign of its logit gets right, (n,); None: no such labels."""
    return ((outputs > 0) == (targets > 0.5)).double().mean(1) if of_labels(problem, outputs, targets) else None


def of_labels(problem: Problem, outputs: Any, targets: Tensor) -> bool:
    """Whether targets are 0 or 1 for each of several labels, and outputs their logits."""
    known = problem.built_in
    return (
        known is not None
        and known.name == BINARY
        and isinstance(outputs, Tensor)
        and outputs.dim() == 2
        and outputs.shape == targets.shape
        and bool(((targets == 0) | (targets == 1)).all())
    )


def labelled(problem: Problem, batches: Sequence[Any]) -> tuple[Array, NDArray[np.bool_]]:
    """Logits and labels of every example, both (n, labels); one forward pass in evaluation mode.

    Args:
        problem: with targets of 0 and 1 shaped as the outputs, and criterion torch.nn.BCEWithLogitsLoss().
        batches: those of a `SampleSet`.

    Raises:
        ProblemError: it is another kind of problem.
        NonFiniteError: NaN or infinity in the outputs.
    """
    function = Functional(problem)
    logits, labels = [], []
    with function.measuring(), torch.no_grad():
        for batch in batches:
            here = function.place(batch)
            outputs, targets = function.outputs(function.theta, here), target_of(here)
            if not of_labels(problem, outputs, targets):
                msg = (
                    "examples have not several labels (targets of 0 and 1 shaped as the outputs, criterion "
                    "torch.nn.BCEWithLogitsLoss()): take `score='accuracy'`, no `labels`, no test findings"
                )
                raise ProblemError(msg)
            if not outputs.isfinite().all():
                msg = "the model's outputs hold NaN or infinity: is this checkpoint the right one?"
                raise NonFiniteError(msg)
            logits.append(outputs.double().cpu().numpy())
            labels.append((targets > 0.5).cpu().numpy())
    return np.concatenate(logits), np.concatenate(labels)


def auroc_scores(logits: Array, labels: NDArray[np.bool_]) -> Array:
    """Numbers per example, (n,), whose mean is the mean AUROC over labels, ties counting half.

    Args:
        logits: (n, labels).
        labels: (n, labels); each column needs both outcomes.

    Raises:
        UsageError: a label that all or no examples have.
    """
    columns = [_auroc(logits[:, k], labels[:, k]) for k in range(labels.shape[1])]
    scores: Array = np.mean(columns, axis=0)
    return scores


def f1_scores(logits: Array, labels: NDArray[np.bool_]) -> Array:
    """Numbers per example, (n,), whose mean is the mean F1 over labels of logits above 0 (a probability of .5).

    Args:
        logits: (n, labels).
        labels: (n, labels).

    Raises:
        UsageError: a label that no example has.
    """
    columns = []
    for k in range(labels.shape[1]):
        told, true = logits[:, k] > 0, labels[:, k]
        if not true.any():
            msg = f"label {k} is at none of {len(true)} examples: leave it out of `labels`"
            raise UsageError(msg)
        top, bottom = 2.0 * (told & true), told.astype(float) + true
        value = top.mean() / bottom.mean()
        columns.append(value + (top - value * bottom) / bottom.mean())
    scores: Array = np.mean(columns, axis=0)
    return scores


def chosen(labels: NDArray[np.bool_], places: NDArray[np.int64], asked: Sequence[int]) -> list[int]:
    """The labels asked for that have `FEWEST` examples with and without them at every place.

    Args:
        labels: (n, labels).
        places: (n,), what the examples are put apart by.
        asked: columns; none for all.

    Raises:
        UsageError: no such label, or none has enough examples.
    """
    width = labels.shape[1]
    if wrong := [k for k in asked if not 0 <= k < width]:
        msg = f"`labels={wrong[0]}`: labels are 0 to {width - 1}"
        raise UsageError(msg)
    kept = []
    for k in asked or range(width):
        having = [labels[places == place, k] for place in np.unique(places)]
        if all(min(part.sum(), (~part).sum()) >= FEWEST for part in having):
            kept.append(k)
    if not kept:
        msg = f"no label has {FEWEST} examples with and {FEWEST} without it in every set: give more `samples`"
        raise UsageError(msg)
    return kept


def _auroc(logits: Array, true: NDArray[np.bool_]) -> Array:
    n, ones = len(true), int(true.sum())
    zeros = n - ones
    if not (ones and zeros):
        msg = f"a label is at {ones} of {n} examples: an AUROC needs some with it and some without"
        raise UsageError(msg)
    ranks = rankdata(logits)
    # of an example with the label, the share of those without that it beats; and the other way
    beats = np.empty(n)
    beats[true] = (ranks[true] - rankdata(logits[true])) / zeros
    beats[~true] = 1 - (ranks[~true] - rankdata(logits[~true])) / ones
    value = beats[true].mean()
    influence = np.where(true, n / ones, n / zeros) * (beats - value)
    scores: Array = value + influence
    return scores
