"""The table on the terminal: every number with its interval and how it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

from hessdiag.formatting import UNRESOLVED, format_metric
from hessdiag.present.lines import NARROW as WIDE
from hessdiag.present.lines import fits, padding
from hessdiag.present.words import CAVEAT, data_in_words, kind_in_words, label, reading
from hessdiag.results import Analysis, Metric
from hessdiag.shown import cut, ending, plain, single_spaced

if TYPE_CHECKING:
    from rich.table import Table

MOST_NAME = 26  # characters of a name that a column shows
COLUMNS = ("quantity", "value", "interval", "how it is known", "over data")


Row = tuple[str, str, str, str, str]


def metric_rows(analysis: Analysis) -> list[Row]:
    """One row per metric, under `COLUMNS`."""
    return [_row(name, metric) for name, metric in analysis.metrics.items()]


def companion_rows(analysis: Analysis) -> list[Row]:
    """One row per bound that came without being asked for, under `COLUMNS`."""
    return [_row(bound.quantity, bound) for bound in analysis.other_bounds]


def _row(name: str, metric: Metric) -> Row:
    return (plain(name), *format_metric(metric), kind_in_words(metric), data_in_words(metric))


def line(metric: Metric) -> str:
    """A metric for a prompt, on one line."""
    value, interval = format_metric(metric)
    return f"<{type(metric).__name__} {plain(metric.quantity)} = {value} {interval}, {kind_of(metric)}>"


def brief(analysis: Analysis) -> str:
    """A line per quantity, for a prompt."""
    rows = [
        (*row[:3], kind_of(metric))
        for row, metric in zip(metric_rows(analysis), analysis.metrics.values(), strict=True)
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [
        f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {interval:<{widths[2]}}  {kind}"
        for name, value, interval, kind in rows
    ]
    more = [what for what in ("spectrum", "layers") if getattr(analysis, what)]
    lines += [f"  {len(analysis.warnings)} warnings"] if analysis.warnings else []
    lines += [f"  with .{' and .'.join(more)}"] if more else []
    return "\n".join([f"Analysis of {_subject(analysis)}", *lines])


def kind_of(metric: Metric) -> str:
    """How a metric is known, in a word."""
    return f"{metric.kind}, {100 * metric.confidence:.6g}%" if metric.confidence < 1 else metric.kind


def _subject(analysis: Analysis) -> str:
    """The title, or what the fingerprint says, in 60 characters."""
    said = analysis.fingerprint
    if analysis.title or "n_params" not in said:
        return shorten(label("", analysis), 60, placeholder="…")
    where = f"{said['n_params']:,} parameters, {said['samples']:,} examples of {said['split']}"
    return f"{cut(plain(str(said['loss'])), 40)}, {plain(where)}"


def terminal_table(analyses: Mapping[str, Analysis], width: int = WIDE) -> Table:
    """A rich table: how each number is known for one analysis, side by side for several; the reading below.

    Args:
        analyses: names to analyses.
        width: characters of a line; on fewer than `WIDE`, how each number is known is said below the table.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, caption_justify="left", caption_style="", pad_edge=False, padding=padding(width)
    )
    if len(analyses) == 1:
        lines = _single(table, *next(iter(analyses.items())), width)
    else:
        lines = _several(table, analyses, width)
    table.caption = Text("\n".join(lines))
    return table


def _single(table: Table, name: str, analysis: Analysis, width: int) -> list[str]:
    from rich.text import Text

    rows = metric_rows(analysis)
    known = COLUMNS.index("how it is known")
    shown = [index for index in range(len(COLUMNS)) if width >= WIDE or index != known]
    told = [] if width >= WIDE else [*(f"{row[0]}: {row[known]}" for row in rows), ""]
    if width < WIDE and not _room(rows, shown, width):
        shown, told = shown[:-1], _with_data(rows, told)
    if width < WIDE and not _room(rows, shown, width):  # an interval that is cut or broken is misread
        shown, told = [0], []
        cells = [
            (" · ".join(row[:2]), row[2], row[known], f"over data {row[-1]}" * (row[-1] != UNRESOLVED))
            for row in rows
        ]
        rows = [("\n  ".join(filter(None, cell)), *row[1:]) for cell, row in zip(cells, rows, strict=True)]
    for index in shown:
        right = COLUMNS[index] in ("value", "over data")
        table.add_column(
            COLUMNS[index], justify="right" if right else "left", overflow="fold", no_wrap=0 < index != known
        )
    for row in rows:
        table.add_row(*(Text(row[index], style="bold" * (index == 1)) for index in shown))
    table.title = Text(label(name, analysis), style="bold")
    table.title_justify = "left"
    return [*told, *("• " + sentence for sentence in reading(analysis)), *_warned(analysis)]


def _room(rows: Sequence[Row], shown: Sequence[int], width: int) -> bool:
    widest = [max([len(COLUMNS[index]), *(len(row[index]) for row in rows)]) for index in shown]
    return sum(widest) + 2 * len(widest) <= width


def _with_data(rows: Sequence[Row], told: Sequence[str]) -> list[str]:
    """What is said below, with what other samples would change."""
    said = [
        f"{text}; {row[-1]} over data" * (row[-1] != UNRESOLVED) or text
        for row, text in zip(rows, told, strict=False)
    ]
    return [*said, ""]


def _several(table: Table, analyses: Mapping[str, Analysis], width: int) -> list[str]:
    """Values with intervals, a column per analysis where there is room, and what is worth a warning in each."""
    from rich.text import Text

    quantities = list(dict.fromkeys(q for analysis in analyses.values() for q in analysis.metrics))
    columns = [
        [_cell(analysis.metrics.get(quantity)) for quantity in quantities] for analysis in analyses.values()
    ]
    beside = [(plain(quantity), *map(" ".join, row)) for quantity, *row in zip(quantities, *columns, strict=True)]
    if fits(["quantity", *[""] * len(columns)], beside, width, named=MOST_NAME):
        heads = ["quantity", *(label(name, analysis) for name, analysis in analyses.items())]
        for head in heads:
            table.add_column(head, overflow="fold")
        for quantity, *row in zip(quantities, *columns, strict=True):
            table.add_row(
                plain(quantity), *(Text.assemble((value, "bold"), " ", interval) for value, interval in row)
            )
    else:  # one below the other: an interval that is broken is misread
        for head in COLUMNS[:3]:
            table.add_column(head, justify="right" if head == "value" else "left", no_wrap=True, overflow="fold")
        for (name, analysis), column in zip(analyses.items(), columns, strict=True):
            table.add_row(Text(ending(label(name, analysis), MOST_NAME), "bold"))
            for quantity, (value, interval) in zip(quantities, column, strict=True):
                table.add_row("  " + plain(quantity), Text(value, "bold"), interval)
    lines = []
    for name, analysis in analyses.items():
        lines += [f"{label(name, analysis)}: {warning}" for warning in _warned(analysis)]
    return [*lines, CAVEAT]


def _cell(metric: Metric | None) -> tuple[str, str]:
    return (UNRESOLVED, "") if metric is None else format_metric(metric)


def _warned(analysis: Analysis) -> list[str]:
    return ["! " + plain(single_spaced(warning)) for warning in analysis.warnings]
