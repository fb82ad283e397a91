"""Two checkpoints in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hessdiag.shown import visible

if TYPE_CHECKING:  # it measures, and a table must not wait for torch
    from hessdiag.check.comparison import Compared

STYLES = {"higher": "bold red", "lower": "bold green", "cannot tell apart": "dim"}


def comparison(rows: Sequence[Compared], first: str, second: str) -> Table:
    """A line per metric: both intervals, their difference in pairs, and what it says."""
    table = Table(box=None, pad_edge=False)
    for title in ("metric", visible(first, 40), visible(second, 40), "difference", "the second is"):
        table.add_column(Text(title), overflow="fold")
    for row in rows:
        difference = row.difference.words(signed=True, percent=row.relative)
        table.add_row(
            Text(row.metric),
            Text(row.first.words()),
            Text(row.second.words()),
            Text(difference),
            Text(row.words, STYLES[row.words]),
        )
    return table
