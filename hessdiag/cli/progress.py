"""Progress of long work on stderr, one line: what is done now, how long it has taken, how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hessdiag.cli.stdout import message, silent
from hessdiag.formatting import clock, to_go
from hessdiag.shown import ending, plain

if TYPE_CHECKING:  # its room loads torch
    from hessdiag.analysis.measurement import Progress

EVERY = 30.0  # seconds between two lines where there is no terminal: a log shows that work goes on
OUTER = ("checkpoints",)
"""Stages within which others run; what they have left is what all has."""
MOST = 18  # characters of what is done now: the line shall fit a terminal of 80


def _nothing(stage: str, done: int, total: int) -> None:
    """Show nothing."""


@dataclass
class Stage:
    """Part of the work.

    Attributes:
        done: steps.
        total: of them.
        now: what the current step is; empty where it has no name.
        first: steps that were done when it was first heard of.
        begun: when that was, by `time.monotonic`.
        stepped: when the last step was done.
    """

    done: int
    total: int
    now: str
    first: int
    begun: float
    stepped: float


@dataclass
class Course:
    """What was reported, as a line."""

    begun: float = field(default_factory=lambda: time.monotonic())
    stages: dict[str, Stage] = field(default_factory=dict)

    def report(self, stage: str, done: int, total: int) -> None:
        """Take a report; ``"measures: trace"`` is the stage measures, in whose next step the trace is taken."""
        name, _, now = stage.partition(": ")
        moment, before = time.monotonic(), self.stages.get(name)
        others = {key: one for key, one in self.stages.items() if key != name}
        if before is None or done < before.done or total != before.total:  # it runs again
            before = Stage(done, total, now, done, moment, moment)
        stepped = before.stepped if done == before.done else moment
        if name in OUTER and done != before.done:  # what runs within one begins anew in the next
            others = {}
        # a new mapping: who draws the line runs in a thread of its own
        self.stages = {**others, name: Stage(done, total, now, before.first, before.begun, stepped)}

    def line(self) -> str:
        """``checkpoints 2/6 (seed2), measures 45/61 (trace): 12 s, about 40 s to go``."""
        stages, passed = self.stages, time.monotonic() - self.begun
        outer = [name for name in stages if name in OUTER]
        inner = [name for name in stages if name not in OUTER]
        shown = outer + inner[-1:]  # of those within, the one heard of last
        parts = [_part(name, stages[name]) for name in shown]
        return f"{', '.join(parts)}: {clock(passed)}{_left(stages[shown[0]])}" if parts else ""

    @property
    def share(self) -> float:
        """Done of all, as far as stages tell."""
        stages = self.stages
        outer = [one for name, one in stages.items() if name in OUTER] or list(stages.values())[-1:]
        return outer[0].done / outer[0].total if outer and outer[0].total else 0.0


def _part(name: str, stage: Stage) -> str:
    now = f" ({ending(plain(stage.now), MOST)})" if stage.now else ""
    return f"{name} {stage.done}/{stage.total}{now}" if stage.total > 1 else f"{name}{now}"


def _left(stage: Stage) -> str:
    return to_go(stage.stepped - stage.begun, stage.done - stage.first, stage.total - stage.first)


@contextmanager
def display(*, quiet: bool) -> Iterator[Progress]:
    """A function to report (stage, done, total) to; one line on a terminal, a line now and then elsewhere."""
    if quiet or silent():
        yield _nothing
    elif not sys.stderr.isatty():
        yield _beats()
    else:
        from rich.console import Console
        from rich.live import Live

        course = Course()
        with Live(
            get_renderable=lambda: _row(course), console=Console(stderr=True), transient=True, refresh_per_second=4
        ):
            yield course.report


def _row(course: Course) -> Any:
    """A short bar and the line."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_column(width=10)
    row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_row(ProgressBar(total=1.0, completed=course.share, width=10), Text(course.line()))
    return row if course.stages else Text("")


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
    beat, course = Beat(), Course()

    def report(stage: str, done: int, total: int) -> None:
        course.report(stage, done, total)
        if beat.due() is not None:
            message(f"  {course.line()}")

    return report
