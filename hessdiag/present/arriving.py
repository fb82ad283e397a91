"""Numbers as they arrive: a table for a terminal, a line for a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hessdiag.analysis.so_far import Row, SoFar
from hessdiag.formatting import clock, format_interval, format_number, format_percent, to_go
from hessdiag.shown import listed, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDE = 72  # columns that all four parts of a row take


def arriving(
    so_far: SoFar | None, seconds: float, *, width: int, title: str = "", hint: str = ""
) -> RenderableType:
    """A table of value, interval and what is still narrowed; below it what was spent, and a hint.

    Args:
        so_far: None before the first product.
        seconds: since measuring began.
        width: of the terminal; a narrow one has intervals only.
        title: above the table.
        hint: last line.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    wide = width >= WIDE
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=wide, header_style="dim")
    for name in ("quantity", "value", "interval", "still narrowed") if wide else ("quantity", "interval"):
        table.add_column(name, justify="right" if name == "value" else "left", no_wrap=True)
    for row in so_far.rows if so_far else ():
        value, interval = _texts(row)
        cells = (row.quantity, value, interval, _still(row)) if wide else (row.quantity, interval or value or "…")
        style = {"waiting": "dim", "narrowing": "", "known": "bold"}[row.state]
        table.add_row(*(Text(cell, style=style) for cell in cells))
    lines = [plain(title)] if title else []
    parts = [Text(line, style="bold", no_wrap=True, overflow="ellipsis") for line in lines]
    spent = Text(course(so_far, seconds), no_wrap=True, overflow="ellipsis")
    below = [Text(hint, style="dim", no_wrap=True, overflow="ellipsis")] if hint else []
    return Group(*parts, table, spent, *below)


def heartbeat(so_far: SoFar, seconds: float) -> str:
    """`course`, and after it ``; lambda_max 3.531 [3.531, 3.55], trace not yet``."""
    known = [" ".join((row.quantity, *filter(None, _texts(row)))) for row in so_far.rows if row.state != "waiting"]
    waiting = [row.quantity for row in so_far.rows if row.state == "waiting"]
    parts = known + ([f"{', '.join(waiting)} not yet"] if waiting else [])
    return f"{course(so_far, seconds)}; {', '.join(parts)}"


def course(so_far: SoFar | None, seconds: float) -> str:
    """``34 of about 78 products, 8 probes, 41 s, about 53 s to go; now trace``."""
    if so_far is None:
        return f"{clock(seconds)}; now the first product"
    known = all(row.state == "known" for row in so_far.rows)
    left = "" if known else to_go(seconds, so_far.products, so_far.foreseen)
    return f"{_spent(so_far)}, {clock(seconds)}{left}; now {_now(so_far)}"


def _now(so_far: SoFar) -> str:
    """What is being narrowed, or what the next row waits for."""
    narrowing = [row.quantity for row in so_far.rows if row.state == "narrowing"]
    if narrowing:
        return listed(narrowing, 2)
    return next((row.waits for row in so_far.rows if row.state == "waiting" and row.waits), "the last of it")


def _spent(so_far: SoFar) -> str:
    probes = f", {so_far.probes} probes" if so_far.probes else ""
    of = f" of about {so_far.foreseen}" if so_far.products < so_far.foreseen else ""
    return f"{so_far.products}{of} products{probes}"


def _texts(row: Row) -> tuple[str, str]:
    """Value and interval."""
    if row.quantity == "density" and row.reached is not None:
        return "", f"error {row.reached:.2g}"
    if row.value is None:
        return "", ""
    if row.lo is None or row.hi is None:
        return format_number(row.value), ""
    if row.quantity == "negative_mass":
        return format_percent(row.value, row.lo, row.hi)
    return format_number(row.value, row.lo, row.hi), format_interval(row.value, row.lo, row.hi)


def _still(row: Row) -> str:
    if row.state == "waiting":
        return f"waits for {row.waits}"
    if row.state == "known" or row.reached is None or row.asked is None:
        return "" if row.state == "known" else "…"
    return f"{row.reached:.2g}, asked {row.asked:.2g}"
