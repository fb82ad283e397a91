"""Two checkpoints in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hessdiag.present.lines import fits
from hessdiag.shown import ending, visible

if TYPE_CHECKING:  # it measures, and a table must not wait for torch
    from hessdiag.check.comparison import Compared

STYLES = {"higher": "bold red", "lower": "bold green", "cannot tell apart": "dim"}


def comparison(rows: Sequence[Compared], first: str, second: str, width: int = 140) -> Table:
    """A line per metric: both intervals, their difference in pairs, and what it says.

    Where there is no room for all intervals, that of the difference is shown, and of the others what it leaves.
    """
    heads = ("metric", visible(first, 40), visible(second, 40), "difference", "the second is")
    told, gap = [_cells(row) for row in rows], 2
    if not fits(heads, told, width, named=max((len(row.metric) for row in rows), default=0)):
        heads = (
            "metric",
            ending(visible(first), 12),
            ending(visible(second), 12),
            "difference within",
            "second is",
        )
        told, gap = [_short(row) for row in rows], 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for title in heads:
        table.add_column(Text(title), overflow="fold")
    for row, cells in zip(rows, told, strict=True):
        table.add_row(*map(Text, cells[:-1]), Text(cells[-1], STYLES[row.words]))
    return table


def _cells(row: Compared) -> tuple[str, ...]:
    difference = row.difference.words(signed=True, percent=row.relative)
    return row.metric, row.first.words(), row.second.words(), difference, row.words


def _short(row: Compared) -> tuple[str, ...]:
    """Values alone, to the digits that their intervals are worth, and the interval of the difference."""
    metric, *values, difference, words = _cells(row)
    values = [one if one.startswith("[") else one.partition(" ")[0] for one in values]
    within = difference[difference.index("[") :] if "[" in difference else difference
    return metric, *values, within, words.removesuffix(" apart")
