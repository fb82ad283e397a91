"""What every measuring verb shows and writes: the table, and the run folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.files import write_whole

if TYPE_CHECKING:
    from hessdiag.results import Analysis

PLOTS = ("density", "cumulative", "convergence", "layers")
OPTIONAL = ("spectrum.csv", "layers.csv", *(f"{name}.svg" for name in PLOTS))


def show(analyses: Mapping[str, Analysis]) -> None:
    """Print the table of one or several analyses on stdout."""
    from hessdiag.present import terminal_table

    draw(lambda _: terminal_table(analyses), width=120)


def draw(what: Callable[[int], Any], *, width: int) -> None:
    """Print something of rich on stdout, made for the terminal's width, or for ``width`` where it is none."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
    with console.capture() as shown:  # rich itself would end the program when a reader has gone
        console.print(what(console.width))
    click.echo(shown.get(), nl=False)


def say(lines: Any, *, quiet: bool) -> None:
    """Print notes on stderr, one line each."""
    if not quiet:
        for line in lines:
            click.echo(f"  {line}", err=True)


def write_run(analysis: Analysis, folder: Path) -> None:
    """Write run.json, the tables and every plot there is data for; none of an earlier run stays beside them."""
    from hessdiag.present import svg

    for name in OPTIONAL:
        (folder / name).unlink(missing_ok=True)
    analysis.save(folder)
    for name in PLOTS:
        if _has(analysis, name):
            axes = getattr(analysis.plot, name)()
            write_whole(folder / f"{name}.svg", svg(axes, title=f"{name}: {analysis.title}"))


def write_page(analyses: Mapping[str, Analysis], folder: Path) -> Path:
    """Write the one-file report with the command that made it, and say where it lies."""
    from hessdiag.present import page

    command = f"hessdiag {shlex.join(click.get_current_context().obj)}"
    return write_whole(folder / "report.html", page(analyses, command))


def _has(analysis: Analysis, plot: str) -> bool:
    if plot in ("density", "cumulative"):
        return analysis.spectrum is not None
    if plot == "convergence":
        return bool(analysis.convergence.steps)
    return bool(analysis.layers)
