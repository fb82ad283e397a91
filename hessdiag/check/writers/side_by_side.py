"""Two checkpoints in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hessdiag.check.numbers import interval_words
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
        difference = interval_words(row.difference, signed=True, percent=row.relative)
        table.add_row(
            Text(row.metric),
            Text(interval_words(row.first)),
            Text(interval_words(row.second)),
            Text(difference),
            Text(row.words, STYLES[row.words]),
        )
    return table
