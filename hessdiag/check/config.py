"""The configuration of a check: ``[tool.hessdiag]`` of pyproject.toml, or the same keys in hessdiag.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hessdiag.check.budgets import Budget
from hessdiag.check.origin import PYPROJECT, PYPROJECT_TABLE, ConfigError, Origin, read_text, shown_file
from hessdiag.check.rules import Rules
from hessdiag.check.schema import Fault, faults_of_form, newer, recipe_of, shown
from hessdiag.check.toml_lines import line_of
from hessdiag.errors import UsageError
from hessdiag.schemes.recipe import Recipe

OWN = "hessdiag.toml"
__all__ = ["Config", "ConfigError", "OnUnsure", "find_config", "load_config"]

OnUnsure = Literal["escalate", "report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a check is to do, with every default filled in.

    Attributes:
        file: where it was read.
        recipe: of the problem; its paths hang at the file's folder. Modules are by default looked for where the
            problem is named: in the file's folder, or here.
        checkpoint: the weights to measure.
        run: fields of `Settings` except quantities and confidence.
        metrics: measured and recorded besides those with a budget.
        baseline: the file of recorded values, absolute.
        confidence: of every interval, for each limit by itself.
        on_unsure: "escalate" spends more probes where nobody can tell, "report" does not.
        max_probes: most probes; baselines are recorded with as many, so that every later probe has its pair.
        budgets: in the order written.
    """

    file: Path
    recipe: Recipe
    checkpoint: str | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    baseline: Path
    confidence: float
    on_unsure: OnUnsure
    max_probes: int
    budgets: tuple[Budget, ...] = ()


def find_config(start: Path | None = None) -> Path:
    """The configuration of a folder: its own, or that of the nearest above which has one, within the repository.

    Args:
        start: the folder to look in first; by default the current one.

    Returns:
        A hessdiag.toml, or a pyproject.toml that holds ``[tool.hessdiag]`` (or is no TOML but seems to).

    Raises:
        UsageError: there is none, or one folder has both.
    """
    folder = (start or Path()).resolve()
    for place in (folder, *folder.parents):
        own, shared = place / OWN, place / PYPROJECT
        line = _table_line(shared) if shared.is_file() else None
        if own.is_file() and line is not None:
            msg = (
                f"{shown_file(own)} and [tool.hessdiag] in {shown_file(shared)}:{line} configure both: "
                f"keep one; delete {OWN}, or that table"
            )
            raise UsageError(msg)
        if own.is_file() or line is not None:
            return own if own.is_file() else shared
        if (place / ".git").exists():
            break
    msg = (
        f"no {OWN}, and no [tool.hessdiag] in a {PYPROJECT}, in {folder} or above in its repository: "
        "write one with hessdiag init FACTORY -c CKPT"
    )
    raise UsageError(msg)


def _table_line(file: Path) -> int | None:
    """Where a pyproject.toml configures hessdiag; 1 if it means to, but is no TOML."""
    text = read_text(file)
    try:
        tool = tomllib.loads(text).get("tool")
    except (ValueError, RecursionError):
        return 1 if "tool.hessdiag" in text else None
    if not isinstance(tool, dict) or PYPROJECT_TABLE[1] not in tool:
        return None
    return line_of(text, PYPROJECT_TABLE) or 1


def load_config(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None, text: str | None = None
) -> Config:
    """Read a configuration, with every default filled in.

    Args:
        path: the file; by default what `find_config` finds.
        overrides: values from flags, by dotted key: "checkpoint", "run.samples", "check.confidence",
            "options" (a table, laid over the file's). None is a flag not given.
        text: what the file will hold, where there is none yet.

    Returns:
        The configuration. Paths of the file hang at its folder, those of flags at the current one.

    Raises:
        ConfigError: with every fault of the file and of the flags.
        UsageError: no configuration is found, or it cannot be read.
    """
    file = find_config() if path is None else path
    origin = Origin(file, overrides or {}, text)
    table = origin.merged()
    if (of_later := newer(table)) is not None:
        raise ConfigError(origin.said([of_later]))
    sheet, faults = faults_of_form(table)
    rules = Rules(sheet, faults)
    budgets = tuple(
        replace(budget, file=shown_file(file), line=origin.line(("check", "budgets", budget.key)))
        for budget in rules.budgets()
    )
    baseline = origin.anchored(("check", "baseline"), sheet.check.baseline).absolute()
    if baseline.is_dir():
        said = f"{shown(sheet.check.baseline)} is a folder; name a file in it, baseline.json"
        rules.faults.append(Fault(("check", "baseline"), said))
    app_dir = origin.anchored(("app_dir",) if sheet.app_dir else ("problem",), sheet.app_dir or ".")
    if sheet.app_dir and not app_dir.is_dir():
        said = f"{shown(sheet.app_dir)}: no such folder; give the one your modules lie in"
        rules.faults.append(Fault(("app_dir",), said))
    if rules.faults:
        raise ConfigError(origin.said(rules.faults))
    return Config(
        file=file,
        recipe=replace(
            recipe_of(sheet),
            factory=origin.factory(sheet.problem),
            root=str(file.resolve().parent),
            app_dir=str(app_dir),
        ),
        checkpoint=origin.checkpoint(sheet.checkpoint),
        run=rules.run,
        metrics=tuple(sheet.run.quantities),
        baseline=baseline,
        confidence=rules.confidence,
        on_unsure=sheet.check.on_unsure,
        max_probes=rules.max_probes,
        budgets=budgets,
    )
