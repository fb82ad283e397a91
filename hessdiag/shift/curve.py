"""From levels of shift to a curve: points with their errors, and the regression line with its two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import linregress, norm

from hessdiag.errors import BudgetError, UsageError
from hessdiag.shift.results import (
    LEAST,
    Array,
    Levels,
    ShiftCurve,
    ShiftPoint,
    Slope,
    Uncertainty,
)
from hessdiag.spectral.probes import stream

LEAST_EITHER = 10
"""Examples right, and wrong, that an interval needs: with 9 wrong on average 95% intervals covered 93%, with 38,
95% (importance weighting of synthetic data, 300 seeds)."""
LEAST_LEVELS = 3  # a line through two points has no residual
RESAMPLES = 1000  # the standard error is then known to 2%
BLOCK = 100  # resamples held at a time


def curve(
    levels: Levels,
    *,
    test: str,
    parameter: str,
    least: float = LEAST,
    share: float = 0.0,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    notes: tuple[str, ...] = (),
    nearer: Callable[[], str] | None = None,
    farther: str = "",
) -> ShiftCurve:
    """Points and regression line of the levels.

    Args:
        levels: shifts, weights and scores.
        test: name of the test.
        parameter: what the shift is measured in.
        least: effective examples a level needs, or it is left out. This looks at weights only, never at scores.
        share: of the levels that must have them.
        confidence: of all intervals.
        resamples: of the bootstrap over test examples; about 4 · resamples · levels · examples operations.
        seed: names the bootstrap's stream.
        notes: for the reader.
        nearer: what beside more examples gives levels enough of them; asked only where that is needed.
        farther: what beside more examples makes more of them wrong; no reweighting does.

    Raises:
        BudgetError: fewer than two levels, or than their share, have enough effective examples.
        UsageError: scores or weights that are not finite, a confidence or a number out of range.
    """
    _require(levels, confidence, resamples, least)
    effective = levels.effective()
    kept = effective >= least
    wanted = max(2, math.ceil(share * len(kept)))
    if kept.sum() < wanted:
        best = float(np.sort(effective)[-wanted]) if len(effective) >= wanted else float(effective.max())
        more = math.ceil(levels.weights.shape[1] * max(least / best - 1, 0.0)) or math.ceil(least)
        msg = (
            f"{test}: {int(kept.sum())} of {len(kept)} levels have {least:g} effective examples, {wanted} must; "
            f"needs about {more} more test examples (`samples`)"
        )
        msg += f", or {way}" if nearer is not None and (way := nearer()) else ""
        raise BudgetError(msg)
    scores = levels.scores if len(levels.scores) == 1 else levels.scores[kept]
    levels = replace(levels, shifts=levels.shifts[kept], weights=levels.weights[kept], scores=scores)
    why = _too_few(levels, farther)
    return ShiftCurve(
        test=test,
        parameter=parameter,
        points=tuple(_points(levels, confidence)),
        slope=None if why else _slope(levels, confidence, resamples, seed),
        cannot_tell=why,
        left_out=int((~kept).sum()),
        least=least,
        confidence=confidence,
        notes=notes,
        levels=levels,
    )


def line_weights(shifts: Array) -> Array:
    """The k with slope = k · scores for least squares on these shifts, (levels,)."""
    centred = shifts - shifts.mean()
    k: Array = centred / np.square(centred).sum()
    return k


def resampled_means(levels: Levels, resamples: int, seed: int) -> Array:
    """Scores of all levels when groups of examples are drawn anew with replacement, (resamples, levels).

    The draw depends on seed and strata only: equal seeds resample two checkpoints alike.
    """
    top, bottom = levels.by_group()
    rng = np.random.default_rng(stream(seed, "shift", "bootstrap").initial_seed())
    members = [np.flatnonzero(levels.strata == stratum) for stratum in np.unique(levels.strata)]
    rows = []
    for start in range(0, resamples, BLOCK):
        some = min(BLOCK, resamples - start)
        counts = np.zeros((some, len(levels.strata)))
        for index in members:
            chosen = rng.integers(len(index), size=(some, len(index))) + len(index) * np.arange(some)[:, None]
            counts[:, index] = np.bincount(chosen.ravel(), minlength=some * len(index)).reshape(some, -1)
        rows.append((counts @ top.T) / (counts @ bottom.T))
    return np.concatenate(rows)


def over_examples(value: float, draws: Array, confidence: float, either: int) -> Uncertainty:
    """Standard error from bootstrapped values, and the t interval and p-value that go with it.

    Args:
        value: of the examples themselves.
        draws: of the resamples, (resamples,).
        confidence: of the interval.
        either: examples that could have come out the other way; one less are the degrees of freedom. For 0/1
            scores the rarer outcome decides how well the error is known: percentiles cover 89% with 9 wrong.
    """
    error = float(draws.std(ddof=1))
    half = float(stdtrit(either - 1, (1 + confidence) / 2)) * error
    return Uncertainty(
        over="test examples",
        stderr=error,
        lo=value - half,
        hi=value + half,
        pvalue=float(2 * stdtr(either - 1, -abs(value) / error)) if error > 0 else float(value == 0),
        method=f"bootstrap of {len(draws)} resamples, t with {either - 1} degrees of freedom",
    )


def over_levels(shifts: Array, means: Array, confidence: float) -> Uncertainty | None:
    """`scipy.stats.linregress` of means on shifts, its t interval and p-value; None for fewer than 3 levels."""
    if len(shifts) < LEAST_LEVELS:
        return None
    found = linregress(shifts, means)
    half = float(stdtrit(len(shifts) - 2, (1 + confidence) / 2)) * float(found.stderr)
    return Uncertainty(
        over="levels",
        stderr=float(found.stderr),
        lo=float(found.slope) - half,
        hi=float(found.slope) + half,
        pvalue=float(found.pvalue),
        method=f"least squares over {len(shifts)} levels, t",
    )


def _slope(levels: Levels, confidence: float, resamples: int, seed: int) -> Slope:
    means, k = levels.means(), line_weights(levels.shifts)
    either = min(_outcomes(levels).values())
    value = float(k @ means)
    return Slope(
        value=value,
        intercept=float(means.mean() - value * levels.shifts.mean()),
        over_examples=over_examples(value, resampled_means(levels, resamples, seed) @ k, confidence, either),
        over_levels=over_levels(levels.shifts, means, confidence),
    )


def _points(levels: Levels, confidence: float) -> Iterator[ShiftPoint]:
    top, bottom = levels.by_group()
    groups = (bottom > 0).sum(1)
    means, total = levels.means(), bottom.sum(1)
    influence = (top - means[:, None] * bottom) / total[:, None]
    errors = np.sqrt(np.square(influence).sum(1) * groups / np.maximum(groups - 1, 1))
    z, binary = float(norm.ppf((1 + confidence) / 2)), levels.binary
    for shift, mean, error, size, count in zip(
        levels.shifts, means, errors, levels.effective(), groups, strict=True
    ):
        if binary:
            # the design-based size where errors are seen (Korn and Graubard 1998); never more than Kish's
            seen = min(size, mean * (1 - mean) / error**2) if error > 0 else size
            lo, hi = wilson(mean, seen, z)
        else:
            half = float(stdtrit(count - 1, (1 + confidence) / 2)) * error
            lo, hi = mean - half, mean + half
        yield ShiftPoint(
            shift=float(shift),
            score=float(mean),
            stderr=float(error),
            lo=float(lo),
            hi=float(hi),
            effective=float(size),
        )


def wilson(share: float, size: float, z: float) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share seen in ``size`` effective examples."""
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * float(np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2)))
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def _outcomes(levels: Levels) -> dict[str, int]:
    """What bounds the degrees of freedom, in groups of examples: those ever wrong, ever right, ever changing."""
    used = (levels.weights > 0).any(0)
    seen = {"used": used}
    if len(levels.scores) > 1:
        seen["scored differently at different levels"] = np.ptp(levels.scores, axis=0) > 0
    if levels.binary:
        seen |= {"ever wrong": (levels.scores == 0).any(0), "ever right": (levels.scores == 1).any(0)}
    return {name: len(np.unique(levels.groups[used & which])) for name, which in seen.items()}


def _too_few(levels: Levels, farther: str) -> str:
    if np.ptp(levels.shifts) == 0:
        return "cannot tell: all levels have the same shift"
    for name, number in _outcomes(levels).items():
        if number < LEAST_EITHER:
            way = f": take more test examples (`samples`){farther and ', or '}{farther}"
            return f"cannot tell: {number} test examples are {name}, needs {LEAST_EITHER - number} more{way}"
    return ""


def _require(levels: Levels, confidence: float, resamples: int, least: float) -> None:
    if not (np.isfinite(levels.scores).all() and np.isfinite(levels.weights).all()):
        msg = "scores or weights hold NaN or infinity: scores are numbers, 1 for right and 0 for wrong"
        raise UsageError(msg)
    if (levels.weights < 0).any():
        msg = "weights below 0: weights are densities' ratios or counts"
        raise UsageError(msg)
    if not 0.5 <= confidence < 1:
        msg = f"confidence={confidence}: it must be 0.5 to less than 1"
        raise UsageError(msg)
    if least < 2:
        msg = f"least={least}: a standard error needs at least 2 effective examples"
        raise BudgetError(msg)
    if resamples < BLOCK:
        msg = f"resamples={resamples}: a standard error needs at least {BLOCK}, {BLOCK - resamples} more"
        raise BudgetError(msg)
