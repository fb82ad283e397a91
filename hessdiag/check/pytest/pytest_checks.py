"""The fixture ``hessdiag``: a test measures a checkpoint, and holds it against limits and its own baseline.

Whatever decides here is `hessdiag.check`; it gets one budget at a time.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hessdiag.check.baseline import Line, diff, read, updated
from hessdiag.check.budgets import Budget, Claim, Level, Scope
from hessdiag.check.config import ConfigError
from hessdiag.check.gate import Gate, refuse_worse
from hessdiag.check.pytest.pytest_names import RECORDED, HessdiagWarning
from hessdiag.check.pytest.pytest_run import Run, budget_of, measured
from hessdiag.check.pytest.pytest_words import outcome, properties, reworded
from hessdiag.check.recorded import Entry
from hessdiag.check.subject import Recordings
from hessdiag.check.verdict import Report
from hessdiag.errors import HessdiagError, NoVerdictError, RaisedError, UsageError, one_line
from hessdiag.problem import Problem
from hessdiag.results.fingerprint import IDENTITY
from hessdiag.sources.git import commit

LONGEST = 2000  # characters of a failure's line


class Checks:
    """The value of the fixture ``hessdiag``.

    Args:
        node: the test.
        file: of the baselines.
        root: pytest's rootdir.
        reason: of recording; None compares.
    """

    def __init__(self, node: Any, file: Path, root: Path, reason: str | None) -> None:
        self._node, self._file, self._root, self._reason = node, file, root, reason
        self._runs: dict[str, Run] = {}
        self._pending: dict[str, tuple[Run, Scope, set[str]]] = {}

    def run(
        self,
        problem: str | Problem,
        *,
        checkpoint: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        data: str | Sequence[str] | None = None,
        loss: str | None = None,
        trust_pickle: bool = False,
        name: str = "",
        **settings: Any,
    ) -> Run:
        """Measure a checkpoint.

        Args:
            problem: a `Problem`, its factory (``pkg.module:function`` or ``path/file.py:function``), or a model by
                name (``hf:DIR``).
            checkpoint: file of weights, or ``file::entry``, looked for under pytest's rootdir, then here.
            options: of the factory or model.
            data: of a model by name: ``text:FILE``, or one of each split.
            loss: of a model by name; by default its own.
            trust_pickle: let the checkpoint run code. Only for files of one's own making.
            name: tells this run from others of the same test in the baseline.
            **settings: fields of `Settings`; quantities are by default lambda_max and trace. And max_probes, 128:
                spent where nobody can tell; baselines are recorded with as many. Defaults for a test, a class or a
                module: ``@pytest.mark.hessdiag(samples=256, probes=8)``.

        Returns:
            The run. Cost as `hessdiag.analyze`. Whatever is wrong fails the test in one line.
        """
        __tracebackhide__ = True
        source: dict[str, Any] = {"checkpoint": checkpoint, "options": options, "data": data, "loss": loss}
        source["trust_pickle"] = trust_pickle or None

        def work() -> Run:
            asked = {**self._marked(), **settings}
            return measured(problem, source, asked, name=name, root=self._root, most=self._reason is not None)

        run: Run = self._or_fail(work)
        for text in run.analysis.warnings:
            warnings.warn(HessdiagWarning(f"{self._title(run)}: {text}"), stacklevel=2)
        return run

    def check(
        self,
        run: Run,
        metric: str,
        *,
        min: float | None = None,
        max: float | None = None,
        max_increase: float | str | None = None,
        max_decrease: float | str | None = None,
        abs_floor: float | None = None,
        claim: Claim = "samples",
        level: Level = "error",
    ) -> Report:
        """Fail the test if a metric is beyond a limit, or if nothing is recorded that it can be compared with.

        Args:
            run: of `run`.
            metric: its name, or ``metric[split]``, ``metric@glob``, ``metric[split]@glob``.
            min: of the value.
            max: of the value.
            max_increase: since the baseline: in the metric's units, or a share like "15%".
            max_decrease: the same downwards.
            abs_floor: changes up to this are always allowed; needed where the baseline may be zero.
            claim: "population" for a limit on what the samples were drawn from.
            level: "warn" warns instead of failing, "off" does nothing.

        Returns:
            What was found. Where the interval holds the limit, more probes are spent, up to ``max_probes``; where
            that does not tell, `HessdiagWarning` is issued.
        """
        __tracebackhide__ = True
        table = {"min": min, "max": max, "max_increase": max_increase, "max_decrease": max_decrease}
        table |= {"abs_floor": abs_floor, "claim": claim, "level": level}
        report: Report = self._or_fail(lambda: self._decided(run, metric, table))
        failures, said = outcome(report, self._shown_file, self.command)
        for text in said:
            warnings.warn(HessdiagWarning(f"{self._title(run)}, {text}"), stacklevel=2)
        if failures:
            pytest.fail("\n".join(f"{self._title(run)}, {text}" for text in failures))
        return report

    def record(self) -> None:
        """Write what was checked against a baseline into its file, beside what is there."""
        __tracebackhide__ = True
        if self._pending:
            self._or_fail(self._write)

    @property
    def command(self) -> str:
        """What records the baselines of this test."""
        return f"pytest --hessdiag-update {shlex.quote(_text(self._node.nodeid))}"

    def _marked(self) -> dict[str, Any]:
        """Options of the marker: of the test's own before its class's, its class's before its module's."""
        marks = list(self._node.iter_markers("hessdiag"))[::-1]
        if any(mark.args for mark in marks):
            msg = "@pytest.mark.hessdiag takes options by name: @pytest.mark.hessdiag(probes=8, samples=256)"
            raise UsageError(msg)
        return {key: value for mark in marks for key, value in mark.kwargs.items()}

    def _decided(self, run: Run, metric: str, table: dict[str, Any]) -> Report:
        """The verdict; while recording, only on the limits that need no baseline."""
        if not isinstance(run, Run):
            msg = f"hessdiag.check: {type(run).__name__} is no run: give what hessdiag.run(...) returned"
            raise UsageError(msg)
        budget = budget_of(metric, table, run.scope.split)
        if budget.level == "off":
            return Report()
        hard = replace(budget, limits=tuple(limit for limit in budget.limits if not limit.needs_baseline))
        changes = hard.limits != budget.limits
        label = self._label(run, budget.scope)
        if changes and self._runs.setdefault(label, run) is not run:
            which = f"called {run.name!r}" if run.name else "without a name"
            msg = f"two runs of this test are {which}: tell their baselines apart, hessdiag.run(..., name=...)"
            raise UsageError(msg)
        base = self._baseline(label, budget) if changes and self._reason is None else Recordings({}, "")
        if changes and self._reason is not None:
            refuse_worse((hard,), {budget.scope: run.first(budget.scope, budget.metric)})
            self._pending.setdefault(label, (run, budget.scope, set()))[2].add(budget.metric)
            budget = hard
        if not budget.limits:
            return Report()
        report = Gate(replace(run.plan, budgets=(budget,)), base, run).run()
        self._node.user_properties.extend(properties(run.name, report.rows).items())
        return report

    def _baseline(self, label: str, budget: Budget) -> Recordings:
        """The entry of this test, under the name its scope has in a check."""
        try:
            entry = read(self._file).entries.get(label)
        except NoVerdictError:
            entry = None
        known: dict[str, Entry] = {}
        if entry is not None and budget.metric in entry.metrics:
            known[budget.scope.label] = entry
        missing = (
            f"{self._shown_file} has no baseline of {budget.metric} in this test: record it with {self.command}"
        )
        return Recordings(known, missing)

    def _write(self) -> None:
        at = commit(self._root)
        entries = {
            label: run.recorded(scope, metrics, str(self._reason), at)
            for label, (run, scope, metrics) in self._pending.items()
        }
        for found in diff(*updated(self._file, entries)):
            news = found.changed if isinstance(found, Line) else found.field not in IDENTITY
            if found.scope in entries and news:
                self._node.user_properties.append((RECORDED, str(found)))

    def _label(self, run: Run, scope: Scope) -> str:
        """The name of a baseline: test, run, matrix. The last two hold no "::", so that none has two readings."""
        parts = [part.replace("%", "%25").replace("::", "%3A%3A") for part in (run.name, scope.label) if part]
        return _text("::".join((self._node.nodeid, *parts)))

    def _title(self, run: Run) -> str:
        return _text(self._node.nodeid) + (f" ({run.name})" if run.name else "")

    @property
    def _shown_file(self) -> str:
        inside = self._file.is_relative_to(self._root)
        return str(self._file.relative_to(self._root) if inside else self._file)

    def _or_fail(self, work: Callable[[], Any]) -> Any:
        """Refusals fail the test in one line; what the user's own code raised comes with its traceback."""
        __tracebackhide__ = True
        cause: BaseException | None = None
        try:
            with warnings.catch_warnings():  # tests often turn warnings into errors, and torch deprecates itself
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\b")
                return work()
        except HessdiagError as error:
            text = "; ".join(error.faults) if isinstance(error, ConfigError) else one_line(error, LONGEST)
            cause = error.__cause__ if isinstance(error, RaisedError) else None
            text += " (its traceback is above)" if cause is not None else ""
        raise pytest.fail.Exception(reworded(text, self.command)) from cause


def _text(text: str) -> str:
    """A test's name as a file can hold it: escaping can be switched off in pytest, and surrogates are no text."""
    return text.encode("utf-8", "backslashreplace").decode()
