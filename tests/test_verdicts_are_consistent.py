"""Promise: a verdict never contradicts its interval, a looser limit, its mirror image or the exit code. (4 s)"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hessdiag.check import decide as deciding
from hessdiag.check.budgets import Budget, Limit, Scope
from hessdiag.check.decide import MOST_PROBES_TOLD, Evidence, decide, needs_floor, probes_needed
from hessdiag.check.gate import Gate, Plan
from hessdiag.check.recorded import Entry, Recorded
from hessdiag.check.verdict import Interval, Report, Row, Verdict, either, lower, upper
from hessdiag.check.writers.words import change_words
from hessdiag.results import Fingerprint
from hessdiag.results.interval import mean_interval

PASS, FAIL, UNSURE, NONE = Verdict.PASS, Verdict.FAIL, Verdict.UNSURE, Verdict.NONE
many = settings(max_examples=80, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
numbers = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
sizes = st.sampled_from((0.0, 0.01, 0.1, 1.0)) | st.floats(0, 1e6, allow_subnormal=False)
shares = st.floats(0, 3, allow_subnormal=False)
MIRROR = {"min": "max", "max": "min", "max_increase": "max_decrease", "max_decrease": "max_increase"}
RANK = {FAIL: 0, UNSURE: 1, PASS: 2}  # what loosening may only raise


@st.composite
def intervals(draw):
    lo, value, hi = sorted(draw(st.tuples(numbers, numbers, numbers)))
    return Interval(value, lo, hi)


@st.composite
def recorded(draw):
    value, spread = (
        draw(st.sampled_from((1.0, -1.0, 100.0)) | numbers),
        draw(st.sampled_from((0.0, 0.01, 0.3, 2.0))),
    )
    probes = tuple(value * (1 + spread * x) for x in draw(st.lists(st.floats(-1, 1), min_size=0, max_size=9)))
    kind = "probes" if len(probes) > 3 else "ritz"
    probes = probes if kind == "probes" else ()
    value = math.fsum(probes) / len(probes) if probes else value * draw(st.floats(0.5, 2))
    below, above = (abs(value) * spread * draw(st.floats(0, 1)) for _ in range(2))
    metric = Recorded(
        value=value, lo=value - below, hi=value + above, kind=kind, confidence=0.95, per_probe=probes
    )
    return replace(metric, dtype="float64")


def mirrored(metric):
    probes = tuple(-x for x in metric.per_probe)
    return replace(metric, value=-metric.value, lo=-metric.hi, hi=-metric.lo, per_probe=probes)


def verdict_of(limit, base, new, floor=None, claim="samples"):
    budget = Budget(
        key="trace", metric="trace", scope=Scope("train"), limits=(limit,), abs_floor=floor, claim=claim
    )
    (row,) = decide(budget, Evidence(measured=new, baseline=base))
    return row


def limits(kinds=tuple(MIRROR)):
    return st.builds(
        lambda kind, value, share, relative: (
            Limit(kind=kind, value=share if relative else abs(value), relative=relative)
            if kind.startswith("max_")
            else Limit(kind=kind, value=value)
        ),
        st.sampled_from(kinds),
        numbers,
        shares,
        st.booleans(),
    )


def looser(limit, by):
    return replace(limit, value=limit.value - by if limit.kind == "min" else limit.value + by)


@many
@given(intervals(), numbers)
def test_the_three_answers_are_what_the_interval_says(interval, limit):
    assert (upper(interval, limit) is PASS) == (interval.hi <= limit)
    assert (upper(interval, limit) is FAIL) == (interval.lo > limit)
    assert (lower(interval, limit) is PASS) == (interval.lo >= limit)
    assert (lower(interval, limit) is FAIL) == (interval.hi < limit)
    assert NONE not in (upper(interval, limit), lower(interval, limit))


@many
@given(intervals(), numbers)
def test_limits_on_both_sides_of_one_number_do_not_both_fail(interval, limit):
    assert (upper(interval, limit), lower(interval, limit)) != (FAIL, FAIL)
    point = Interval(interval.value, interval.value, interval.value)
    assert UNSURE not in (upper(point, limit), lower(point, limit))


@many
@given(limits(), recorded(), recorded(), sizes, st.none() | sizes)
def test_a_looser_limit_never_decides_harder(limit, base, new, by, floor):
    rank = RANK[verdict_of(limit, base, new, floor or (1.0 if limit.relative else None)).verdict]
    assert (
        RANK[verdict_of(looser(limit, by), base, new, floor or (1.0 if limit.relative else None)).verdict] >= rank
    )


@many
@given(limits(), recorded(), recorded(), sizes)
def test_a_mirrored_metric_meets_the_mirrored_limit(limit, base, new, floor):
    value = limit.value if limit.kind.startswith("max_") else -limit.value
    other = replace(limit, kind=MIRROR[limit.kind], value=value)
    here, there = verdict_of(limit, base, new, floor), verdict_of(other, mirrored(base), mirrored(new), floor)
    assert here.verdict is there.verdict
    if here.tested is not None:
        for one, two in ((here.tested.lo, -there.tested.hi), (here.tested.hi, -there.tested.lo)):
            assert one == pytest.approx(two, rel=1e-9, abs=1e-9)


@many
@given(limits(("max_increase", "max_decrease")), recorded(), recorded(), sizes, sizes)
def test_a_floor_only_loosens(limit, base, new, floor, more):
    found = [RANK[verdict_of(limit, base, new, f).verdict] for f in (floor, floor + more)]
    if not limit.relative or not base.lo <= 0 <= base.hi:
        found.insert(0, RANK[verdict_of(limit, base, new, None).verdict])
    assert found == sorted(found)


@many
@given(limits(("max_increase", "max_decrease")), recorded(), recorded(), sizes)
def test_a_share_of_what_may_be_zero_is_never_formed(limit, base, new, floor):
    budget = Budget(key="trace", metric="trace", scope=Scope("train"), limits=(limit,))
    zero = base.lo <= 0 <= base.hi
    assert needs_floor(budget, base) == (limit.relative and zero)
    assert not needs_floor(replace(budget, abs_floor=floor), base)
    if limit.relative and zero:
        row = verdict_of(limit, base, new, floor)
        assert not row.relative
        assert row.threshold == floor
        assert row.verdict is verdict_of(replace(limit, relative=False, value=floor), base, new).verdict
        assert "may be zero" in row.reason


@many
@given(limits(), recorded(), recorded(), sizes)
def test_a_row_agrees_with_what_it_shows(limit, base, new, floor):
    row = verdict_of(limit, base, new, floor)
    bound = -row.threshold if limit.kind == "max_decrease" else row.threshold
    judge = lower if limit.kind in ("min", "max_decrease") else upper
    assert row.verdict is judge(row.tested, bound)
    assert bool(row.reason) or row.verdict is PASS
    assert f"{100 * row.threshold:g}%" in row.limit if row.relative else f"{row.threshold:g}" in row.limit


@many
@given(intervals(), numbers, st.integers(4, 512), st.sampled_from(["max", "min", "max_increase", "max_decrease"]))
def test_as_many_probes_as_are_told_would_tell(interval, limit, probes, kind):
    threshold = -limit if kind == "max_decrease" else limit
    judge = lower if kind in ("min", "max_decrease") else upper
    verdict = judge(interval, limit)
    row = row_with(verdict, tested=interval, threshold=threshold, limit_kind=kind)
    needed = probes_needed(row, probes)
    if verdict is not UNSURE:
        assert needed is None
        return
    if needed is None:
        assert interval.value == limit or probes * widest(interval, limit) ** 2 > MOST_PROBES_TOLD
        return
    assert probes <= needed <= MOST_PROBES_TOLD
    shrink = math.sqrt(probes / needed) * (1 - 1e-9)  # half-widths fall with the root of the number
    down, up = interval.value - interval.lo, interval.hi - interval.value
    closer = Interval(interval.value, interval.value - down * shrink, interval.value + up * shrink)
    assert judge(closer, limit) is not UNSURE


def widest(interval, limit):
    half = interval.hi - interval.value if interval.value <= limit else interval.value - interval.lo
    return half / abs(interval.value - limit)


def row_with(verdict, **fields):
    chosen = {"threshold": 0.1, "limit_kind": "max_increase", "level": "error", **fields}
    return Row(
        budget="trace", metric="trace", scope="train", limit="≤ +10%", relative=True, verdict=verdict, **chosen
    )


def test_of_two_conditions_one_suffices():
    expected = {
        (PASS, PASS): PASS,
        (PASS, UNSURE): PASS,
        (PASS, FAIL): PASS,
        (UNSURE, UNSURE): UNSURE,
        (UNSURE, FAIL): UNSURE,
        (FAIL, FAIL): FAIL,
    }
    for (one, other), wanted in expected.items():
        assert either(one, other) is either(other, one) is wanted


def exit_code_of(cells, strict, problems):
    """The specification, independently of `Report`."""
    if any(v is FAIL and (level == "error" or strict) for v, level in cells):
        return 1
    if problems or not cells or any(v is NONE or (v is UNSURE and strict) for v, _ in cells):
        return 3
    return 0


def test_exit_codes():
    every = list(itertools.product((PASS, FAIL, UNSURE, NONE), ("error", "warn")))
    reports = [(), *((cell,) for cell in every), *itertools.product(every, every)]
    for cells, strict, problems in itertools.product(reports, (False, True), ((), ("no baseline",))):
        rows = tuple(row_with(v, level=level) for v, level in cells)
        report = Report(rows=rows, strict=strict, problems=problems)
        assert report.exit_code == exit_code_of(cells, strict, problems), (cells, strict, problems)
        assert report.headline.startswith({0: "passed", 1: "failed", 3: "no verdict"}[report.exit_code])


def test_what_was_not_measured_has_no_verdict():
    there = Recorded(value=1.0, lo=0.9, hi=1.1, kind="ritz", confidence=1.0)
    change, value = Limit(kind="max_increase", value=0.1, relative=True), Limit(kind="max", value=2.0)
    assert verdict_of(change, None, there).verdict is NONE
    assert verdict_of(change, there, None).verdict is NONE
    assert verdict_of(value, None, None).verdict is NONE
    assert verdict_of(value, None, there).verdict is PASS
    assert verdict_of(value, None, there, claim="population").verdict is NONE


def _estimate(interval, limit):
    return FAIL if interval.value > limit else PASS


def test_the_same_record_keeps_a_share_without_a_floor():
    same = Recorded(value=2.0, lo=1.9, hi=2.1, kind="ritz", confidence=0.95, dtype="float64")
    assert verdict_of(Limit(kind="max_increase", value=0.5, relative=True), same, same).verdict is PASS


CHANGE = Limit(kind="max_increase", value=0.1)
SHARE = replace(CHANGE, relative=True)


def at(value, half=0.0):
    return Recorded(value=value, lo=value - half, hi=value + half, kind="exact", confidence=1.0, dtype="float64")


def by_floor(limit, new, base=None):
    return verdict_of(limit, base or at(1.0), new, floor=0.5)


def test_a_floor_above_an_absolute_limit_is_the_limit_in_verdict_and_text():
    within, unsure, beyond = by_floor(CHANGE, at(1.3)), by_floor(CHANGE, at(1.45, 0.15)), by_floor(CHANGE, at(1.7))
    assert [row.verdict for row in (within, unsure, beyond)] == [PASS, UNSURE, FAIL]
    for row in (within, unsure, beyond):
        assert (row.limit, row.threshold, row.relative) == ("≤ +0.5", 0.5, False)
    assert beyond.reason == "+0.700000, beyond ≤ +0.5"
    assert "holds the limit ≤ +0.5" in unsure.reason
    assert probes_needed(unsure, 32) == 32 * 9  # +0.45 ± 0.15 is 0.05 from the floor, not 0.35 from the limit
    down = by_floor(replace(CHANGE, kind="max_decrease"), at(0.3))
    assert (down.verdict, down.limit, down.threshold) == (FAIL, "≥ −0.5", 0.5)
    wide = by_floor(replace(CHANGE, value=0.9), at(1.7))
    assert (wide.verdict, wide.limit, wide.threshold) == (PASS, "≤ +0.9", 0.9)
    missing = verdict_of(CHANGE, None, at(1.3), floor=0.5)
    assert (missing.verdict, missing.limit, missing.threshold) == (NONE, "≤ +0.5", 0.5)


def test_a_floor_beside_a_share_is_shown_and_whichever_decided_is_the_threshold():
    cases = {  # the truth, its verdict, and the limit that decided
        1.05: (PASS, 0.1, True),
        1.3: (PASS, 0.5, False),
        1.7: (FAIL, 0.1, True),
    }
    for value, (verdict, threshold, relative) in cases.items():
        row = by_floor(SHARE, at(value))
        assert (row.verdict, row.threshold, row.relative) == (verdict, threshold, relative)
        assert row.limit == "≤ +10% or +0.5"
        assert row.tested.value == pytest.approx(value - 1.0)
    unsure = by_floor(SHARE, at(1.45, 0.15))  # surely beyond the share, perhaps within the floor
    assert (unsure.verdict, unsure.threshold, unsure.relative) == (UNSURE, 0.5, False)
    assert probes_needed(unsure, 32) == 32 * 9
    assert unsure.reason.startswith("decided by abs_floor = 0.5, +0.45 [+0.30, +0.60] holds the limit ≤ +0.5")
    zero = by_floor(SHARE, at(0.7), base=at(0.0, 0.1))
    assert (zero.verdict, zero.threshold, zero.limit) == (FAIL, 0.5, "≤ +10% or +0.5")
    assert zero.reason.startswith("the baseline may be zero: decided by abs_floor = 0.5, +0.70 [+0.60, +0.80]")


def test_a_floor_has_no_say_over_limits_on_the_value():
    row = verdict_of(Limit(kind="max", value=1.0), None, at(1.3), floor=0.5)
    assert (row.verdict, row.limit, row.threshold) == (FAIL, "≤ 1", 1.0)


def test_a_reason_and_a_table_show_one_interval():
    base, new = at(80.0, 0.3), at(100.123456, 0.7)
    row = verdict_of(SHARE, base, new)
    assert row.verdict is FAIL
    assert row.reason == f"{change_words(row)}, beyond ≤ +10%"


class Probed:
    """Source of one trace, of as many probes as it is asked for; keeps what it was asked."""

    def __init__(self, mean):
        self.asked = []
        self.values = mean + np.random.default_rng(3).standard_normal(4096)

    def entry(self, scope, metrics, **asked):
        self.asked.append(asked)
        values = self.values[: asked["probes"]]
        _, lo, hi = mean_interval(values, asked["confidence"])
        metric = Recorded(
            value=float(values.mean()),
            lo=lo,
            hi=hi,
            kind="probes",
            confidence=asked["confidence"],
            dtype="float64",
            per_probe=tuple(values.tolist()),
        )
        return Entry(fingerprint=Fingerprint(seed=0), metrics={"trace": metric})


def look_at(limit, *, escalate):
    budget = Budget(key="trace", metric="trace", scope=Scope("train"), limits=(Limit(kind="max", value=limit),))
    source = Probed(mean=5.0)
    report = Gate(Plan(budgets=(budget,), escalate=escalate, max_probes=128), source, source).run()
    return source, report.rows[0]


def test_each_of_two_looks_takes_half_of_the_error():
    """P(either is wrong) is at most the sum, 2 · 2.5%; a single look has all 5%."""
    for escalate, confidence, looks in ((True, 0.975, [32, 128]), (False, 0.95, [32])):
        source, row = look_at(5.0, escalate=escalate)
        assert [asked["probes"] for asked in source.asked] == looks
        assert [asked["confidence"] for asked in source.asked] == pytest.approx([confidence] * len(looks))
        _, lo, hi = mean_interval(source.values[: looks[-1]], confidence)
        assert (row.tested.lo, row.tested.hi) == pytest.approx((lo, hi), rel=1e-12)


def _no_bonferroni(plan):
    return plan.confidence


def _floor_forgotten(tested, limit, allowed, *rest):
    return HELD(tested, limit, limit.value, *rest)


def _floor_unnamed(budget, limit):
    return str(limit)


HELD = deciding._held
BROKEN = {
    "two looks at the error of one": (
        Plan,
        "look_confidence",
        property(_no_bonferroni),
        test_each_of_two_looks_takes_half_of_the_error,
    ),
    "a floor ignored for absolute limits": (
        deciding,
        "_held",
        _floor_forgotten,
        test_a_floor_above_an_absolute_limit_is_the_limit_in_verdict_and_text,
    ),
    "the limit shown, the floor meant": (
        deciding,
        "_named",
        _floor_unnamed,
        test_a_floor_above_an_absolute_limit_is_the_limit_in_verdict_and_text,
    ),
    "the estimate decides": (deciding, "upper", _estimate, test_a_mirrored_metric_meets_the_mirrored_limit),
    "decreases are increases": (
        deciding,
        "lower",
        lambda tested, limit: upper(tested, -limit),
        test_a_mirrored_metric_meets_the_mirrored_limit,
    ),
    "an end on the limit fails": (
        deciding,
        "upper",
        lambda i, limit: FAIL if i.lo >= limit else PASS if i.hi < limit else UNSURE,
        test_a_row_agrees_with_what_it_shows,
    ),
    "both conditions needed": (
        deciding,
        "either",
        lambda one, other: FAIL if FAIL in (one, other) else one,
        test_a_floor_beside_a_share_is_shown_and_whichever_decided_is_the_threshold,
    ),
    "the floor tightens": (
        deciding,
        "either",
        lambda one, other: min(one, other, key=RANK.get) if other is not FAIL else one,
        test_a_floor_only_loosens,
    ),
    "shares of zero": (deciding, "needs_floor", lambda budget, base: False, None),
    "the limit turned round": (
        deciding,
        "_bound",
        lambda limit: -limit.value,
        test_a_looser_limit_never_decides_harder,
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    module, name, wrong, promise = breakage
    monkeypatch.setattr(module, name, wrong)
    if promise is None:
        promise = test_a_share_of_what_may_be_zero_is_never_formed
        monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises(AssertionError):
        promise()
