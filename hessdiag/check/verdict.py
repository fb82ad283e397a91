"""The verdict: an interval against a limit has three answers, and what was not measured has none."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hessdiag.check.budgets import Claim, Level
from hessdiag.formatting import format_ends
from hessdiag.shown import listed

NAMED = 3  # limits that the headline names
BRACKET = "bracket"
"""How the method of an interval begins whose value is only one of its ends."""


class Verdict(StrEnum):
    """What an interval says of a limit."""

    PASS = "pass"  # the whole interval is within
    FAIL = "fail"  # the whole interval is beyond
    UNSURE = "cannot tell"  # the limit lies inside the interval
    NONE = "no verdict"  # nothing was measured that could be compared


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its interval, and how they came about."""

    value: float
    lo: float
    hi: float
    method: str = ""

    @property
    def resolved(self) -> bool:
        """False for a bracket with an end farther from the value than zero is: its value says nothing."""
        farthest = max(self.hi - self.value, self.value - self.lo)
        return not self.method.startswith(BRACKET) or farthest <= abs(self.value)

    def words(self, *, signed: bool = False, percent: bool = False) -> str:
        """``5.85 [5.21, 6.49]``; of a bracket that does not resolve its number the two ends alone.

        Args:
            signed: whether a positive number has its sign.
            percent: whether it is a share to be shown as a percentage.
        """
        value, low, high = format_ends(self.value, self.lo, self.hi, signed=signed, percent=percent)
        if self.lo == self.hi:
            return value
        return f"{value} [{low}, {high}]" if self.resolved else f"[{low}, {high}]"


def upper(interval: Interval, limit: float) -> Verdict:
    """Whether a value known to lie in ``interval`` is at most ``limit``."""
    if interval.lo > limit:
        return Verdict.FAIL
    return Verdict.PASS if interval.hi <= limit else Verdict.UNSURE


def lower(interval: Interval, limit: float) -> Verdict:
    """Whether a value known to lie in ``interval`` is at least ``limit``: the mirror image of `upper`."""
    return upper(Interval(-interval.value, -interval.hi, -interval.lo), -limit)


def either(one: Verdict, other: Verdict) -> Verdict:
    """Of two conditions of which one suffices."""
    if Verdict.PASS in (one, other):
        return Verdict.PASS
    return Verdict.FAIL if one is other is Verdict.FAIL else Verdict.UNSURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One limit of one budget, decided: a line of the table, a test case of JUnit.

    Attributes:
        budget: its key, as the user wrote it (may hold any character).
        metric: its name.
        scope: label of what it was measured on.
        level: "warn" or "error".
        limit: as shown, "≤ +15%".
        limit_kind: "min", "max", "max_increase" or "max_decrease".
        threshold: the limit as a number: a share of the baseline if ``relative``.
        relative: whether ``tested`` is a share of the baseline.
        verdict: the answer.
        measured: value and interval of the metric; None if there is none.
        baseline: recorded value; None where the limit needs none.
        tested: what was held against ``threshold``: the metric itself or its change.
        claim: what the interval is about.
        reason: one line that says it in words, with what would be needed where nobody can tell.
        file: where the budget is written.
        line: there, from 1.
    """

    budget: str
    metric: str
    scope: str
    level: Level
    limit: str
    limit_kind: str
    threshold: float
    relative: bool
    verdict: Verdict
    measured: Interval | None = None
    baseline: float | None = None
    tested: Interval | None = None
    claim: Claim = "samples"
    reason: str = ""
    file: str | None = None
    line: int | None = None

    @property
    def name(self) -> str:
        """Budget and limit: unique within a report."""
        return f"{self.budget} {self.limit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a check found.

    Attributes:
        rows: one per limit; none at all is no verdict.
        problems: why there is no verdict, or not on everything; one line each.
        warnings: what changes how the rows read, no reason to fail.
        notes: facts.
        checkpoint: what was measured.
        baseline: what it was compared with.
        strict: whether "cannot tell" is no verdict, and a failed warning fails.
        environment: where it was measured.
        cost: products spent.
    """

    rows: tuple[Row, ...] = ()
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    checkpoint: str = ""
    baseline: str = ""
    strict: bool = False
    environment: dict[str, Any] = field(default_factory=dict)
    cost: int = 0

    @property
    def exit_code(self) -> int:
        """0 passed · 1 an error-level budget failed · 3 no verdict."""
        if any(self.fails(row) for row in self.rows):
            return 1
        undecided = self.problems or not self.rows or any(self.undecided(row) for row in self.rows)
        return 3 if undecided else 0

    def fails(self, row: Row) -> bool:
        """Whether this row makes the check fail."""
        return row.verdict is Verdict.FAIL and (row.level == "error" or self.strict)

    def undecided(self, row: Row) -> bool:
        """Whether this row leaves the check without a verdict."""
        return row.verdict is Verdict.NONE or (self.strict and row.verdict is Verdict.UNSURE)

    @property
    def headline(self) -> str:
        """One line: "failed: 1 of 3 limits exceeded (lambda_max ≤ +15%)"."""
        code = self.exit_code
        if code == 1:
            names = [row.name for row in self.rows if self.fails(row)]
            return f"failed: {len(names)} of {len(self.rows)} limits exceeded ({listed(names, NAMED)})"
        if code == 3:
            names = [row.name for row in self.rows if self.undecided(row)]
            why = self.problems[0] if self.problems else listed(names, NAMED) or "nothing was checked"
            return f"no verdict: {why}"
        unsure = [row.name for row in self.rows if row.verdict is not Verdict.PASS]
        rest = f"; {len(unsure)} with a warning ({listed(unsure, NAMED)})" if unsure else ""
        return f"passed: {len(self.rows) - len(unsure)} of {len(self.rows)} limits kept{rest}"
