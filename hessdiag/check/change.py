"""How much a metric changed, with its interval: same probes, same samples, pair by pair.

Both checkpoints are measured with the same probe vectors on the same samples, so that what a probe or a batch says
too much of one it says too much of the other: the change is known better than either number. Relative changes are
linearized (delta method): with b and n the means over probes, probe i says

    c_i = n/b − 1 + ((n_i − n) − (n/b)(b_i − b)) / |b|

Extremes come with certificates instead of probes; their change lies between the corners of the two intervals. So
does that of shares known by brackets, whose samples per probe are lower ends only: what is resolved may grow while
the share falls.
A claim about the population adds the spread over batches of the same samples, again in pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from hessdiag.check.comparable import NUMERIC_FLOOR
from hessdiag.check.recorded import Recorded
from hessdiag.check.verdict import BRACKET, Interval
from hessdiag.results.interval import block_spread, mean_interval, sum_half

Array = NDArray[np.float64]

FEWEST_PAIRS = 4  # with fewer the skewness, and so the interval, is noise: the corners are wider and hold


def level(metric: Recorded, *, confidence: float, population: bool = False) -> Interval | None:
    """The metric itself, with the interval that a limit on its value is held against.

    Args:
        metric: as measured.
        confidence: of the interval.
        population: whether it is for the population, not only for these samples.

    Returns:
        None where a claim about the population has too few batches behind it.
    """
    value, lo, hi = metric.value, metric.lo, metric.hi
    if metric.kind == "probes" and metric.confidence < confidence and len(metric.per_probe) >= FEWEST_PAIRS:
        _, lo, hi = mean_interval(np.asarray(metric.per_probe), confidence)
        lo, hi = min(lo, metric.lo), max(hi, metric.hi)
    sampled = Interval(value, lo, hi, METHODS[metric.kind])
    if not population:
        return sampled
    values, weights = np.asarray(metric.block_values), np.asarray(metric.block_weights)
    return over_data(sampled, values, weights, confidence)


def change(
    base: Recorded,
    new: Recorded,
    *,
    relative: bool,
    confidence: float,
    population: bool = False,
    same: bool = False,
) -> Interval | None:
    """How much ``new`` is above ``base``, with its interval.

    Args:
        base: recorded; for a relative change its interval must not hold zero.
        new: measured.
        relative: as a share of the baseline's size; else in the metric's units.
        confidence: of the interval.
        population: whether it is for the population, not only for these samples.
        same: whether both are of the same weights, so that equal brackets are of one and the same number.

    Returns:
        None where a claim about the population has too few common batches behind it.

    Raises:
        ValueError: a relative change from a baseline that may be zero.
    """
    if relative and base.lo <= 0 <= base.hi:
        msg = f"the baseline's interval [{base.lo:.4g}, {base.hi:.4g}] holds zero: a share of it means nothing"
        raise ValueError(msg)
    bracketed = "bracket" in (base.kind, new.kind)
    if bracketed and same and _agree(base, new):
        return Interval(0.0, 0.0, 0.0, "the same weights")
    pairs = None if bracketed else paired_samples(base, new)
    sampled = corners(base, new, relative) if pairs is None else _paired(base, new, pairs, relative, confidence)
    if not population:
        return sampled
    blocks = common_blocks(base, new)
    if blocks is None:
        return None
    weights = blocks.weights
    shares = weights / weights.sum() if len(weights) else weights
    b, n = float((shares * blocks.base).sum()), float((shares * blocks.new).sum())
    values = linearized(blocks.base, blocks.new, b, n, relative)
    return over_data(sampled, values, weights, confidence)


METHODS = {
    "exact": "exact",
    "probes": "probes",
    "ritz": "certificate",
    "bracket": BRACKET,
    "bound": "estimated bound",
}
"""What a metric's interval is called."""


def _agree(base: Recorded, new: Recorded) -> bool:
    floor = NUMERIC_FLOOR.get(new.dtype, NUMERIC_FLOOR["float32"])
    return all(abs(a - b) <= floor for a, b in zip((base.lo, base.hi), (new.lo, new.hi), strict=True))


def paired_samples(base: Recorded, new: Recorded) -> list[tuple[Array, Array]] | None:
    """Independent sources of error (probes, draws), each as samples of both metrics in pairs.

    Returns:
        One pair of arrays (count,) for each source; None where there is no source, or one has fewer than
        `FEWEST_PAIRS` pairs.
    """
    drawn = min((len(x.per_draw) for x in (base, new) if x.per_draw), default=0)
    found = []
    for ours, theirs in ((_probed(base, drawn), _probed(new, drawn)), (base.per_draw, new.per_draw)):
        if not len(ours) and not len(theirs):
            continue
        count = min(len(x) for x in (ours, theirs) if len(x))
        if count < FEWEST_PAIRS:
            return None
        # where one of them is exact, its value stands opposite each of the other's
        b, n = (np.asarray(x[:count]) if len(x) else None for x in (ours, theirs))
        found.append(
            (np.full(count, base.value) if b is None else b, np.full(count, new.value) if n is None else n)
        )
    return found or None


def _probed(metric: Recorded, drawn: int) -> Array:
    """Samples per probe as with the first ``drawn`` draws only: what more draws moved pairs with nothing."""
    moved = float(np.mean(metric.per_draw[:drawn]) - np.mean(metric.per_draw)) if metric.per_draw else 0.0
    return np.asarray(metric.per_probe, dtype=np.float64) + moved


def _paired(
    base: Recorded, new: Recorded, pairs: list[tuple[Array, Array]], relative: bool, confidence: float
) -> Interval:
    """The mean over pairs; further sources of error are deviations only, added in quadrature."""
    b, n = (float(samples.mean()) for samples in pairs[0])
    first = linearized(*pairs[0], b, n, relative)
    stderr, lo, hi = mean_interval(first, confidence)
    value = float(first.mean())
    slack = NUMERIC_FLOOR.get(new.dtype, NUMERIC_FLOOR["float32"]) * max(abs(base.value), abs(new.value))
    slack /= abs(b) if relative else 1.0
    if len(pairs) > 1:
        draws_b, draws_n = pairs[1]
        draws = linearized(draws_b - draws_b.mean() + b, draws_n - draws_n.mean() + n, b, n, relative)
        sources = [(stderr**2, len(first) - 1), (float(draws.var(ddof=1)) / len(draws), len(draws) - 1)]
        half = sum_half(sources, confidence)
        lo, hi = min(lo, value - half), max(hi, value + half)
    return Interval(value, lo - slack, hi + slack, f"{len(first)} pairs of probes")


def linearized(base: Array, new: Array, b: float, n: float, relative: bool) -> Array:
    """What every sample says of the change, (count,): their mean is n − b, or (n − b)/|b| if ``relative``."""
    if not relative:
        return new - base
    samples: Array = (n - b) / abs(b) + ((new - n) - n / b * (base - b)) / abs(b)
    return samples


def corners(base: Recorded, new: Recorded, relative: bool) -> Interval:
    """The change between the ends of both intervals: it holds whatever the two errors have in common."""
    method = f"{BRACKET}s of both" if "bracket" in (base.kind, new.kind) else "both intervals"
    if not relative:
        return Interval(new.value - base.value, new.lo - base.hi, new.hi - base.lo, method)
    ends = [(n - b) / abs(b) for n in (new.lo, new.hi) for b in (base.lo, base.hi)]
    return Interval((new.value - base.value) / abs(base.value), min(ends), max(ends), method)


def over_data(sampled: Interval, values: Array, weights: Array, confidence: float) -> Interval | None:
    """An interval for the sample set widened by what other samples would do: the spread of a weighted mean."""
    spread = block_spread(values, weights, confidence)
    if spread is None:
        return None
    _, half, blocks = spread
    down, up = sampled.value - sampled.lo, sampled.hi - sampled.value
    return Interval(
        sampled.value,
        sampled.value - math.hypot(half, down),
        sampled.value + math.hypot(half, up),
        f"{sampled.method}, {blocks} batches",
    )


@dataclass(frozen=True)
class Blocks:
    """Values of both checkpoints on the same pieces of data, (blocks,) each."""

    base: Array
    new: Array
    weights: Array


def common_blocks(base: Recorded, new: Recorded) -> Blocks | None:
    """Both metrics per piece of data, batches merged up to the limits that both divisions share.

    Returns:
        None where either has no values per batch, or they are not of the same samples.
    """
    ends = [list(accumulate(x.block_examples)) for x in (base, new)]
    if not all(ends) or ends[0][-1] != ends[1][-1]:
        return None
    shared = sorted(set(ends[0]) & set(ends[1]))
    merged = [_merged(x, own, shared) for x, own in zip((base, new), ends, strict=True)]
    return Blocks(merged[0][0], merged[1][0], merged[1][1])


def _merged(metric: Recorded, ends: list[int], shared: list[int]) -> tuple[Array, Array]:
    group = np.searchsorted(shared, ends)
    weights = np.asarray(metric.block_weights)
    sums = np.bincount(group, weights=weights, minlength=len(shared))
    totals = np.bincount(group, weights=weights * np.asarray(metric.block_values), minlength=len(shared))
    return np.asarray(totals / np.maximum(sums, 1e-300)), np.asarray(sums, dtype=np.float64)
