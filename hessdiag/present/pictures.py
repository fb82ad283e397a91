"""Figures on a page: the drawing, its caption, and the table under it."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hessdiag.formatting import with_minus
from hessdiag.present.vector import svg
from hessdiag.shown import plain

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment
    from matplotlib.axes import Axes

MOST_ROWS = 25  # of a table under a figure; the rest is in the CSV files


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with its accessible table."""

    svg: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    rows_note: str


def picture(ax: Axes, text: str, frame: pd.DataFrame, key: str, file: str, title: str | None = None) -> Picture:
    """A figure as the templates want it.

    Args:
        ax: what was drawn.
        text: its caption.
        frame: what it shows; evenly taken rows go under the figure.
        key: before every id in the drawing, unique on the page.
        file: where all rows are.
        title: its accessible name; the axes' title by default.
    """
    shows = f"{ax.get_ylabel() or 'parameter tensors'} against {ax.get_xlabel()}"
    name = f"{title or ax.get_title(loc='left') or 'Figure'}: {shows}"
    ax.set_title("", loc="left")  # the page has headings
    rows, rows_note = _rows(frame, file)
    return Picture(
        svg=svg(ax, title=name, description=text, prefix=key + "-"),
        caption=plain(text),
        columns=[plain(str(column)) for column in frame.columns],
        rows=rows,
        rows_note=rows_note,
    )


def data_address(csv: str) -> str:
    """A link that holds the table itself: a page is one file."""
    return f"data:text/csv;base64,{base64.b64encode(csv.encode()).decode()}"


def rendered(room: str, template: str, **values: Any) -> str:
    """A template of a room, filled."""
    text: str = environment(room).get_template(template).render(**values)
    return text


def environment(room: str) -> Environment:
    """The templates of a room, on top of those that all pages share; every value escaped and none missing."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader(name, "templates") for name in (room, "hessdiag.present")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _rows(frame: pd.DataFrame, file: str) -> tuple[list[list[str]], str]:
    stride = -(-len(frame) // MOST_ROWS)
    rows = [[_cell(value) for value in row] for row in frame.iloc[::stride].itertuples(index=False)]
    if stride <= 1:
        return rows, f"All {len(frame)} rows; raw values are in {file}."
    return rows, f"{len(rows)} of {len(frame)} rows, evenly taken; raw values are in {file}."


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "—" if value != value else with_minus(f"{value:.5g}")
    return plain(str(value))
