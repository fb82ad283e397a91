"""A measurement under the eyes of whoever started it: the numbers as they arrive, and Ctrl-C for those so far."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from hessdiag.cli import ranks
from hessdiag.cli.output import say
from hessdiag.cli.progress import Beat
from hessdiag.cli.stdout import message, silent
from hessdiag.present.arriving import heartbeat

if TYPE_CHECKING:
    from hessdiag.analysis import Measurement
    from hessdiag.analysis.so_far import SoFar
    from hessdiag.results import Analysis
    from hessdiag.spectral.warm import Warm

HINT = "Ctrl-C ends with these numbers"
ENDING = "ending with the numbers so far; again Ctrl-C ends at once"


class CtrlC:
    """Within it, the first Ctrl-C ends a measurement with what there is; the next one does what it did before.

    Nothing is changed where the program has no say over signals (a thread), or was told to ignore this one; nor
    where several ranks measure, which a launcher ends.

    Attributes:
        pressed: whether that happened.
    """

    def __init__(self, measurement: Measurement) -> None:
        self.measurement, self.pressed = measurement, False
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        """Take over the signal."""
        before = signal.getsignal(signal.SIGINT)
        if ranks.world() > 1:  # torchrun passes it on, as a second one
            return self
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._press)
        return self

    def _press(self, number: int, frame: FrameType | None) -> None:
        # prints nothing: the line that it interrupts may be in the middle of printing
        if self.pressed:
            self._give_back()(number, frame)
            return
        self.pressed = True
        self.measurement.interrupt()

    def _give_back(self) -> Any:
        before, self._before = self._before, None
        if before is not None:
            signal.signal(signal.SIGINT, before)
        return before or signal.default_int_handler

    def __exit__(self, *_: object) -> None:
        """Give the signal back."""
        self._give_back()


def measured(
    measurement: Measurement, *, quiet: bool, title: str = "", warm: Warm | None = None
) -> tuple[Analysis, bool]:
    """Run a measurement and show it.

    Args:
        measurement: checked and ready.
        quiet: show nothing.
        title: of what is measured, where it is one of several.
        warm: what an earlier run left.

    Returns:
        The numbers, and whether Ctrl-C ended it.
    """
    with CtrlC(measurement) as ctrl_c, _shown(ctrl_c, quiet=quiet, title=title) as look:
        found = measurement.run(warm=warm, look=look)
    if ctrl_c.pressed:
        text = f"interrupted: the numbers are those of {found.cost.products} products"
        going_on = measurement.kept is not None and measurement.kept.written
        say([text + "; the same command goes on from there" * going_on], quiet=quiet)
    return found, ctrl_c.pressed


def _shown(ctrl_c: CtrlC, *, quiet: bool, title: str) -> AbstractContextManager[Any]:
    from rich.console import Console

    if quiet or silent():
        return _nothing()
    console = Console(stderr=True)
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        from hessdiag.present.watching import on_terminal

        return on_terminal(console, title=title, hint=lambda: ENDING if ctrl_c.pressed else HINT)
    return _beats(ctrl_c, title)


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def _beats(ctrl_c: CtrlC, title: str) -> Iterator[Any]:
    beat, told = Beat(), False

    def look(so_far: SoFar) -> None:
        nonlocal told
        if ctrl_c.pressed and not told:
            told = True
            message(f"  {ENDING}")
        elif (seconds := beat.due()) is not None:
            message(f"  {title + ': ' if title else ''}{heartbeat(so_far, seconds)}")

    yield look
