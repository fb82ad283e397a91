"""What a configuration of the right form must also obey: names exist, limits can be kept, no two are alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, time
from typing import Any

from hessdiag.check.budgets import (
    LIMITS,
    METRICS,
    PERCENT,
    WITH_DATA_ERROR,
    Budget,
    Limit,
    Scope,
    parse_key,
    parse_limit,
)
from hessdiag.check.schema import SCHEMA, BudgetTable, Fault, Sheet, recipe_of, shown
from hessdiag.errors import UsageError
from hessdiag.option import hint
from hessdiag.settings import DEFAULT, PAIRED, Settings

MAX_PROBES = 4 * PAIRED["probes"]  # four times the default probes: halves an interval


class Rules:
    """Reads a sheet; what is wrong with it is collected on the way.

    Attributes:
        sheet: of the right form.
        faults: the form's, and those found here.
        run: fields of `Settings` that were given, without the confidence.
        confidence: of every interval.
        max_probes: at least the probes of the run.
    """

    def __init__(self, sheet: Sheet, faults: list[Fault]) -> None:
        self.sheet = sheet
        self.faults = list(faults)
        self._top()
        self._problem()
        self._options()
        self._quantities()
        self.run = self._run()
        self._confidence()
        self.max_probes = self._max_probes()

    def _fault(self, *path: str, text: str) -> None:
        self.faults.append(Fault(path, text))

    def _faulty(self, *path: str) -> bool:
        return any(fault.path[: len(path)] == path for fault in self.faults)

    def _top(self) -> None:
        if self.sheet.version != SCHEMA:
            self._fault("schema", text=f"{shown(self.sheet.version)}; it must be {SCHEMA}")
        for name in ("checkpoint", "app_dir"):
            if getattr(self.sheet, name) == "":
                self._fault(name, text='""; name one, or leave the key out')

    def _problem(self) -> None:
        if self._faulty("problem"):
            return
        if self.sheet.problem is None and self.sheet.model is None:
            text = "is missing; name the factory, path/file.py:function or package.module:function, or a model"
            self._fault("problem", text=text)
            return
        key = "problem" if self.sheet.problem is not None else "model"
        try:
            recipe_of(self.sheet).check_names()
        except UsageError as error:
            self._fault(key, text=str(error).removeprefix("problem "))

    def _options(self) -> None:
        for key, value in self.sheet.options.items():
            if key == "checkpoint":
                self._fault("options", key, text="the checkpoint is no option; use the key checkpoint above")
            elif not key.isidentifier():
                self._fault("options", key, text="no parameter of a Python function can be called so")
            elif any(isinstance(leaf, date | time) for leaf in _leaves(value)):
                self._fault("options", key, text="dates cannot be handed on; put it in quotes")

    def _quantities(self) -> None:
        names = self.sheet.run.quantities
        for index, name in enumerate(names):
            place = ("run", "quantities", str(index))
            if name not in METRICS:
                self._fault(*place, text=f"no quantity {shown(name)}; {hint(name, METRICS)}")
            elif name in names[:index]:
                self._fault(*place, text=f"{shown(name)} is named twice; keep one")

    def _run(self) -> dict[str, Any]:
        """The settings of the run that are right; the others are faults at their keys."""
        given = {k: v for k, v in self.sheet.run.model_dump(exclude_unset=True).items() if k != "quantities"}
        for fault in Settings.faults(given):
            self._fault("run", fault.field, text=f"{shown(fault.given)}; {fault.text}")
            given.pop(fault.field, None)
        return given

    def _confidence(self) -> None:
        ours, runs = self.sheet.check.confidence, self.run.pop("confidence", None)
        wrong = () if ours is None else Settings.faults({"confidence": ours})
        for fault in wrong:
            self._fault("check", "confidence", text=f"{shown(ours)}; {fault.text}")
        if not wrong and None not in (ours, runs) and ours != runs:
            text = f"{shown(runs)} differs from check.confidence, {shown(ours)}; keep one"
            self._fault("run", "confidence", text=text)
        self.confidence: float = next(c for c in (ours, runs, DEFAULT.confidence) if c is not None)

    def _max_probes(self) -> int:
        probes = self.run.get("probes", PAIRED["probes"])
        most = self.sheet.check.max_probes
        if most is None:
            return int(max(MAX_PROBES, probes))
        if most < probes and not self._faulty("run", "probes"):
            self._fault("check", "max_probes", text=f"{most}; at least the {probes} of run.probes are needed")
        return most

    def budgets(self) -> list[Budget]:
        """The budgets in the order written; file and line are the caller's to fill in."""
        found: dict[tuple[str, Scope], Budget] = {}
        for key, table in self.sheet.check.budgets.items():
            path = ("check", "budgets", key)
            whole = not self._faulty(*path)
            try:
                metric, scope = parse_key(key, self.run.get("split", DEFAULT.split))
            except ValueError as error:
                self._fault(*path, text=str(error))
                metric, scope = "", Scope("")
            limits = self._limits(path, table, whole)
            if table.claim == "population" and metric and metric not in WITH_DATA_ERROR:
                text = f"{metric} has no error over data; allowed: {', '.join(WITH_DATA_ERROR)}"
                self._fault(*path, "claim", text=text)
            if table.abs_floor is not None and not 0 <= table.abs_floor < float("inf"):
                self._fault(*path, "abs_floor", text=f"{shown(table.abs_floor)}; it must be a number from 0 on")
            if metric and (metric, scope) in found:
                text = f"is the same as {shown(found[metric, scope].key)}: {metric} of {scope.label}; keep one"
                self._fault(*path, text=text)
            elif metric:
                found[metric, scope] = Budget(
                    key=key,
                    metric=metric,
                    scope=scope,
                    level=table.level,
                    limits=tuple(limits),
                    abs_floor=table.abs_floor,
                    claim=table.claim,
                )
        return list(found.values())

    def _limits(self, path: tuple[str, ...], table: BudgetTable, whole: bool) -> list[Limit]:
        limits: dict[str, Limit] = {}
        for kind in LIMITS:
            value = getattr(table, kind)
            if kind not in table.model_fields_set:
                continue
            if kind in ("min", "max") and isinstance(value, str) and PERCENT.fullmatch(value.strip()):
                text = f"{shown(value)}; it must be a number: a share is one of the baseline, max_increase"
                self._fault(*path, kind, text=text)
            else:
                try:
                    limits[kind] = parse_limit(kind, value)
                except (ValueError, OverflowError) as error:
                    text = (
                        str(error) if isinstance(error, ValueError) else "is too large; a finite number is needed"
                    )
                    self._fault(*path, kind, text=_reworded(text, kind))
        low, high = limits.get("min"), limits.get("max")
        if low and high and low.value > high.value:
            self._fault(*path, text=f"min {low.value:g} is above max {high.value:g}; no value would be allowed")
        if whole and not table.model_fields_set.intersection(LIMITS) and table.level != "off":
            self._fault(*path, text=f'has no limit; give one of {", ".join(LIMITS)}, or level = "off"')
        return list(limits.values())


def _reworded(text: str, kind: str) -> str:
    """The key is said already."""
    return text.removeprefix(f"{kind} = ").replace(": allowed", "; allowed")


def _leaves(value: Any) -> Iterator[Any]:
    below = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    if below is None:
        yield value
    else:
        for item in below:
            yield from _leaves(item)
