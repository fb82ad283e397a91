"""Budgets against measurements: every limit becomes a row with its verdict and the reason for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hessdiag.check.budgets import Budget, Limit
from hessdiag.check.change import METHODS, change, level
from hessdiag.check.recorded import Recorded
from hessdiag.check.verdict import Interval, Row, Verdict, either, lower, upper
from hessdiag.settings import DEFAULT

MOST_PROBES_TOLD = 100_000  # beyond, "no number of probes would tell" is the truer word
MORE_PROBES_HELP = ("probes", "bound")  # kinds of metrics whose interval shrinks with the number of probes


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one budget's metric.

    Attributes:
        measured: the metric; None if it was not measured.
        baseline: as recorded; None if there is none that may be compared.
        same: whether both are of the same weights.
        missing: why there is no baseline, or no measurement.
        confidence: of the intervals.
        samples: examples it was measured on.
    """

    measured: Recorded | None
    baseline: Recorded | None
    same: bool = False
    missing: str = ""
    confidence: float = DEFAULT.confidence
    samples: int = 0


def decide(budget: Budget, evidence: Evidence) -> tuple[Row, ...]:
    """One row per limit of the budget."""
    return tuple(_row(budget, limit, evidence) for limit in budget.limits)


def needs_floor(budget: Budget, baseline: Recorded | None) -> bool:
    """Whether a share of this baseline means nothing, and no absolute floor stands in for it."""
    relative = any(limit.relative for limit in budget.limits)
    return relative and budget.abs_floor is None and baseline is not None and baseline.lo <= 0 <= baseline.hi


def probes_needed(row: Row, probes: int) -> int | None:
    """Probes, in all, with which a row that cannot tell probably could; None if more would not help."""
    tested = row.tested
    if row.verdict is not Verdict.UNSURE or tested is None:
        return None
    limit = -row.threshold if row.limit_kind == "max_decrease" else row.threshold
    needed = probes * _times_more(tested, limit)
    return math.ceil(needed) if needed <= MOST_PROBES_TOLD else None


def _times_more(tested: Interval, limit: float) -> float:
    """By what the samples must be multiplied for the interval's end to come to the limit: it nears by the root."""
    gap = abs(tested.value - limit)
    half = tested.hi - tested.value if tested.value <= limit else tested.value - tested.lo
    ratio = half / gap if gap else math.inf
    return ratio * ratio  # not ** 2, which raises where this is infinite


@dataclass(frozen=True, slots=True)
class _Judged:
    """One limit, decided.

    Attributes:
        verdict: the answer.
        tested: what was held against the threshold that decided.
        threshold: that limit: the budget's own, or its ``abs_floor``.
        relative: whether both are shares of the baseline.
        reason: in words.
    """

    verdict: Verdict
    tested: Interval | None
    threshold: float
    relative: bool
    reason: str


def _row(budget: Budget, limit: Limit, evidence: Evidence) -> Row:
    measured, base = evidence.measured, evidence.baseline
    shown = Interval(measured.value, measured.lo, measured.hi, METHODS[measured.kind]) if measured else None
    judged = _judge(budget, limit, evidence)
    return Row(
        budget=budget.key,
        metric=budget.metric,
        scope=budget.scope.label,
        level=budget.level,
        limit=_named(budget, limit),
        limit_kind=limit.kind,
        threshold=judged.threshold,
        relative=judged.relative,
        verdict=judged.verdict,
        measured=shown,
        baseline=base.value if base and limit.needs_baseline else None,
        tested=judged.tested,
        claim=budget.claim,
        reason=judged.reason,
        file=budget.file,
        line=budget.line,
    )


def _named(budget: Budget, limit: Limit) -> str:
    """The limit as every output shows it, with the floor under it: ``≤ +10% or +0.5``."""
    floor = budget.abs_floor
    if floor is None or not limit.needs_baseline or (not limit.relative and floor <= limit.value):
        return str(limit)
    whole = str(replace(limit, value=floor, relative=False))
    return f"{limit} or {whole[2:]}" if limit.relative else whole


def _judge(budget: Budget, limit: Limit, evidence: Evidence) -> _Judged:
    measured, baseline = evidence.measured, evidence.baseline
    population = budget.claim == "population"
    floor = budget.abs_floor or 0.0
    allowed = max(limit.value, floor) if limit.needs_baseline and not limit.relative else limit.value
    if measured is None or (limit.needs_baseline and baseline is None):
        return _Judged(Verdict.NONE, None, allowed, limit.relative, evidence.missing or "not measured")
    if baseline is None or not limit.needs_baseline:
        tested = level(measured, confidence=evidence.confidence, population=population)
        return _held(tested, limit, allowed, measured, evidence, population)

    def changed(*, relative: bool) -> Interval | None:
        return change(
            baseline,
            measured,
            relative=relative,
            confidence=evidence.confidence,
            population=population,
            same=evidence.same,
        )

    in_units = replace(limit, relative=False)
    absolute = changed(relative=False)
    if not limit.relative:
        return _held(absolute, in_units, allowed, measured, evidence, population)
    by_floor = _held(absolute, in_units, floor, measured, evidence, population)
    if baseline.lo <= 0 <= baseline.hi:  # a share of it means nothing: the floor is the limit
        return _because(by_floor, "the baseline may be zero: decided by abs_floor")
    own = _held(changed(relative=True), limit, allowed, measured, evidence, population)
    if budget.abs_floor is None or either(own.verdict, by_floor.verdict) is own.verdict:
        return own  # where neither tells, or both are exceeded, the share is what was asked for
    return _because(by_floor, "decided by abs_floor")


def _because(judged: _Judged, why: str) -> _Judged:
    if judged.tested is None:
        return judged
    detail = judged.reason or f"changed by {judged.tested.words(signed=True)}"
    return replace(judged, reason=f"{why} = {judged.threshold:g}, {detail}")


def _held(
    tested: Interval | None,
    limit: Limit,
    allowed: float,
    measured: Recorded,
    evidence: Evidence,
    population: bool,
) -> _Judged:
    """An interval held against a limit, of which ``allowed`` is the number that decides."""
    if tested is None:
        return _Judged(Verdict.NONE, None, allowed, limit.relative, _too_few_batches(evidence))
    limit = replace(limit, value=allowed)
    verdict = (lower if limit.kind in ("min", "max_decrease") else upper)(tested, _bound(limit))
    reason = _reason(verdict, tested, limit, measured, evidence, population)
    return _Judged(verdict, tested, allowed, limit.relative, reason)


def _bound(limit: Limit) -> float:
    return -limit.value if limit.kind == "max_decrease" else limit.value


def _reason(
    verdict: Verdict, tested: Interval, limit: Limit, measured: Recorded, evidence: Evidence, population: bool
) -> str:
    if verdict is Verdict.PASS:
        return ""
    shown = tested.words(signed=limit.needs_baseline, percent=limit.relative)
    if verdict is Verdict.FAIL:
        return f"{shown}, beyond {limit}"
    return f"{shown} holds the limit {limit}: {_cure(tested, limit, measured, evidence, population)}"


def _cure(tested: Interval, limit: Limit, measured: Recorded, evidence: Evidence, population: bool) -> str:
    """What would let anyone tell."""
    factor = _times_more(tested, _bound(limit))
    if population:
        more = evidence.samples * (factor - 1)
        return f"about {_round(more)} more samples would tell" if more < 1e7 else "the truth is too near to tell"
    if measured.kind in MORE_PROBES_HELP and measured.per_probe:
        more = len(measured.per_probe) * (factor - 1)
        return f"about {_round(more)} more probes would tell" if more < MOST_PROBES_TOLD else "too near to tell"
    if measured.kind == "ritz":
        return "a smaller run.rtol would tell"
    return "its interval does not shrink with more probes; give a wider limit"


def _round(number: float) -> str:
    """A count to two digits, rounded up."""
    number = max(math.ceil(number), 1)
    step = 10 ** max(len(str(number)) - 2, 0)
    return f"{-(-number // step) * step:,}"


def _too_few_batches(evidence: Evidence) -> str:
    return (
        f"a claim about the population needs 6 batches in common with the baseline: set run.batch_size to at most "
        f"{max(evidence.samples // 8, 1)} in both"
    )
