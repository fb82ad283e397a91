"""Tables for a terminal with one line per row, however narrow it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hessdiag.formatting import UNRESOLVED
from hessdiag.shown import ending, listed

if TYPE_CHECKING:
    from rich.table import Table

LEAST = 8  # characters of a name that are always shown
NARROW = 100  # cells: on a terminal with fewer, columns stand closer

Cells = Sequence[str]


def needed(heads: Cells, rows: Sequence[Cells]) -> list[int]:
    """Cells that each column takes: those of its widest row, or of the longest word of its head."""
    from rich.cells import cell_len

    words = [max(map(cell_len, head.split() or [""])) for head in heads]
    return [max([word, *map(cell_len, column)]) for word, column in zip(words, _columns(heads, rows), strict=True)]


def fits(heads: Cells, rows: Sequence[Cells], width: int, named: int = LEAST) -> bool:
    """Whether every row has room on one line, if the names in the first column may be cut to ``named``."""
    first, *others = needed(heads, rows)
    return min(first, named) + sum(others) + _gap(width) * len(heads) <= width


def one_line_each(
    heads: Cells,
    rows: Sequence[Cells],
    width: int,
    *,
    reason: int | None = None,
    left: Cells = (),
    bold: Cells = (),
) -> tuple[Table, list[str]]:
    """A table with a line per row, and what has to be said below it.

    Names in the first column are cut to their ends where there is no room for them, and reasons, which may be
    sentences, go below the table.

    Args:
        heads: of the columns; they break at spaces.
        rows: a cell per column.
        width: of the terminal, in cells.
        reason: the column that holds an interval or, without brackets, the reason why there is none.
        left: heads of the columns, beside the first, that are justified to the left.
        bold: heads of the columns in bold.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    below: list[str] = []
    if reason is not None and not fits(heads, rows, width):
        rows, below = _without_reasons(rows, reason)
    widths = _widths(heads, rows, width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding(width))
    for number, (head, cells) in enumerate(zip(heads, widths, strict=True)):
        justify: Any = "left" if number == 0 or head in left else "right"
        table.add_column(Text(head.strip()), justify=justify, overflow="fold", width=cells)
    for name, *texts in rows:
        shown = [Text(cell, "bold" if head in bold else "") for head, cell in zip(heads[1:], texts, strict=True)]
        table.add_row(Text(ending(name, widths[0])), *shown)
    return table, below


def _widths(heads: Cells, rows: Sequence[Cells], width: int) -> list[int]:
    """Of the columns: what rows need, names what is left, and then heads what is left of that."""
    from rich.cells import cell_len

    first, *others = needed(heads, rows)
    gaps = _gap(width) * len(heads)
    room = width - sum(others) - gaps
    widths = [max(min(first, room), LEAST), *others]
    for number, head in enumerate(heads):
        spare = max(width - sum(widths) - gaps, 0)
        widths[number] += min(max(cell_len(head.strip()) - widths[number], 0), spare)
    return widths


def _without_reasons(rows: Sequence[Cells], column: int) -> tuple[list[list[str]], list[str]]:
    """Rows with a dash in place of a reason, and every reason once with the rows it is of."""
    of: dict[str, list[str]] = {}
    kept = []
    for row in rows:
        cell = row[column]
        if not cell.startswith("[") and len(cell) > len(UNRESOLVED):
            of.setdefault(cell, []).append(row[0])
            row = [*row[:column], UNRESOLVED, *row[column + 1 :]]
        kept.append(list(row))
    return kept, [f"{listed(names)}: {why}" for why, names in of.items()]


def padding(width: int) -> tuple[int, int, int, int]:
    """Around the cells of a table."""
    return (0, 1, 0, int(width >= NARROW))


def _gap(width: int) -> int:
    """Between two columns: the padding, and one for the line that a head has below it."""
    return 1 + sum(padding(width))


def _columns(heads: Cells, rows: Sequence[Cells]) -> list[list[str]]:
    return [[row[number] for row in rows] for number in range(len(heads))]
