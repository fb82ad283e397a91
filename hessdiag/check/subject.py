"""Where a check's numbers come from: a checkpoint measured scope by scope, or measurements made before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from hessdiag.analysis import Measurement
from hessdiag.analysis.measurement import Progress
from hessdiag.check.budgets import METRICS, Scope
from hessdiag.check.recorded import Entry
from hessdiag.engine.products.group import ALONE, Group
from hessdiag.errors import NothingMatchedError, NoVerdictError
from hessdiag.problem import Problem
from hessdiag.results import Analysis, Store
from hessdiag.resume import RESUME
from hessdiag.settings import DEFAULT, Settings

SURROUNDINGS = ("hessdiag", "torch", "device", "device_name", "method", "date")


class Source(Protocol):
    """Something that knows the metrics of scopes."""

    def entry(
        self, scope: Scope, metrics: Collection[str], *, probes: int, rtol: float, confidence: float
    ) -> Entry:
        """The metrics of one scope.

        Raises:
            NoVerdictError: it has none for this scope; the text says why.
        """


class Recordings:
    """Entries that are there already: a baseline's, or those of runs analyzed before.

    Args:
        entries: by the scope's label.
        missing: why a scope that is not among them is not.
    """

    def __init__(self, entries: Mapping[str, Entry], missing: str) -> None:
        self.entries, self.missing = entries, missing

    @classmethod
    def of_runs(cls, analyses: Iterable[Analysis], missing: str) -> Recordings:
        """Runs by the split they were measured on."""
        return cls({str(a.fingerprint.split or DEFAULT.split): entry_of(a) for a in analyses}, missing)

    def entry(
        self,
        scope: Scope,
        metrics: Collection[str],  # noqa: ARG002
        *,
        probes: int,  # noqa: ARG002
        rtol: float,  # noqa: ARG002
        confidence: float,  # noqa: ARG002
    ) -> Entry:
        """The recorded entry, as it is."""
        if scope.label not in self.entries:
            msg = f"{scope.label}: {self.missing}"
            raise NoVerdictError(msg)
        return self.entries[scope.label]


class Subject:
    """A checkpoint in its problem: every scope is measured when it is asked for, and only once.

    A finished measurement is kept under ``cache`` by everything it depends on, so that an interrupted check
    goes on where it was: the unit is one scope with one number of probes.

    Args:
        problem: with its weights.
        run: fields of `Settings`, without quantities, confidence.
        cache: folder of finished measurements; None keeps none.
        report: of progress, (stage, done, total).
        say: takes lines for the reader, the forecast of the cost among them; None: none is made.
        about: title of the checkpoint and sha256 of its file.
        group: the ranks that measure together; what is kept, rank 0 keeps and finds.
    """

    def __init__(
        self,
        problem: Problem,
        run: Mapping[str, Any],
        *,
        cache: Path | None = None,
        report: Progress | None = None,
        say: Callable[[str], None] | None = None,
        about: tuple[str, str | None] = ("", None),
        group: Group = ALONE,
    ) -> None:
        self.problem, self.run, self.store = problem, dict(run), Store(folder=cache, say=say)
        self.report, self.say, self.about, self.group = report, say, about, group
        self.analyses: dict[str, Analysis] = {}
        self.products = 0

    def entry(
        self, scope: Scope, metrics: Collection[str], *, probes: int, rtol: float, confidence: float
    ) -> Entry:
        """Measure the metrics of a scope; cost as `hessdiag.analyze` with these quantities."""
        analysis = self._measured(scope, metrics, probes, rtol, confidence)
        before = self.analyses.get(scope.label)
        if before is not None:
            analysis = replace(analysis, metrics={**before.metrics, **analysis.metrics})
        self.analyses[scope.label] = analysis
        return entry_of(analysis)

    def _measured(
        self, scope: Scope, metrics: Collection[str], probes: int, rtol: float, confidence: float
    ) -> Analysis:
        run: dict[str, Any] = {**self.run, "split": scope.split, "probes": probes, "rtol": rtol}
        if scope.glob:
            run["params"] = (scope.glob, *(g for g in self.run.get("params") or () if g.startswith("!")))
        quantities = tuple(name for name in METRICS if name in metrics)
        try:
            settings = Settings(quantities=quantities, confidence=confidence, **run)
            measurement = Measurement(self.problem, settings, group=self.group)
        except NothingMatchedError as error:
            msg = f"{scope.label}: {error}"
            raise NoVerdictError(msg) from error
        key = measurement.key
        found = self.group.first(lambda: self.store.recall(key))
        if self.say is not None:
            before = f"taken from {key}.json, measured before; `fresh=True` measures again"
            self.say(f"{scope.label}: {before if found else measurement.forecast()}")
        if found is not None:
            return found
        if self.store.folder is not None:
            goes_on = measurement.keep_in(self.store.folder / RESUME)
            if goes_on and self.say is not None:
                self.say(f"{scope.label}: {goes_on}")
        result = measurement.run(progress=self.report).about(self.about[0], (), self.about[1])
        self.products += result.cost.products
        if measurement.repeatable and self.group.rank == 0:
            self.store.keep(key, scope.label, result)
        if measurement.kept is not None:
            measurement.kept.forget()
        return result


def entry_of(analysis: Analysis, reason: str = "", commit: str | None = None) -> Entry:
    """A measurement as it is compared or recorded."""
    env: dict[str, Any] = {key: analysis.environment[key] for key in SURROUNDINGS if key in analysis.environment}
    if analysis.title:
        env["checkpoint"] = analysis.title
    return Entry.of(analysis, reason, {**env, **({"commit": commit} if commit else {})})
