"""``hessdiag baseline update`` and ``hessdiag baseline diff``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli.gating import CONFIG, read_config, subject_of
from hessdiag.cli.options import options
from hessdiag.cli.output import say, tell
from hessdiag.cli.progress import display
from hessdiag.errors import NoVerdictError, UsageError

if TYPE_CHECKING:
    from hessdiag.check.budgets import Scope
    from hessdiag.check.config import Config
    from hessdiag.check.recorded import Entry


@click.group()
def baseline() -> None:
    """Record what a check compares with, or look at what would change."""


@baseline.command()
@options(CONFIG)
@click.option("--reason", required=True, metavar="TEXT", help="Why the recorded values change; kept with them.")
@click.option("--ci", is_flag=True, help="Allow it under CI=true, where nobody looks at what is recorded.")
def update(
    *,
    config_file: Path | None,
    reason: str,
    ci: bool,
    fresh: bool,
    quiet: bool,
    debug: bool,  # noqa: ARG001
    **flags: Any,
) -> None:
    """Measure the configured checkpoint and record it as the baseline."""
    if not reason.strip():
        msg = '--reason "": say in a few words why the recorded values change'
        raise UsageError(msg)
    if os.environ.get("CI", "").lower() in ("true", "1") and not ci:
        msg = "CI=true: a baseline recorded in CI hides what it should show; record it at a desk, or give --ci"
        raise UsageError(msg)
    config = read_config(config_file, flags)
    from hessdiag.check.baseline import before, diff, updated
    from hessdiag.check.gate import refuse_worse

    before(config.baseline)  # a damaged one is refused before anything is measured
    entries = record(config, reason.strip(), fresh=fresh, quiet=quiet)
    refuse_worse(config.budgets, entries)
    old, new = updated(config.baseline, {scope.label: entry for scope, entry in entries.items()})
    for line in diff(old, new):
        tell(str(line))
    tell(f"written: {config.baseline}")


@baseline.command()
@options(CONFIG)
@click.argument("files", nargs=-1, metavar="[OLD NEW]", type=click.Path(path_type=Path))
def diff(
    *,
    config_file: Path | None,
    files: tuple[Path, ...],
    fresh: bool,
    quiet: bool,
    debug: bool,  # noqa: ARG001
    **flags: Any,
) -> None:
    """Show what an update would change; or how two baseline files OLD and NEW differ."""
    from hessdiag.check.baseline import Baseline, read
    from hessdiag.check.baseline import diff as lines

    if len(files) not in (0, 2):
        msg = f"baseline diff takes no file, or two: OLD NEW; {len(files)} given"
        raise UsageError(msg)
    if files:
        old, new = (read(file) for file in files)
    else:
        config = read_config(config_file, flags)
        old = read(config.baseline)
        entries = record(config, "", fresh=fresh, quiet=quiet)
        new = Baseline(entries={**old.entries, **{s.label: e for s, e in entries.items()}}, tool=old.tool)
    found = lines(old, new)
    for line in found:
        tell(str(line))
    if not found:
        tell("no difference")


def record(config: Config, reason: str, *, fresh: bool, quiet: bool) -> dict[Scope, Entry]:
    """Measure every scope that has a budget, with as many probes as a check may ever pair them with.

    Raises:
        NoVerdictError: no budget is on, or a scope has no parameters.
    """
    from hessdiag.check.gate import Plan
    from hessdiag.check.subject import entry_of
    from hessdiag.sources.git import commit

    plan = Plan.of(config)
    if not plan.budgets:
        msg = f"{config.file.name} has no budget that is not off: nothing to record"
        raise NoVerdictError(msg)
    at = commit(config.file.resolve().parent)
    asked: dict[str, Any] = {
        "probes": plan.max_probes if plan.escalate else plan.probes,
        "rtol": plan.rtol,
        "confidence": plan.look_confidence,
    }
    entries = {}
    with display(quiet=quiet) as report:
        subject = subject_of(config, report, fresh=fresh, quiet=quiet)
        for scope, metrics in plan.scopes().items():
            subject.entry(scope, metrics, **asked)
            entries[scope] = entry_of(subject.analyses[scope.label], reason, at)
    say([f"{subject.products} products"], quiet=quiet)
    return entries
