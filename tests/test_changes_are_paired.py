"""Promise: a change is told from pairs of probes, draws and data, and its interval holds the truth. (15 s)"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from scipy.stats import t as student

from hessdiag.check import change as changing
from hessdiag.check.change import change, common_blocks, level
from hessdiag.check.comparable import NUMERIC_FLOOR
from hessdiag.check.recorded import Recorded
from hessdiag.results.interval import mean_interval
from tests.seeds import band, seeds

SEEDS = seeds(2000)
CORRELATION = 0.9


def probed(samples, draws=(), dtype="float64", half=None):
    """As an analysis reports it: the draws' mean is part of every probe's value."""
    samples = np.asarray(samples, dtype=float) + (np.mean(draws) if len(draws) else 0.0)
    value = float(samples.mean())
    if half is None:
        sources = [x for x in (samples, np.asarray(draws)) if len(x)]
        half = welch([(x.std(ddof=1) / math.sqrt(len(x)), len(x) - 1) for x in sources])
    return Recorded(
        value=value,
        lo=value - half,
        hi=value + half,
        kind="probes",
        confidence=0.95,
        dtype=dtype,
        per_probe=tuple(samples.tolist()),
        per_draw=tuple(np.asarray(draws).tolist()),
    )


def welch(parts):
    variance = sum(s**2 for s, _ in parts)
    freedom = variance**2 / sum(s**4 / f for s, f in parts)
    return float(student.ppf(0.975, freedom)) * math.sqrt(variance)


def certified(value, half):
    return Recorded(value=value, lo=value - half, hi=value + half, kind="ritz", confidence=1.0, dtype="float64")


def correlated(rng, n, size=1.0, skewed=True):
    """Two samples of mean 0 and deviation ``size``, correlated, leaning to the right like quadratic forms."""
    x = rng.standard_normal((2, n))
    x[1] = CORRELATION * x[0] + math.sqrt(1 - CORRELATION**2) * x[1]
    if skewed:  # each is (χ² of 8 − 8)/4 by its normal score; its correlation stays within 0.01
        x = (np.exp(0.4 * x) - math.exp(0.08)) / math.sqrt(math.exp(0.16) * (math.exp(0.16) - 1))
    return size * x


def holds(interval, truth):
    return interval.lo <= truth <= interval.hi


# closed forms


@pytest.mark.parametrize("n", [4, 16, 32])
def test_an_absolute_change_is_the_mean_of_differences(n):
    rng = np.random.default_rng(n)
    b, x = rng.gamma(2, 1, (2, n))
    found = change(probed(b), probed(x), relative=False, confidence=0.95)
    _, lo, hi = mean_interval(x - b, 0.95)
    slack = NUMERIC_FLOOR["float64"] * max(b.mean(), x.mean())
    assert (found.value, found.lo, found.hi) == pytest.approx(((x - b).mean(), lo - slack, hi + slack), rel=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_relative_change_is_of_the_baselines_size(sign):
    rng = np.random.default_rng(3)
    noise = correlated(rng, 24, 0.1)
    b, x = sign * (5 + noise[0]), sign * (6 + noise[1])
    found = change(probed(b), probed(x), relative=True, confidence=0.95)
    assert found.value == pytest.approx((x.mean() - b.mean()) / abs(b.mean()), rel=1e-12)
    # the delta method by the jackknife, which knows no derivative: the same up to 1/n
    n = len(b)
    left_out = [(x.sum() - x[i]) / abs(b.sum() - b[i]) for i in range(n)]
    stderr = math.sqrt((n - 1) ** 2 / n * np.var(left_out, ddof=1))
    assert (found.hi - found.lo) / 2 == pytest.approx(student.ppf(0.975, n - 1) * stderr, rel=0.15)
    assert (found.value > 0) == (sign > 0)


@pytest.mark.parametrize("dtype", NUMERIC_FLOOR)
@pytest.mark.parametrize("draws", [(0, 0), (16, 16), (64, 16)])
@pytest.mark.parametrize("relative", [False, True])
def test_the_same_record_has_not_changed(dtype, draws, relative):
    """Also where the baseline has more probes and more draws than the check's first look."""
    rng = np.random.default_rng(0)
    probes, labels = 5 + rng.standard_normal(128), 20 + rng.standard_normal(64)
    base = probed(probes, labels[: draws[0]], dtype=dtype)
    new = probed(probes[:32], labels[: draws[1]], dtype=dtype)
    found = change(base, new, relative=relative, confidence=0.95)
    room = NUMERIC_FLOOR[dtype] * (1.0 if relative else max(base.value, new.value)) * 1.1
    assert abs(found.value) <= 1e-12
    assert -room <= found.lo <= 0 <= found.hi <= room


@pytest.mark.parametrize("relative", [False, True])
def test_corners_hold_every_possible_change(relative):
    rng = np.random.default_rng(1)
    for base, new in ((certified(3.0, 0.5), certified(4.0, 1.5)), (certified(-3.0, 0.5), certified(0.5, 1.0))):
        found = change(base, new, relative=relative, confidence=0.95)
        b, n = rng.uniform(base.lo, base.hi, 4000), rng.uniform(new.lo, new.hi, 4000)
        b[:4], n[:4] = (base.lo, base.lo, base.hi, base.hi), (new.lo, new.hi, new.lo, new.hi)
        seen = (n - b) / np.abs(b) if relative else n - b
        assert (found.lo, found.hi) == pytest.approx((seen.min(), seen.max()), rel=1e-12)


def test_too_few_pairs_are_not_trusted():
    b, x = np.random.default_rng(0).gamma(2, 1, (2, 3))
    found = change(probed(b), probed(x), relative=False, confidence=0.95)
    assert (found.lo, found.hi) == (probed(x).lo - probed(b).hi, probed(x).hi - probed(b).lo)


def test_a_share_of_zero_is_refused():
    with pytest.raises(ValueError, match="holds zero"):
        change(certified(0.1, 0.2), certified(1.0, 0.1), relative=True, confidence=0.95)


def test_two_sources_add_by_welch():
    rng = np.random.default_rng(2)
    probes, draws = correlated(rng, 32, skewed=False), correlated(rng, 16, 2.0, skewed=False)
    base, new = probed(probes[0], 50 + draws[0]), probed(probes[1], 52 + draws[1])
    found = change(base, new, relative=False, confidence=0.95)
    d = [probes[1] - probes[0], draws[1] - draws[0]]
    half = welch([(x.std(ddof=1) / math.sqrt(len(x)), len(x) - 1) for x in d])
    value = 2 + d[0].mean() + d[1].mean()
    assert found.value == pytest.approx(value, rel=1e-9)
    assert found.hi - found.value == pytest.approx(half, rel=1e-6)


def test_a_level_of_higher_confidence_is_formed_anew():
    metric = probed(np.random.default_rng(0).gamma(2, 1, 32))
    same, wider = (level(metric, confidence=c) for c in (0.95, 0.99))
    assert (same.lo, same.hi) == (metric.lo, metric.hi)
    assert wider.lo < metric.lo < metric.hi < wider.hi


# data


def in_blocks(rng, values, sizes):
    """A metric known per example, recorded in batches of ``sizes``; weights are the examples."""
    ends = np.cumsum(sizes)
    parts = np.split(values, ends[:-1])
    return replace(
        certified(float(values.mean()), 1e-9),
        block_values=tuple(float(p.mean()) for p in parts),
        block_weights=tuple(float(len(p)) for p in parts),
        block_examples=tuple(len(p) for p in parts),
    )


def test_batches_merge_up_to_common_limits():
    rng = np.random.default_rng(0)
    b, x = rng.standard_normal((2, 96))
    fine, coarse = [8] * 12, [24, 24, 24, 24]
    odd = [16, 8, 24, 16, 16, 16]  # ends 16 24 48 64 80 96
    for one, other, common in ((fine, coarse, coarse), (coarse, fine, coarse), (odd, coarse, [24, 24, 48])):
        blocks = common_blocks(in_blocks(rng, b, one), in_blocks(rng, x, other))
        direct = common_blocks(in_blocks(rng, b, common), in_blocks(rng, x, common))
        assert blocks.base == pytest.approx(direct.base)
        assert blocks.new == pytest.approx(direct.new)
        assert blocks.weights.tolist() == [float(size) for size in common]
    assert common_blocks(in_blocks(rng, b, fine), in_blocks(rng, x[:88], [8] * 11)) is None
    assert common_blocks(in_blocks(rng, b, fine), certified(1.0, 0.1)) is None


def test_a_claim_about_the_population_needs_blocks():
    rng = np.random.default_rng(0)
    b, x = 5 + rng.standard_normal((2, 96))
    few, many = in_blocks(rng, b, [24] * 4), in_blocks(rng, b, [12] * 8)
    ask = partial(change, relative=False, confidence=0.95, population=True)
    assert ask(few, in_blocks(rng, x, [12] * 8)) is None
    assert ask(many, in_blocks(rng, x, [12] * 8)) is not None


def test_errors_of_probes_and_of_data_add_in_quadrature():
    """Halves of 3 and 4 make 5."""
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal(8), np.ones(8)
    half = float(student.ppf(0.975, 7)) * values.std(ddof=1) / math.sqrt(8)
    found = changing.over_data(changing.Interval(1.0, -2.0, 1.0), 4 / half * values, weights, 0.95)
    assert (found.lo, found.hi) == pytest.approx((1 - 5, 1 + 4), rel=1e-12)


# brackets


def share(lo, hi, samples=()):
    """A share of eigenvalues known to lie in [lo, hi]; ``samples`` are of its lower end."""
    value = float(np.mean(samples)) if len(samples) else lo
    return Recorded(
        value=value, lo=lo, hi=hi, kind="bracket", confidence=0.95, dtype="float64", per_probe=tuple(samples)
    )


def test_brackets_change_between_their_corners():
    """What is resolved may grow while the share falls: lower ends say nothing of the change."""
    noise = 0.001 * np.random.default_rng(0).standard_normal(8)
    base, new = share(0.03, 0.96, 0.035 + noise), share(0.04, 0.84, 0.045 + noise)
    found = change(base, new, relative=False, confidence=0.95)
    assert (found.lo, found.hi) == pytest.approx((0.04 - 0.96, 0.84 - 0.03))
    assert not found.resolved
    relative = change(base, new, relative=True, confidence=0.95)
    assert (relative.lo, relative.hi) == pytest.approx((0.04 / 0.96 - 1, 0.84 / 0.03 - 1))
    assert not relative.resolved
    apart = change(share(0.1, 0.12, 0.11 + noise), share(0.3, 0.33, 0.31 + noise), relative=False, confidence=0.95)
    assert (apart.lo, apart.hi) == pytest.approx((0.18, 0.23))
    assert apart.resolved


@pytest.mark.parametrize("sides", [("bracket", "exact"), ("exact", "bracket")])
def test_a_bracket_against_a_known_share_is_a_bracket(sides):
    wide, known = share(0.1, 0.5, [0.1, 0.12, 0.14, 0.16]), replace(share(0.2, 0.2), kind="exact")
    base, new = (wide if side == "bracket" else known for side in sides)
    found = change(base, new, relative=False, confidence=0.95)
    assert (found.lo, found.hi) == pytest.approx((new.lo - base.hi, new.hi - base.lo))


def test_equal_brackets_are_one_number_only_if_the_weights_are():
    record, other = share(0.0, 0.9, [0.0] * 4), share(0.0, 0.8, [0.0] * 4)
    ask = partial(change, relative=False, confidence=0.95)
    assert (ask(record, record, same=True).lo, ask(record, record, same=True).hi) == (0.0, 0.0)
    assert (ask(record, record).lo, ask(record, record).hi) == (-0.9, 0.9)
    assert ask(record, other, same=True).hi == pytest.approx(0.8)


# statistics


def coverage_of_samples(relative, sign=1.0, seeds=SEEDS):
    held = 0
    truth = (6.0 - 5.0) / 5.0 if relative else 1.0
    for seed in range(seeds):
        noise = correlated(np.random.default_rng([7, seed]), 32)
        base, new = probed(sign * (5 + noise[0]), half=0.5), probed(sign * (6 + noise[1]), half=0.5)
        held += holds(change(base, new, relative=relative, confidence=0.95), sign * truth)
    return held / seeds


def coverage_of_draws(seeds=SEEDS):
    """The baseline has 64 draws and 128 probes, the check 16 and 32: as many pairs as the check has."""
    held = 0
    for seed in range(seeds):
        rng = np.random.default_rng([11, seed])
        probes, draws = correlated(rng, 64, 0.5, skewed=False), correlated(rng, 32, 2.0, skewed=False)
        base = probed(5 + probes[0], 20 + draws[0], half=0.5)
        new = probed(6 + probes[1][:16], 22 + draws[1][:16], half=0.5)
        held += holds(change(base, new, relative=False, confidence=0.95), 3.0)
    return held / seeds


def coverage_of_population(relative, seeds=SEEDS):
    """Examples drawn from a population, in batches of unequal size; both checkpoints see the same."""
    held = 0
    truth = 1.0 / 5.0 if relative else 1.0
    for seed in range(seeds):
        rng = np.random.default_rng([13, seed])
        noise = correlated(rng, 96, 2.0)
        sizes = [12] * 6 + [8] * 3
        base, new = in_blocks(rng, 5 + noise[0], sizes), in_blocks(rng, 6 + noise[1], sizes)
        found = change(base, new, relative=relative, confidence=0.95, population=True)
        held += found is not None and holds(found, truth)
    return held / seeds


COVERAGE = {
    "absolute": (partial(coverage_of_samples, False), *band(SEEDS)),
    "relative": (partial(coverage_of_samples, True), *band(SEEDS)),
    "relative, negative": (partial(coverage_of_samples, True, -1.0), *band(SEEDS)),
    "probes and draws": (coverage_of_draws, *band(SEEDS, highest=0.97)),  # the wider of two intervals
    "population": (partial(coverage_of_population, False), *band(SEEDS, highest=0.975)),
    "population, relative": (partial(coverage_of_population, True), *band(SEEDS, highest=0.975)),
}


@pytest.mark.coverage
@pytest.mark.parametrize("case", COVERAGE.values(), ids=COVERAGE)
def test_the_interval_holds_the_truth_as_often_as_it_says(case):
    share, low, high = case
    assert low <= share() <= high


def narrowing(relative=False):
    widths = []
    for seed in range(50):
        noise = correlated(np.random.default_rng([17, seed]), 32)
        base, new = probed(5 + noise[0]), probed(6 + noise[1])
        found = [
            change(base, new, relative=relative, confidence=0.95),
            changing.corners(base, new, relative),
        ]
        widths.append([x.hi - x.lo for x in found])
    paired, corners = np.mean(widths, axis=0)
    return corners / paired


@pytest.mark.parametrize("relative", [False, True])
def test_pairs_know_the_change_better_than_the_numbers(relative):
    assert narrowing(relative) >= 2  # 4.5 for such a correlation if normal; 1.4 were they independent


# what the promise must notice


def _mean_of_other_order(base, new, b, n, relative):
    shuffled = np.roll(new, 1)
    samples = shuffled - base
    return samples / abs(b) if relative else samples


def _signed(base, new, b, n, relative):
    return new - base if not relative else (n - b) / b + ((new - n) - n / b * (base - b)) / b


def _ratio_forgotten(base, new, b, n, relative):
    return (new - base) / (abs(b) if relative else 1.0) if not relative else (n - b) / abs(b) + (new - n) / abs(b)


def _biased(samples, confidence):
    stderr = samples.std() / math.sqrt(len(samples))
    half = student.ppf((1 + confidence) / 2, 10**6) * stderr * 0.9
    return stderr, samples.mean() - half, samples.mean() + half


def _draws_forgotten(base, new):
    found = ORIGINAL_PAIRS(base, new)
    return found[:1] if found else found


def _unshifted(metric, drawn):
    return np.asarray(metric.per_probe)


def _data_ignored(sampled, values, weights, confidence):
    return sampled


def _first_blocks(metric, ends, shared):
    return np.asarray(metric.block_values[: len(shared)]), np.asarray(metric.block_weights[: len(shared)])


def _larger_error(sampled, values, weights, confidence):
    _, half, _ = changing.block_spread(values, weights, confidence)
    down, up = sampled.value - sampled.lo, sampled.hi - sampled.value
    return changing.Interval(sampled.value, sampled.value - max(half, down), sampled.value + max(half, up))


ORIGINAL_PAIRS, ORIGINAL_PAIRED = changing.paired_samples, changing._paired
same_record = partial(test_the_same_record_has_not_changed, "float64")
BROKEN = {
    "unpaired": (
        "paired_samples",
        lambda base, new: None,
        lambda: test_pairs_know_the_change_better_than_the_numbers(False),
    ),
    "pairs of different probes": (
        "linearized",
        _mean_of_other_order,
        lambda: test_pairs_know_the_change_better_than_the_numbers(False),
    ),
    "the sign of a negative baseline": (
        "linearized",
        _signed,
        lambda: test_a_relative_change_is_of_the_baselines_size(-1),
    ),
    "the baseline's own error forgotten": (
        "linearized",
        _ratio_forgotten,
        lambda: test_a_relative_change_is_of_the_baselines_size(1),
    ),
    "draws forgotten": ("paired_samples", _draws_forgotten, test_two_sources_add_by_welch),
    "other draws taken for the same": ("_probed", _unshifted, lambda: same_record((64, 16), False)),
    "data ignored": (
        "over_data",
        _data_ignored,
        lambda: test_the_interval_holds_the_truth_as_often_as_it_says(COVERAGE["population"]),
    ),
    "the larger error alone": ("over_data", _larger_error, test_errors_of_probes_and_of_data_add_in_quadrature),
    "brackets by their lower ends": (
        "corners",
        lambda base, new, relative: ORIGINAL_PAIRED(base, new, ORIGINAL_PAIRS(base, new), relative, 0.95),
        test_brackets_change_between_their_corners,
    ),
    "batches paired by number": ("_merged", _first_blocks, test_batches_merge_up_to_common_limits),
    "n for n − 1 and the normal for t": (
        "mean_interval",
        _biased,
        lambda: test_the_interval_holds_the_truth_as_often_as_it_says(COVERAGE["absolute"]),
    ),
    "values for corners": (
        "corners",
        lambda base, new, relative: changing.Interval(0.0, new.lo - base.lo, new.hi - base.hi),
        lambda: test_corners_hold_every_possible_change(False),
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    name, wrong, promise = breakage
    monkeypatch.setattr(changing, name, wrong)
    with pytest.raises((AssertionError, ValueError)):
        promise()
