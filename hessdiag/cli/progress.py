"""Progress of long work on stderr: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hessdiag.cli.stdout import message

if TYPE_CHECKING:  # its room loads torch
    from hessdiag.analysis.measurement import Progress

EVERY = 30.0  # seconds between two lines where there is no terminal: a log shows that work goes on


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def display(*, quiet: bool) -> Iterator[Progress]:
    """A function to report (stage, done, total) to; bars with remaining time on a terminal, lines elsewhere."""
    if quiet:
        yield silent
        return
    if not sys.stderr.isatty():
        yield _beats()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, int] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield report


class Beat:
    """Tells when the next line is due where there is no terminal."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()

    def due(self) -> float | None:
        """Seconds since the beginning, every `EVERY` seconds; None between."""
        now = time.monotonic()
        if now - self._last < EVERY:
            return None
        self._last = now
        return now - self._begun


def _beats() -> Progress:
    beat = Beat()

    def report(stage: str, done: int, total: int) -> None:
        if (seconds := beat.due()) is not None:
            message(f"  {stage}: {done} of {total}, {seconds:.0f} s")

    return report
