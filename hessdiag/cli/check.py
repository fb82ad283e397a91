"""``hessdiag check``."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli.gating import CONFIG, REFERENCE, read_config, subject_of
from hessdiag.cli.options import options
from hessdiag.cli.output import draw, say
from hessdiag.cli.progress import display
from hessdiag.cli.stdout import message, reserve, result, silent
from hessdiag.errors import HessdiagError, NoVerdictError, OutputError, UsageError, one_line

if TYPE_CHECKING:
    from hessdiag.check.config import Config
    from hessdiag.check.gate import Plan
    from hessdiag.check.subject import Source
    from hessdiag.check.verdict import Report


@click.command(epilog=REFERENCE)
@options(CONFIG)
@click.option("--only", metavar="BUDGET", multiple=True, help="Check these budgets or metrics only.")
@click.option(
    "--result",
    "results",
    metavar="RUN",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Use the run.json of an analyze -o, instead of measuring.",
)
@click.option("--against-git", metavar="REF", help="Measure the checkpoint as it is at REF too, as the baseline.")
@click.option("--strict", is_flag=True, help="Warnings fail; cannot tell is no verdict.")
@click.option("--exit-zero", is_flag=True, help="End with 0 where a limit is exceeded, and say so.")
@click.option(
    "-o",
    "outputs",
    metavar="FORMAT=FILE",
    multiple=True,
    help="text, json, junit, md, github, openmetrics.  [text, and github in GitHub Actions]",
)
def check(
    *,
    config_file: Path | None,
    only: tuple[str, ...],
    results: tuple[Path, ...],
    against_git: str | None,
    strict: bool,
    exit_zero: bool,
    outputs: tuple[str, ...],
    fresh: bool,
    quiet: bool,
    debug: bool,  # noqa: ARG001
    **flags: Any,
) -> int:
    """Hold a checkpoint's sharpness against budgets and a baseline: the verb for CI.

    Exit codes: 0 passed, 1 a limit is exceeded, 2 usage or configuration, 3 no verdict, 4 measurement failed.
    """
    from hessdiag.check.writers import parse_output
    from hessdiag.files import require_place

    targets = [parse_output(given) for given in outputs]
    if results and (against_git or flags["checkpoint"]):
        other = "--against-git" if against_git else "--checkpoint"
        msg = f"--result with {other}: a result was measured already; give one of them"
        raise UsageError(msg)
    if against_git and flags["baseline"]:
        msg = "--against-git with --baseline: both name what to compare with; give one of them"
        raise UsageError(msg)
    config = read_config(config_file, flags)
    for _, path in targets:
        if path is not None:
            require_place(path)
    facts = {
        "checkpoint": ", ".join(map(str, results)) or config.checkpoint or config.recipe.name,
        "baseline": f"git {against_git}" if against_git else str(_near(config.baseline)),
        "strict": strict,
    }
    try:
        report = _checked(config, only, results, against_git, fresh, quiet, facts)
    except HessdiagError as error:
        if error.exit_code > 2:
            unwritten = _write(_failed(error, facts), targets, config, shown=False)
            say([str(unwritten)] if unwritten else [], quiet=False)
        raise
    unwritten = _write(report, targets, config)
    if unwritten is not None:
        raise unwritten
    code = report.exit_code
    if code == 1 and exit_zero:
        message("--exit-zero: a limit is exceeded, and the exit code is 0 all the same")
        return 0
    return code


def _checked(
    config: Config,
    only: tuple[str, ...],
    results: tuple[Path, ...],
    against_git: str | None,
    fresh: bool,
    quiet: bool,
    facts: dict[str, Any],
) -> Report:
    reserve()
    from hessdiag.check.gate import Gate, Plan

    plan = Plan.of(config, only)
    if not plan.budgets:
        return Gate(plan, _none(), _none()).run(**facts)
    with tempfile.TemporaryDirectory() as scratch, display(quiet=quiet) as report:
        base = _base(config, plan, against_git, Path(scratch), report, fresh, quiet)
        if results:
            new: Source = _from_runs(results)
        else:
            new = subject_of(config, report, fresh=fresh, quiet=quiet)
        gate = Gate(plan, base, new)
        found = gate.run(**facts)
    measured = next(iter(gate.measured.values()), None)
    return replace(
        found, environment=dict(measured.env) if measured else {}, cost=int(getattr(new, "products", 0))
    )


def _base(
    config: Config, plan: Plan, against_git: str | None, scratch: Path, report: Any, fresh: bool, quiet: bool
) -> Source:
    from hessdiag.check.subject import Recordings

    if against_git is not None:
        from hessdiag.sources.git import file_at
        from hessdiag.sources.spec import split_key

        if config.checkpoint is None:
            msg = f"--against-git {against_git}: no checkpoint is configured; set checkpoint, or give -c FILE"
            raise UsageError(msg)
        path, key = split_key(config.checkpoint)
        copy = f"{file_at(against_git, path, scratch)}{f'::{key}' if key else ''}"
        title = f"{config.checkpoint} at {against_git}"
        return subject_of(config, report, fresh=fresh, quiet=quiet, checkpoint=copy, title=title)
    if not any(limit.needs_baseline for budget in plan.budgets for limit in budget.limits):
        return _none()
    from hessdiag.check.baseline import read

    try:
        entries = read(config.baseline).entries
    except NoVerdictError as error:
        return Recordings({}, str(error))
    lacking = f'{_near(config.baseline)} has no entry for it: hessdiag baseline update --reason "..." records one'
    return Recordings(entries, lacking)


def _from_runs(results: tuple[Path, ...]) -> Source:
    from hessdiag.check.subject import Recordings
    from hessdiag.results import load_run

    lacking = "no --result was measured on it; analyze with --split, or leave --result away to measure"
    return Recordings.of_runs([load_run(path) for path in results], lacking)


def _none() -> Source:
    from hessdiag.check.subject import Recordings

    return Recordings({}, "there is no baseline")


def _write(
    report: Report, targets: list[tuple[str, Path | None]], config: Config, *, shown: bool = True
) -> OutputError | None:
    """Print and write the report in every format asked for, and what the surroundings expect; why that failed."""
    if silent():  # another rank does
        return None
    from hessdiag.check.writers import FORMATS, json_text, markdown, metrics, terminal, workflow_commands
    from hessdiag.files import write_whole
    from hessdiag.folders import write_files, write_together

    unwritten = write_files({path: FORMATS[name](report) for name, path in targets if path is not None})
    on_stdout = [name for name, path in targets if path is None]
    if shown and (not on_stdout or "text" in on_stdout):
        draw(lambda width: terminal(report, width), width=110)
    for name in on_stdout:
        if name != "text":
            result(FORMATS[name](report), nl=False)
    if os.environ.get("GITHUB_ACTIONS") == "true" and "github" not in on_stdout and "json" not in on_stdout:
        result(workflow_commands(report), nl=False)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    folder = config.file.resolve().parent / ".hessdiag"
    try:
        if summary:
            with Path(summary).open("a", encoding="utf-8") as stream:
                stream.write(markdown(report))
        write_whole(folder / ".gitignore", "*\n")
        numbers = json.dumps(metrics(report), indent=1, sort_keys=True) + "\n"
        write_together(folder, {"metrics.json": numbers, "check.json": json_text(report)})
    except (OSError, OutputError) as error:  # the verdict stands without them
        say([f"not written: {one_line(error)}"], quiet=False)
    return unwritten


def _failed(error: HessdiagError, facts: dict[str, Any]) -> Report:
    from hessdiag.check.verdict import Report

    return Report(problems=(str(error),), **facts)


def _near(path: Path) -> Path:
    """A path as seen from here, where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
