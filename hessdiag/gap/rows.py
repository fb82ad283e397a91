"""The gap report as rows of text, for the terminal and the page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hessdiag.errors import Refused
from hessdiag.formatting import format_interval, format_number, format_p, format_tau
from hessdiag.gap.record import CheckpointRecord
from hessdiag.gap.registry import Reading
from hessdiag.gap.report import GapReport
from hessdiag.gap.statistics.environments import Axis
from hessdiag.gap.statistics.means import Score
from hessdiag.gap.statistics.rank_results import RankStatistics
from hessdiag.shown import counted, listed, plain

NONE = "—"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A measure against the gap, as text.

    Attributes:
        measure: its name.
        tau: Kendall's tau-b.
        interval: over checkpoints.
        p: after Holm's adjustment, or why there is none.
        readings: range of tau over the readings' own intervals.
        worst: tau of the worst group, with its setting.
        moved: at how many checkpoints rescaling the layers moves it.
    """

    measure: str
    tau: str
    interval: str
    p: str
    readings: str
    worst: str
    moved: str


def performance_rows(report: GapReport) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row per checkpoint: losses and scores of every split, and the gap ranked against."""
    splits = list(dict.fromkeys(s.split for r in report.records for s in r.performance.splits))
    scored = any(s.score.value is not None for r in report.records for s in r.performance.splits)
    columns = ["checkpoint", *(f"loss, {split}" for split in splits)]
    columns += [f"score, {split}" for split in splits] * scored
    columns += [f"{report.gap_kind} gap", "interval"]
    rows = []
    for record in report.records:
        by_name = {s.split: s for s in record.performance.splits}
        losses = [_value(by_name[split].loss if split in by_name else None) for split in splits]
        scores = [_value(by_name[split].score if split in by_name else None) for split in splits] * scored
        gap = record.gap(report.gap_kind)
        rows.append([plain(record.name), *losses, *scores, _value(gap), _interval(gap)])
    return columns, rows


def rank_rows(report: GapReport) -> list[Ranked]:
    """A row per measure that has a tau, the strongest first."""
    found = [one for one in report.ranks.measures if one.overall is not None]
    return [_ranked(report, one) for one in sorted(found, key=lambda one: -abs(_tau(one)))]


def refusals(report: GapReport) -> list[tuple[str, list[str]]]:
    """Why measures have no tau, each reason once with the measures it holds for."""
    reasons: dict[str, list[str]] = {}
    for one in report.ranks.measures:
        if one.reason:
            reasons.setdefault(_why(report, one), []).append(one.measure)
    return [(plain(reason), names) for reason, names in reasons.items()]


def verdicts(report: GapReport, measure: str) -> list[str]:
    """What the guard says of a measure at each checkpoint where there is a number of it."""
    found = [record.guard[measure].verdict for record in report.records if measure in record.guard]
    return [verdict for verdict in found if verdict != "refused"]


def reading_cells(record: CheckpointRecord, measure: str) -> tuple[str, str, str]:
    """Value, interval and what the guard says of one reading; a refusal stands in place of the interval."""
    one = record.readings.get(measure)
    guard = record.guard[measure].verdict if measure in record.guard else ""
    if one is None:
        return NONE, "not taken", ""
    if isinstance(one, Refused):
        return NONE, plain(one.reason), guard
    if one.kind == "exact":
        return format_number(one.value), "exact up to rounding", guard
    if math.isinf(one.hi):
        return format_number(one.value), "a maximum found: the true one may be larger", guard
    return format_number(one.value, one.lo, one.hi), format_interval(one.value, one.lo, one.hi), guard


def summary(report: GapReport) -> list[str]:
    """What the statistics say, in sentences: the verdict first, then of what it is one."""
    n, kind = len(report.records), report.gap_kind
    lines = _verdict(report)
    if len(report.independent) < n:
        told = "as you say" if report.one_run else "as folders, names and epochs tell"
        otherwise = "" if report.one_run else " (not so? say `one_run=False`)"
        runs = f"{len(report.runs)} run{'s' * (len(report.runs) > 1)}"
        lines.append(
            f"These {n} checkpoints are of {runs}, {told}{otherwise}: "
            "those of one run are not independent, so only the last of each is ranked."
        )
    lines.append(
        f"{n} checkpoints, {len(report.measures)} measures, ranked against the {kind} gap: {kind} on the test "
        "split minus that on the training split, the smaller the better a run generalizes."
    )
    lines += _counts(report)
    lines += _groups(report)
    if report.failures:
        lines.append(f"{len(report.failures)} more could not be measured: {listed(list(report.failures))}.")
    return lines


def _verdict(report: GapReport) -> list[str]:
    ranks = report.ranks
    told = [one for one in ranks.measures if one.overall is not None]
    if not told:
        reason = refusals(report)
        return [f"No measure could be ranked: {reason[0][0]}." if reason else "No measure was ranked."]
    clear = [one for one in told if one.p_holm is not None and one.p_holm < 1 - report.confidence]
    up = [one.measure for one in clear if _tau(one) > 0]
    down = [one.measure for one in clear if _tau(one) < 0]
    lines = [
        f"The gap is {which} where these are larger: {listed(names)} (after Holm's adjustment)."
        for names, which in ((up, "larger"), (down, "smaller"))
        if names
    ]
    if not clear:
        lines.append(
            f"No measure goes with the gap beyond chance after adjusting for {ranks.tested} tried ones: the data "
            "cannot tell."
        )
    best = [one for one in told if one.worst is not None and one.worst.worst < 0 < _tau(one)]
    if best:
        lines.append(
            f"{counted(len(best), 'measure')} with a positive tau overall, but the other sign in a group of runs: "
            f"{listed([one.measure for one in best])}."
        )
    return lines


def _counts(report: GapReport) -> list[str]:
    """Over how many examples losses and measures were taken: a loss of fewer examples is another number."""
    if not report.records:
        return []
    first = report.records[0]
    splits = " and ".join(f"{split.n:,} of {plain(split.split)}" for split in first.performance.splits)
    measured = first.fingerprint.samples
    if not splits or not isinstance(measured, int):
        return []
    return [
        f"Losses and scores are means over {splits}; the measures are of {measured:,} examples of "
        f"{plain(str(first.fingerprint.split or 'the training split'))}, whose loss is another one."
    ]


def _groups(report: GapReport) -> list[str]:
    """What m is, where a measure is one of m-sharpness: it does not follow the batch size."""
    names = [name for name in report.measures if name.startswith("worst_sharpness")]
    notes = {
        one.note for r in report.records for name in names if isinstance(one := r.readings.get(name), Reading)
    }
    return [
        f"Worst-case sharpness (worst_sharpness…): {plain(note)}, whatever the batch size."
        for note in sorted(notes)
    ]


def _ranked(report: GapReport, one: RankStatistics) -> Ranked:
    overall, worst = one.overall, one.worst
    moved = verdicts(report, one.measure)
    lo, hi = one.readings_lo, one.readings_hi
    return Ranked(
        measure=one.measure,
        tau="" if overall is None else format_tau(overall.tau),
        interval="" if overall is None else _between(overall.lo, overall.hi),
        p=NONE if one.p_holm is None else format_p(one.p_holm),
        readings=NONE if lo is None or hi is None else _between(lo, hi),
        worst=NONE if worst is None else f"{format_tau(worst.worst)} {_where(worst)}",
        moved=f"{moved.count('moved')} of {len(moved)}" if moved else NONE,
    )


def _between(lo: float, hi: float) -> str:
    return f"[{format_tau(lo)}, {format_tau(hi)}]"


def _where(worst: Axis) -> str:
    """What the runs of the worst group have in common, or what alone they differ in where that is all."""
    return f"at {plain(worst.worst_group)}" if worst.worst_group else f"over {plain(worst.name)}"


def _why(report: GapReport, one: RankStatistics) -> str:
    """Why there is no tau; where no checkpoint has the measure, its own reason."""
    found = [record.readings.get(one.measure) for record in report.records]
    said = {each.reason for each in found if isinstance(each, Refused)}
    own = len(said) == 1 and all(isinstance(each, Refused) for each in found)
    return f"at no checkpoint: {said.pop()}" if own else _without_name(one.reason, one.measure)


def _tau(one: RankStatistics) -> float:
    return one.overall.tau if one.overall is not None else 0.0


def _value(score: Score | None) -> str:
    if score is None or score.value is None:
        return NONE
    return format_number(score.value, score.lo, score.hi)


def _interval(score: Score) -> str:
    if score.value is None or score.lo is None or score.hi is None:
        return plain(score.reason)
    return format_interval(score.value, score.lo, score.hi)


def _without_name(reason: str, measure: str) -> str:
    return reason.replace(f"finite {measure} ", "finite value ").replace(f": {measure} is", ": the measure is")
