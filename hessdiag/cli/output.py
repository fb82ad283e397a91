"""What every measuring verb shows and writes: the table, and the run folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli.spelling import flagged, flagged_page
from hessdiag.cli.stdout import message, result, results, silent
from hessdiag.folders import write_together
from hessdiag.shown import inert, visible

if TYPE_CHECKING:
    from hessdiag.results import Analysis

PLOTS = ("density", "cumulative", "convergence", "layers")
REPORT = "report.html"


def show(analyses: Mapping[str, Analysis]) -> None:
    """Print the table of one or several analyses on stdout."""
    from hessdiag.present import terminal_table

    draw(lambda width: terminal_table(analyses, width), width=120)


def draw(what: Callable[[int], Any], *, width: int) -> None:
    """Print something of rich on stdout, made for the terminal's width, or for ``width`` where it is none."""
    from rich.console import Console

    console = Console(file=results(), width=None if results().isatty() else width, highlight=False)
    with console.capture() as shown:  # rich itself would end the program when a reader has gone
        console.print(_Visible(what(console.width)))
    result(inert(shown.get()), nl=False)


class _Visible:
    """Something of rich whose texts, wherever they are from, move no cursor and change no colour."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.segment import Segment

        for text, style, control in console.render(self.inside, options):
            yield Segment(text if control else visible(flagged(text), lines=True), style, control)


def tell(line: str) -> None:
    """Print one line of a result on stdout."""
    result(inert(visible(flagged(line))))


def say(lines: Any, *, quiet: bool) -> None:
    """Print notes on stderr, one line each."""
    if not quiet:
        for line in lines:
            message(f"  {line}")


def sayer(*, quiet: bool) -> Callable[[str], None] | None:
    """What takes single lines for the reader; None where there is none, so that none is made for nobody."""
    return None if quiet else lambda line: say([line], quiet=False)


def write_run(analysis: Analysis, folder: Path, *, report: bool = False) -> None:
    """Write run.json, the tables and every plot there is data for; none of an earlier run stays beside them.

    Args:
        analysis: of the run.
        folder: where to.
        report: the page too.
    """
    if silent():  # another rank writes them
        return
    from hessdiag.present import svg
    from hessdiag.results.analysis import SAVED

    contents: dict[str, str] = analysis.files()
    for name in PLOTS:
        if _has(analysis, name):
            axes = getattr(analysis.plot, name)()
            contents[f"{name}.svg"] = svg(axes, title=f"{name}: {analysis.title}")
    if report:
        contents[REPORT] = page_of({analysis.title: analysis})
    write_together(folder, contents, (*SAVED, *(f"{name}.svg" for name in PLOTS), REPORT))


def page_of(analyses: Mapping[str, Analysis]) -> str:
    """The one-file report with the command that made it."""
    from hessdiag.present import page

    return flagged_page(page(analyses, command_line()))


def command_line() -> str:
    """The command that runs, as it was given."""
    return f"hessdiag {shlex.join(click.get_current_context().obj)}"


def _has(analysis: Analysis, plot: str) -> bool:
    if plot in ("density", "cumulative"):
        return analysis.spectrum is not None
    if plot == "convergence":
        return bool(analysis.convergence.steps)
    return bool(analysis.layers)
