"""``hessdiag analyze``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from hessdiag.cli.options import FACTORY, MEASUREMENT, OUTPUT, PROBLEM, SAMPLES, load, options, settings
from hessdiag.cli.output import say, show, write_page, write_run
from hessdiag.cli.progress import display


@click.command(epilog=FACTORY)
@options(PROBLEM, SAMPLES, MEASUREMENT)
@click.option(
    "-o", "folder", metavar="DIR", type=click.Path(path_type=Path), help="Write run.json, plots and report."
)
@click.option("--cross-check", type=click.Choice(["pyhessian"]), help="Measure again with another tool.")
@options(OUTPUT)
def analyze(
    *,
    factory: str,
    checkpoint: str | None,
    options: tuple[str, ...],
    trust_pickle: bool,
    app_dir: str | None,
    folder: Path | None,
    cross_check: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,  # noqa: ARG001  (read from the arguments, before anything can fail)
    **measurement: Any,
) -> None:
    """Measure how sharp a checkpoint is, every number with its interval."""
    asked = settings(**measurement)
    if folder is not None:
        from hessdiag.files import require_writable

        require_writable(folder)
    quiet = quiet or as_json
    with redirect_stdout(sys.stderr):  # what the user's code prints is no result
        built = load(factory, checkpoint, options, trust_pickle, app_dir)

        from hessdiag.analysis import Measurement

        say(built.notes, quiet=quiet)
        measurement_ = Measurement(built.problem, asked)
        say([measurement_.forecast()], quiet=quiet)
        with display(quiet=quiet) as report:
            result = measurement_.run(progress=report)
        result = result.about(checkpoint or factory, built.notes, built.weights.sha256 if built.weights else None)
        if cross_check is not None:
            from hessdiag.integrations.pyhessian import cross_check as check

            result = check(measurement_, result)
    if folder is not None:
        write_run(result, folder)
        page = write_page({result.title: result}, folder)
    if as_json:
        click.echo(result.to_json(), nl=False)
    else:
        show({result.title: result})
    say((f"note: {note}" for note in result.notes if note not in built.notes), quiet=quiet)
    if folder is not None:
        say([f"written: {folder}/run.json, plots, {page}"], quiet=quiet)
