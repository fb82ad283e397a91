"""Two checkpoints on the same shifted examples: do their scores fall at different rates?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hessdiag.errors import UsageError
from hessdiag.shift.curve import (
    LEAST_EITHER,
    RESAMPLES,
    line_weights,
    over_examples,
    over_levels,
    resampled_means,
)
from hessdiag.shift.results import Array, ShiftCurve, Uncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A number of one checkpoint minus that of the reference, over the same resampled examples."""

    value: float
    over_examples: Uncertainty
    over_levels: Uncertainty | None  # of slopes only, least squares of score - reference's score, as in the paper
    adjusted: float  # p-value over test examples after Holm's (1979) correction for all checkpoints compared


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveDifference:
    """One checkpoint against the reference."""

    name: str
    reference: str
    slope: Difference | None  # None: cannot tell, and ``cannot_tell`` says why
    score: Difference | None  # of the mean score over all levels
    cannot_tell: str = ""


def compare(
    curves: Mapping[str, ShiftCurve], *, reference: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[CurveDifference, ...]:
    """Paired differences of slopes and of mean scores, each checkpoint against the reference.

    Pairs share their resampled test examples, so what all checkpoints find hard cancels. The errors are over test
    examples (and, apart, over levels); two checkpoints say nothing about the recipes they were trained by.

    Args:
        curves: by checkpoint, all from the same test on the same inputs and seed.
        reference: which of them; by default the first.
        resamples: of the bootstrap over test examples.
        seed: names its stream.

    Raises:
        UsageError: fewer than two curves, no such reference, or curves of different examples or shifts.
    """
    names = list(curves)
    base = names[0] if reference is None and names else reference
    if len(names) < 2 or base not in curves:
        msg = f"reference {base!r} of {', '.join(names) or 'no curves'}: name one of at least two curves"
        raise UsageError(msg)
    others = [name for name in names if name != base]
    for name in others:
        _require_pair(name, curves[name], str(base), curves[str(base)])
    drawn = {name: resampled_means(curves[name].levels, resamples, seed) for name in names}
    found = [_difference(name, str(base), curves, drawn) for name in others]
    return _adjusted(found)


def _difference(
    name: str, base: str, curves: Mapping[str, ShiftCurve], drawn: Mapping[str, Array]
) -> CurveDifference:
    one, other = curves[name].levels, curves[base].levels
    used = (one.weights > 0).any(0)
    differ = (one.scores != other.scores).any(0) & used
    number = len(np.unique(one.groups[differ]))
    if number < LEAST_EITHER:
        more = f"needs {LEAST_EITHER - number} more: take more test examples (`samples`)"
        why = f"cannot tell: the two differ on {number} test examples, {more}"
        return CurveDifference(name=name, reference=base, slope=None, score=None, cannot_tell=why)
    gap, gaps, confidence = one.means() - other.means(), drawn[name] - drawn[base], curves[name].confidence
    k = line_weights(one.shifts)
    slope, mean = float(k @ gap), float(gap.mean())
    by_slope = over_examples(slope, gaps @ k, confidence, number)
    by_mean = over_examples(mean, gaps.mean(1), confidence, number)
    return CurveDifference(
        name=name,
        reference=base,
        slope=Difference(
            value=slope,
            over_examples=by_slope,
            over_levels=over_levels(one.shifts, gap, confidence),
            adjusted=by_slope.pvalue,
        ),
        score=Difference(value=mean, over_examples=by_mean, over_levels=None, adjusted=by_mean.pvalue),
    )


def _adjusted(found: list[CurveDifference]) -> tuple[CurveDifference, ...]:
    for part in ("slope", "score"):
        told = [index for index, one in enumerate(found) if getattr(one, part) is not None]
        told.sort(key=lambda index: getattr(found[index], part).over_examples.pvalue)
        largest = 0.0
        for rank, index in enumerate(told):
            difference: Difference = getattr(found[index], part)
            largest = max(largest, min(1.0, difference.over_examples.pvalue * (len(told) - rank)))
            changed = replace(difference, adjusted=largest)
            found[index] = (
                replace(found[index], slope=changed) if part == "slope" else replace(found[index], score=changed)
            )
    return tuple(found)


def _require_pair(name: str, one: ShiftCurve, base: str, other: ShiftCurve) -> None:
    a, b = one.levels, other.levels
    same = one.test == other.test and a.digest == b.digest and a.weights.shape == b.weights.shape
    if not (same and np.array_equal(a.shifts, b.shifts) and np.array_equal(a.weights, b.weights)):
        msg = (
            f"{name} and {base} were not tested on the same examples and shifts: run one test on both, "
            "with the same inputs, seed and levels"
        )
        raise UsageError(msg)
    if a.scores.shape[1] != b.scores.shape[1]:
        msg = f"{name} and {base} have scores of {a.scores.shape[1]} and {b.scores.shape[1]} examples"
        raise UsageError(msg)
