"""A measurement watched while it runs, from Python: in a notebook, on a terminal, or in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from hessdiag.present.arriving import arriving, course, heartbeat

if TYPE_CHECKING:
    from hessdiag.analysis.so_far import Look, SoFar

OFTEN, SELDOM = 0.5, 30.0  # seconds between two states of a notebook's bar, between two lines of a log


def watched() -> AbstractContextManager[Look]:
    """What to give a measurement to look at: it shows one line that says what is measured now.

    A notebook shows a bar and the line, in place. A terminal shows the table of `arriving` on stderr while it
    lasts; where stderr is none, a line comes every half minute.
    """
    if in_notebook():
        return _in_notebook()
    if sys.stderr.isatty():
        from rich.console import Console

        return on_terminal(Console(stderr=True))
    return _in_log()


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this: it can show what changes in place."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and getattr(shell, "kernel", None) is not None


@contextmanager
def on_terminal(console: Any, *, title: str = "", hint: Callable[[], str] = lambda: "") -> Iterator[Look]:
    """The table of what is known, in place, gone at the end.

    Args:
        console: of rich.
        title: above the table.
        hint: gives the line below it.
    """
    from rich.live import Live

    begun, seen = time.monotonic(), list["SoFar"]()

    def now() -> Any:
        so_far, seconds = seen[-1] if seen else None, time.monotonic() - begun
        return arriving(so_far, seconds, width=console.width, title=title, hint=hint())

    def look(so_far: SoFar) -> None:
        seen[:] = [so_far]

    with Live(get_renderable=now, console=console, transient=True, refresh_per_second=4):
        yield look


@contextmanager
def _in_notebook() -> Iterator[Look]:
    from IPython.display import display

    begun = shown = time.monotonic()
    last: list[SoFar] = []
    handle = display(_bundle(None, 0.0), raw=True, display_id=True)

    def look(so_far: SoFar) -> None:
        nonlocal shown
        last[:] = [so_far]
        moment = time.monotonic()
        if moment - shown >= OFTEN:
            shown = moment
            handle.update(_bundle(so_far, moment - begun), raw=True)

    try:
        yield look
    finally:
        handle.update(_bundle(last[-1] if last else None, time.monotonic() - begun, ended=True), raw=True)


def _bundle(so_far: SoFar | None, seconds: float, *, ended: bool = False) -> dict[str, str]:
    """A state as the notebook takes it: HTML, and text for who shows none."""
    if ended:
        text = f"{so_far.products if so_far else 0} products, {seconds:.1f} s"
        return {"text/plain": text, "text/html": f"<small>{text}</small>"}
    text = course(so_far, seconds)
    done, total = (so_far.products, so_far.foreseen) if so_far else (0, 1)
    bar = f'<progress value="{done}" max="{max(total, 1)}" aria-label="products"></progress>'
    return {"text/plain": text, "text/html": f"{bar} {escape(text)}"}


@contextmanager
def _in_log() -> Iterator[Look]:
    begun = told = time.monotonic()

    def look(so_far: SoFar) -> None:
        nonlocal told
        moment = time.monotonic()
        if moment - told >= SELDOM:
            told = moment
            sys.stderr.write(f"{heartbeat(so_far, moment - begun)}\n")

    yield look
