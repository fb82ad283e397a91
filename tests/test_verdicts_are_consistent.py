"""Promise: a verdict never contradicts its interval, a looser limit, its mirror image or the exit code. (4 s)"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hessdiag.check import decide as deciding
from hessdiag.check.budgets import Budget, Limit, Scope
from hessdiag.check.decide import MOST_PROBES_TOLD, Evidence, decide, needs_floor, probes_needed
from hessdiag.check.recorded import Recorded
from hessdiag.check.verdict import Interval, Report, Row, Verdict, either, lower, upper

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
    row = verdict_of(limit, base, new, floor if limit.relative else None)
    bound = -row.threshold if limit.kind == "max_decrease" else row.threshold
    judge = lower if limit.kind in ("min", "max_decrease") else upper
    if limit.relative and not base.lo <= 0 <= base.hi:  # the floor may have decided
        assert RANK[row.verdict] >= RANK[judge(row.tested, bound)]
    else:
        assert row.verdict is judge(row.tested, bound)
    assert bool(row.reason) or row.verdict is PASS


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
    """The specification, in words of interface.md 2.2, independently of `Report`."""
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


BROKEN = {
    "the estimate decides": (deciding, "upper", _estimate, test_a_mirrored_metric_meets_the_mirrored_limit),
    "decreases are increases": (
        deciding,
        "_within",
        lambda tested, limit, allowed: upper(tested, allowed),
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
        test_the_same_record_keeps_a_share_without_a_floor,
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
        "_within",
        lambda tested, limit, allowed: upper(tested, -allowed),
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
