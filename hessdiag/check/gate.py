"""The gate: measure what the budgets ask for, compare like with like, decide, and look closer where needed.

Looking twice at the same limit would fail by chance twice as often, so where a closer look is allowed each look
takes half of the error that ``confidence`` leaves (Bonferroni). The first look spends ``probes``, the second what
the first says is needed, at most ``max_probes``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hessdiag.check.budgets import Budget, Scope
from hessdiag.check.comparable import differences, explain, reproduced, same_weights, surroundings
from hessdiag.check.config import Config, ConfigError
from hessdiag.check.decide import Evidence, decide, needs_floor, probes_needed
from hessdiag.check.recorded import Entry
from hessdiag.check.rules import MAX_PROBES
from hessdiag.check.subject import Source
from hessdiag.check.verdict import Report, Row, Verdict
from hessdiag.errors import MeasurementError, NoVerdictError, UsageError
from hessdiag.settings import DEFAULT, PAIRED

LOOKS = 2
SPARE = 1.3  # the spread that says how many probes are needed is itself an estimate
FINER = 0.1  # of rtol, where an extreme's certificate straddles the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a check measures and decides.

    Attributes:
        budgets: those that count: level not off, and selected.
        confidence: for each limit, over all looks at it.
        probes: of the first look.
        max_probes: of the second.
        escalate: whether there is a second.
        rtol: of the extremes, in the first look.
        metrics: to be measured besides those with budgets.
        split: scope of those.
    """

    budgets: tuple[Budget, ...]
    confidence: float = DEFAULT.confidence
    probes: int = PAIRED["probes"]
    max_probes: int = MAX_PROBES
    escalate: bool = True
    rtol: float = PAIRED["rtol"]
    metrics: tuple[str, ...] = ()
    split: str = DEFAULT.split

    @classmethod
    def of(cls, config: Config, only: Sequence[str] = ()) -> Plan:
        """What a configuration asks for.

        Args:
            config: as read.
            only: keys of budgets, or metrics; if given, the others are left out.
        """
        chosen = [b for b in config.budgets if b.level != "off" and (not only or {b.key, b.metric} & set(only))]
        settings = {**PAIRED, **config.run}
        return cls(
            budgets=tuple(chosen),
            confidence=config.confidence,
            probes=settings["probes"],
            max_probes=config.max_probes,
            escalate=config.on_unsure == "escalate",
            rtol=settings["rtol"],
            metrics=config.metrics,
            split=settings.get("split", DEFAULT.split),
        )

    @property
    def look_confidence(self) -> float:
        """Of the intervals of one look."""
        return 1 - (1 - self.confidence) / (LOOKS if self.escalate else 1)

    def scopes(self) -> dict[Scope, set[str]]:
        """What is to be measured, in the order of the budgets."""
        wanted: dict[Scope, set[str]] = {}
        for budget in self.budgets:
            wanted.setdefault(budget.scope, set()).add(budget.metric)
        if self.metrics and self.budgets:
            wanted.setdefault(Scope(self.split), set()).update(self.metrics)
        return wanted


class Gate:
    """One check in progress.

    Args:
        plan: what to decide, and how.
        base: where recorded values come from.
        new: where measured ones come from.
    """

    def __init__(self, plan: Plan, base: Source, new: Source) -> None:
        self.plan, self.base, self.new = plan, base, new
        self.recorded: dict[Scope, Entry] = {}
        self.measured: dict[Scope, Entry] = {}
        self.missing: dict[Scope, str] = {}
        self.missing_base: dict[Scope, str] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def run(self, **facts: Any) -> Report:
        """Measure, compare, decide; a second look where nobody can tell.

        Args:
            **facts: other fields of the `Report`.

        Raises:
            ConfigError: a limit relative to a baseline that may be zero, without ``abs_floor``.
            MeasurementError: a fault in the products, or the same weights gave other numbers.
        """
        if not self.plan.budgets:
            self.problems.append("no budget was selected: nothing was checked; see [tool.hessdiag.check.budgets]")
        for scope, metrics in self.plan.scopes().items():
            self._look(scope, metrics, self.plan.probes, self.plan.rtol)
            self._compare(scope)
        self._require_floors()
        rows = self._rows()
        if self.plan.escalate:
            rows = self._closer(rows)
        notes = (*facts.pop("notes", ()), *self._claims(rows))
        return Report(
            rows=tuple(rows),
            problems=tuple(dict.fromkeys(self.problems)),
            warnings=tuple(dict.fromkeys(self.warnings)),
            notes=tuple(notes),
            **facts,
        )

    def _look(self, scope: Scope, metrics: Iterable[str], probes: int, rtol: float) -> None:
        asked: dict[str, Any] = {"probes": probes, "rtol": rtol, "confidence": self.plan.look_confidence}
        sides = [(self.new, self.measured, self.missing)]
        if any(b.scope == scope and any(x.needs_baseline for x in b.limits) for b in self.plan.budgets):
            sides.insert(0, (self.base, self.recorded, self.missing_base))
        for source, found, missing in sides:
            try:
                found[scope] = source.entry(scope, set(metrics), **asked)
            except NoVerdictError as error:
                missing[scope] = str(error)
                self.problems.append(str(error))

    def _compare(self, scope: Scope) -> None:
        """Drop a baseline of another subject; refuse numbers that the same weights do not reproduce."""
        base, new = self.recorded.get(scope), self.measured.get(scope)
        if base is None or new is None:
            return
        found = differences(base.fingerprint, new.fingerprint)
        if found:
            del self.recorded[scope]
            self.missing_base[scope] = f"{scope.label}: incomparable, {', '.join(d.field for d in found)} differ"
            self.problems += explain(scope.label, found)
            return
        self.warnings += surroundings(base.env, new.env)
        unlike = reproduced(base, new)
        if unlike:
            msg = f"{scope.label}: {unlike[0]}"
            raise MeasurementError(msg)

    def _require_floors(self) -> None:
        faults = []
        for budget in self.plan.budgets:
            entry = self.recorded.get(budget.scope)
            base = entry.metrics.get(budget.metric) if entry else None
            if base is not None and needs_floor(budget, base):
                where = f"{budget.file}:{budget.line}: " if budget.file else ""
                faults.append(
                    f"{where}check.budgets.{budget.key}: the baseline {base.value:.4g} in [{base.lo:.4g}, "
                    f"{base.hi:.4g}] may be zero, a share of it means nothing; give abs_floor, a change allowed"
                )
        if faults:
            raise ConfigError(faults)

    def _rows(self) -> list[Row]:
        return [row for budget in self.plan.budgets for row in decide(budget, self._evidence(budget))]

    def _evidence(self, budget: Budget) -> Evidence:
        base, new = self.recorded.get(budget.scope), self.measured.get(budget.scope)
        recorded = base.metrics.get(budget.metric) if base else None
        measured = new.metrics.get(budget.metric) if new else None
        missing = self.missing.get(budget.scope) or self.missing_base.get(budget.scope, "")
        if measured is None and not missing:
            missing = f"{budget.scope.label}: {budget.metric} was not measured"
        elif recorded is None and not missing:
            missing = f"{budget.scope.label}: the baseline has no {budget.metric}: record it with baseline update"
        return Evidence(
            measured=measured,
            baseline=recorded,
            same=base is not None and new is not None and same_weights(base.fingerprint, new.fingerprint),
            missing=missing,
            confidence=self.plan.look_confidence,
            samples=(new.fingerprint.samples or 0) if new else 0,
        )

    def _closer(self, rows: list[Row]) -> list[Row]:
        """Spend more where nobody can tell, and where more would help."""
        unsure = [row for row in rows if row.verdict is Verdict.UNSURE and row.claim == "samples"]
        by_scope: dict[Scope, dict[str, int]] = {}
        for budget in self.plan.budgets:
            for row in unsure:
                if row.budget == budget.key and (probes := self._probes_for(row, budget)) is not None:
                    metrics = by_scope.setdefault(budget.scope, {})
                    metrics[budget.metric] = max(metrics.get(budget.metric, 0), probes)
        for scope, metrics in by_scope.items():
            self._look(scope, metrics, max(metrics.values()), self.plan.rtol * FINER)
        return self._rows() if by_scope else rows

    def _probes_for(self, row: Row, budget: Budget) -> int | None:
        """Probes of the second look; None where it would not help."""
        measured = self.measured[budget.scope].metrics[budget.metric]
        if measured.kind == "ritz":
            return self.plan.probes
        if not measured.per_probe or measured.kind == "bracket":
            return None
        needed = probes_needed(row, len(measured.per_probe)) or self.plan.max_probes
        probes = min(self.plan.max_probes, max(2 * self.plan.probes, math.ceil(SPARE * needed)))
        return probes if probes > len(measured.per_probe) else None

    def _claims(self, rows: Sequence[Row]) -> Iterable[str]:
        """What the verdicts are about."""
        if any(row.claim == "samples" for row in rows):
            sizes = sorted({e.fingerprint.samples or 0 for e in self.measured.values()})
            shown = " and ".join(f"{n:,}" for n in sizes)
            yield f"verdicts are about the {shown} samples measured, not the population"
        if any(row.claim == "population" for row in rows):
            named = ", ".join(dict.fromkeys(row.budget for row in rows if row.claim == "population"))
            yield f"about the population the samples were drawn from: {named} (first order, spread over batches)"


def refuse_worse(budgets: Iterable[Budget], entries: dict[Scope, Entry]) -> None:
    """Refuse to record values beyond a ``max`` or ``min`` of error level: a baseline must not freeze a failure.

    Raises:
        UsageError: naming the first.
    """
    for budget in budgets:
        hard = replace(budget, limits=tuple(x for x in budget.limits if not x.needs_baseline))
        entry = entries.get(budget.scope)
        if budget.level != "error" or entry is None or budget.metric not in entry.metrics:
            continue
        for row in decide(hard, Evidence(measured=entry.metrics[budget.metric], baseline=None)):
            if row.verdict is Verdict.FAIL:
                msg = f"{row.name}: {row.reason}; no baseline is recorded beyond a limit: change the limit first"
                raise UsageError(msg)
