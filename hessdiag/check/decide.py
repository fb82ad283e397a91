"""Budgets against measurements: every limit becomes a row with its verdict and the reason for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hessdiag.check.budgets import Budget, Limit
from hessdiag.check.change import change, level
from hessdiag.check.recorded import Recorded
from hessdiag.check.verdict import Interval, Row, Verdict, either, lower, upper

MOST_PROBES_TOLD = 100_000  # beyond, "no number of probes would tell" is the truer word
MORE_PROBES_HELP = ("probes", "bound")  # kinds of metrics whose interval shrinks with the number of probes


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one budget's metric.

    Attributes:
        measured: the metric; None if it was not measured.
        baseline: as recorded; None if there is none that may be compared.
        paired: whether probes and samples were the same.
        missing: why there is no baseline, or no measurement.
        confidence: of the intervals.
        samples: examples it was measured on.
    """

    measured: Recorded | None
    baseline: Recorded | None
    paired: bool = True
    missing: str = ""
    confidence: float = 0.95
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


def _row(budget: Budget, limit: Limit, evidence: Evidence) -> Row:
    measured = evidence.measured
    shown = Interval(measured.value, measured.lo, measured.hi) if measured else None
    population = budget.claim == "population"
    verdict, tested, reason = _judge(budget, limit, evidence, population)
    base = evidence.baseline
    # where the baseline may be zero, the change itself is shown and held against the floor
    in_units = limit.relative and base is not None and base.lo <= 0 <= base.hi
    return Row(
        budget=budget.key,
        metric=budget.metric,
        scope=budget.scope.label,
        level=budget.level,
        limit=str(limit),
        limit_kind=limit.kind,
        threshold=(budget.abs_floor or 0.0) if in_units else limit.value,
        relative=limit.relative and not in_units,
        verdict=verdict,
        measured=shown,
        baseline=base.value if base and limit.needs_baseline else None,
        tested=tested,
        claim=budget.claim,
        reason=reason,
        file=budget.file,
        line=budget.line,
    )


def _judge(
    budget: Budget, limit: Limit, evidence: Evidence, population: bool
) -> tuple[Verdict, Interval | None, str]:
    measured, baseline = evidence.measured, evidence.baseline
    if measured is None or (limit.needs_baseline and baseline is None):
        return Verdict.NONE, None, evidence.missing or "not measured"
    if baseline is None or not limit.needs_baseline:
        tested = level(measured, confidence=evidence.confidence, population=population)
        if tested is None:
            return Verdict.NONE, None, _too_few_batches(evidence)
        verdict = (lower if limit.kind == "min" else upper)(tested, limit.value)
        return verdict, tested, _reason(verdict, tested, limit, measured, evidence, population)

    def changed(*, relative: bool) -> Interval | None:
        return change(
            baseline,
            measured,
            relative=relative,
            confidence=evidence.confidence,
            population=population,
            paired=evidence.paired,
        )

    absolute = changed(relative=False)
    if absolute is None:
        return Verdict.NONE, None, _too_few_batches(evidence)
    floor = budget.abs_floor or 0.0
    if not limit.relative:
        allowed = max(limit.value, floor)
        verdict = _within(absolute, limit, allowed)
        return verdict, absolute, _reason(verdict, absolute, limit, measured, evidence, population)
    within_floor = _within(absolute, limit, floor) if budget.abs_floor is not None else Verdict.FAIL
    if baseline.lo <= 0 <= baseline.hi:
        reason = (
            f"the baseline may be zero: decided by abs_floor = {floor:g}, changed by {_shown(absolute, False)}"
        )
        return within_floor, absolute, reason
    relative = changed(relative=True) or absolute
    within = _within(relative, limit, limit.value)
    verdict = either(within, within_floor)
    if verdict is not within:
        return verdict, relative, f"changed by {_shown(absolute, False)}: decided by abs_floor = {floor:g}"
    return verdict, relative, _reason(verdict, relative, limit, measured, evidence, population)


def _within(tested: Interval, limit: Limit, allowed: float) -> Verdict:
    return lower(tested, -allowed) if limit.kind == "max_decrease" else upper(tested, allowed)


def _reason(
    verdict: Verdict, tested: Interval, limit: Limit, measured: Recorded, evidence: Evidence, population: bool
) -> str:
    shown = _shown(tested, limit.relative) if limit.needs_baseline else f"{tested.value:.5g} in {_ends(tested)}"
    if verdict is Verdict.PASS:
        return ""
    if verdict is Verdict.FAIL:
        return f"{shown}, beyond {limit}"
    return f"{shown} holds the limit {limit}: {_cure(tested, limit, measured, evidence, population)}"


def _cure(tested: Interval, limit: Limit, measured: Recorded, evidence: Evidence, population: bool) -> str:
    """What would let anyone tell."""
    threshold = -limit.value if limit.kind == "max_decrease" else limit.value
    factor = _times_more(tested, threshold)
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


def _shown(tested: Interval, relative: bool) -> str:
    if relative:
        return f"{100 * tested.value:+.4g}% in [{100 * tested.lo:+.4g}%, {100 * tested.hi:+.4g}%]"
    return f"{tested.value:+.4g} in [{tested.lo:+.4g}, {tested.hi:+.4g}]"


def _ends(tested: Interval) -> str:
    return f"[{tested.lo:.5g}, {tested.hi:.5g}]"
