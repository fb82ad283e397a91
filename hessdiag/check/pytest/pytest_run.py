"""A run of a test: a checkpoint measured when the test asks, looked at closer when a limit does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hessdiag.check.budgets import METRICS, Budget, Scope
from hessdiag.check.gate import Plan
from hessdiag.check.recorded import Entry
from hessdiag.check.rules import MAX_PROBES, Rules
from hessdiag.check.schema import SCHEMA, faults_of_form
from hessdiag.check.subject import Subject, entry_of
from hessdiag.errors import UsageError
from hessdiag.option import hint
from hessdiag.problem import Problem
from hessdiag.results import Analysis, Metric
from hessdiag.schemes.assemble import build
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import PAIRED, UNPAIRED, Settings
from hessdiag.sources.spec import exists, split_key, split_spec

QUANTITIES = ("lambda_max", "trace")  # the two a first look needs
OPTIONS = tuple(field.name for field in fields(Settings) if field.name not in UNPAIRED)


class Run:
    """One measured checkpoint. ``run.trace`` is ``run.metrics["trace"]``; all of `hessdiag.Analysis` is here too.

    Intervals are those of one look of `Plan`: at 97.5 % where 95 % were asked for, as a limit is looked at twice.

    Args:
        subject: the problem with its weights.
        settings: of the measurement.
        plan: how it is decided.
        name: what tells it from other runs of the test; empty if nothing needs to.
        probes: of every look at least.

    Attributes:
        analysis: what was measured up to now: ``quantities``, and metrics checked besides.
        scope: split that they are of.
    """

    analysis: Analysis

    def __init__(self, subject: Subject, settings: Settings, plan: Plan, name: str, probes: int) -> None:
        self.name, self.plan, self.probes = name, plan, probes
        self.scope = Scope(settings.split)
        self._subject = subject
        self._spent: dict[Scope, dict[str, tuple[int, float]]] = {}
        self.first(self.scope, *settings.quantities)

    def first(self, scope: Scope, *metrics: str) -> Entry:
        """What the first look at metrics of a scope sees."""
        wanted = {"negative_mass" if name == "density" else name for name in metrics}  # it is read off the density
        plan = self.plan
        return self.entry(scope, wanted, probes=self.probes, rtol=plan.rtol, confidence=plan.look_confidence)

    def entry(
        self, scope: Scope, metrics: Collection[str], *, probes: int, rtol: float, confidence: float
    ) -> Entry:
        """The metrics of a scope, measured where what was spent on them is not enough."""
        spent = self._spent.setdefault(scope, {})
        probes = max(probes, self.probes)
        if any(name not in spent or spent[name][0] < probes or spent[name][1] > rtol for name in metrics):
            self._subject.entry(scope, metrics, probes=probes, rtol=rtol, confidence=confidence)
            spent.update(dict.fromkeys(metrics, (probes, rtol)))
        found = self._subject.analyses[scope.label]
        if scope == self.scope:  # layers and spectrum are those of the first measurement, which had them
            self.analysis = replace(self.analysis, metrics=found.metrics) if "analysis" in vars(self) else found
        return entry_of(found)

    def recorded(self, scope: Scope, metrics: Collection[str], reason: str, at: str | None) -> Entry:
        """What a baseline keeps.

        Args:
            scope: looked at before.
            metrics: of them.
            reason: why it is recorded.
            at: commit.
        """
        entry = entry_of(self._subject.analyses[scope.label], reason, at)
        return replace(entry, metrics={name: entry.metrics[name] for name in metrics})

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What was measured."""
        return self.analysis.metrics

    def __getattr__(self, name: str) -> Any:
        """Metrics by their names, and everything else an `Analysis` has."""
        if name in ("analysis", "_subject"):  # a copy that is not filled yet
            raise AttributeError(name)
        if name in METRICS:
            if name not in self.metrics:
                have = ", ".join(self.metrics)
                msg = f"{name} was not measured, only {have}: name it in hessdiag.run(..., quantities=[...])"
                raise AttributeError(msg)
            return self.metrics[name]
        return getattr(self.analysis, name)


def measured(
    problem: str | Problem,
    source: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    name: str,
    root: Path,
    most: bool,
) -> Run:
    """Build a problem and measure it.

    Args:
        problem: itself, or the name of its factory or model.
        source: checkpoint, and fields of `Recipe`; None is not given.
        asked: fields of `Settings`, and max_probes.
        name: of the run.
        root: folder that files and modules are looked for in.
        most: whether max_probes are spent from the start, as for a baseline.

    Raises:
        HessdiagError: as `hessdiag.analyze` and the factory's.
    """
    rest = dict(asked)
    given = rest.pop("max_probes", None)
    settings = _settings(rest)
    probes, rtol = settings.most_probes, settings.known_to.lambda_max
    max_probes = max(probes, MAX_PROBES) if given is None else given
    if max_probes < probes:
        msg = f"max_probes={max_probes}: at least the {probes} of probes are needed"
        raise UsageError(msg)
    plan = Plan(
        budgets=(),
        confidence=settings.confidence,
        probes=probes,
        max_probes=max_probes,
        escalate=max_probes > probes,
        rtol=rtol,
    )
    run = {key: getattr(settings, key) for key in OPTIONS if key not in ("quantities", "confidence")}
    return Run(_subject(problem, source, run, root), settings, plan, name, max_probes if most else probes)


def _settings(asked: dict[str, Any]) -> Settings:
    for name in asked:
        if name not in OPTIONS:
            msg = f"hessdiag.run has no option {name!r}; {hint(name, OPTIONS)}"
            raise UsageError(msg)
    quantities = asked.get("quantities", QUANTITIES)
    asked["quantities"] = (quantities,) if isinstance(quantities, str) else quantities
    return Settings(**{**PAIRED, **asked})


def _subject(problem: str | Problem, source: Mapping[str, Any], run: Mapping[str, Any], root: Path) -> Subject:
    if isinstance(problem, Problem):
        if any(source.values()):
            named = next(name for name, value in source.items() if value)
            msg = f"hessdiag.run: a Problem has its weights already; {named} is for factories and named models"
            raise UsageError(msg)
        return Subject(problem, run)
    if not isinstance(problem, str):
        kind = type(problem).__name__
        msg = f"hessdiag.run: {kind} is no problem: give a hessdiag.Problem, or 'pkg.module:function'"
        raise UsageError(msg)
    checkpoint = None if source["checkpoint"] is None else _found(str(source["checkpoint"]), root)
    given = {name: value for name, value in source.items() if name != "checkpoint" and value is not None}
    recipe = Recipe.of(problem, **given, root=str(root), app_dir=str(root))
    built = build(replace(recipe, factory=_under(recipe.factory, root)), checkpoint)
    sha256 = built.weights.sha256 if built.weights else None
    return Subject(built.problem, run, about=(str(source["checkpoint"] or ""), sha256))


def _under(factory: str | None, root: Path) -> str | None:
    if factory is None:
        return None
    where, name = split_spec(factory)
    return f"{_found(where, root)}:{name}" if where.endswith(".py") else factory


def _found(path: str, root: Path) -> str:
    """A file under rootdir, whatever folder pytest was called in; else as it was given."""
    under = str(root / path)
    return under if exists(split_key(under)[0]) else path


def budget_of(key: str, table: Mapping[str, Any], split: str) -> Budget:
    """A budget, by the rules of a configuration's.

    Args:
        key: the metric, with its scope.
        table: limits, abs_floor, claim and level; None is not given.
        split: of the run.

    Raises:
        UsageError: with every fault.
    """
    given = {name: value for name, value in table.items() if value is not None}
    sheet, faults = faults_of_form(
        {
            "schema": SCHEMA,
            "problem": "a:b",  # the rules want one
            "run": {"split": split},
            "check": {"budgets": {key: given}},
        }
    )
    rules = Rules(sheet, faults)
    budgets = rules.budgets()
    if rules.faults:
        said = "; ".join(f"{'.'.join(fault.path[2:])}: {fault.text}" for fault in rules.faults)
        msg = f"hessdiag.check: {said}"
        raise UsageError(msg)
    return budgets[0]
