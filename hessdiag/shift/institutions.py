"""Tests of pictures with several findings: another institution's test set (T6), and sets by other findings (T7).

After the chest X-ray tests of Sandler, Klabjan and Luo (arXiv 2102.11210): the score is the mean AUROC, or F1 at a
probability of .5, over the labels that both sources share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import UsageError
from hessdiag.shift.curve import curve
from hessdiag.shift.experiments import other_source
from hessdiag.shift.inputs import make_levels
from hessdiag.shift.labels import auroc_scores, chosen, f1_scores
from hessdiag.shift.results import LEAST, Array, ShiftCurve

Labelled = tuple[Array, NDArray[np.bool_]]
SCORED = {
    "accuracy": lambda logits, labels: ((logits > 0) == labels).mean(1),
    "auroc": auroc_scores,
    "f1": f1_scores,
}


def other_institution(
    home: Labelled, other: Labelled, *, score: str = "auroc", labels: Sequence[int] = (), **options: Any
) -> ShiftCurve:
    """Another institution's test set against one's own, over the labels both share (test T6).

    Labels that fewer than 10 examples of either set have, or lack, are left out, with a note: in the paper
    such a label is left out of that set's mean alone, which then is a mean of other labels than the one it is
    compared with. Cost: no model.

    Args:
        home: logits and labels of one's own test examples, (n, labels) each, what `labelled` gives.
        other: the other institution's, with the same columns.
        score: "accuracy", "auroc" or "f1": a mean over labels.
        labels: columns that both sources mean the same by; none for all.
        options: those of `other_source`.

    Raises:
        UsageError: columns that do not fit, no such score or label, or too few examples of every label.
        BudgetError: fewer than 50 examples in a set.
    """
    if home[1].shape[1] != other[1].shape[1]:
        msg = (
            f"{home[1].shape[1]} labels at home and {other[1].shape[1]} at the other source: give the same columns"
        )
        raise UsageError(msg)
    where = np.repeat([0, 1], [len(home[1]), len(other[1])])
    both = np.concatenate([home[1], other[1]])
    kept = chosen(both, where, labels)
    sets = [_scored(score, logits[:, kept], true[:, kept]) for logits, true in (home, other)]
    notes = (*options.pop("notes", ()), _said(score, kept, labels, both.shape[1]))
    return other_source(*sets, notes=notes, **options)


def by_findings(
    test: Labelled,
    *,
    labels: Sequence[int],
    score: str = "auroc",
    identity: str = "",
    least: float = LEAST,
    seed: int = 0,
    **options: Any,
) -> ShiftCurve:
    """The score on examples with ever more findings beside the labels that count (test T7).

    An example's level is how many of the other labels it has. The mean is over the same labels at every level:
    those with 10 examples and 10 without at each. Cost: no model.

    Args:
        test: logits and labels of the test examples, (n, labels) each, what `labelled` gives.
        labels: columns that count; the others are the findings.
        score: "accuracy", "auroc" or "f1": a mean over the labels.
        identity: names the examples, so that only checkpoints tested on the same ones are compared.
        least: examples that a level needs, or it is left out.
        seed: names the bootstrap's stream.
        options: ``confidence``, ``resamples`` and ``notes`` of `curve`.

    Raises:
        UsageError: no such score or label, no label is left to be a finding, or too few examples of every label.
        BudgetError: fewer than two levels have enough examples.
    """
    logits, true = test
    beside = [k for k in range(true.shape[1]) if k not in set(labels)]
    if not labels or not beside:
        msg = f"`labels={','.join(map(str, labels))}` of {true.shape[1]}: some must count, and others be findings"
        raise UsageError(msg)
    number = true[:, beside].sum(1)
    levels = [level for level in np.unique(number) if (number == level).sum() >= least]
    inside = np.isin(number, levels)
    kept = chosen(true[inside], number[inside], labels) if len(levels) > 1 else list(labels)
    scores = np.zeros(len(true))
    for level in levels if len(levels) > 1 else ():
        here = number == level
        scores[here] = _scored(score, logits[here][:, kept], true[here][:, kept])
    every = np.unique(number)
    weights = (number == every[:, None]).astype(float)
    return curve(
        make_levels(every.astype(float), weights, scores[None], identity),
        test="by findings",
        parameter="findings beside the labels that count",
        least=least,
        seed=seed,
        notes=(*options.pop("notes", ()), _said(score, kept, labels, true.shape[1])),
        **options,
    )


def _scored(score: str, logits: Array, labels: NDArray[np.bool_]) -> Array:
    if score not in SCORED:
        msg = f"`score={score}`: allowed: {', '.join(SCORED)}"
        raise UsageError(msg)
    found: Array = SCORED[score](logits, labels)
    return found


def _said(score: str, kept: Sequence[int], asked: Sequence[int], width: int) -> str:
    number = len(asked) or width
    left = f"; {number - len(kept)} have too few examples with or without them" if len(kept) < number else ""
    name = score if score == "accuracy" else f"{score.upper()}, where accuracy is said,"
    return f"{name} is the mean over {len(kept)} of {number} labels{left}"
