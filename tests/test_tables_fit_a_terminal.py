"""Promise: on a terminal of 80 columns every row of a table is one line, and no number is broken or cut. (10 s)

Oracle: the printed characters. Every table is printed from results made up with long names.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable

import pytest
from rich.console import Console

from hessdiag.check.comparison import Compared
from hessdiag.check.verdict import Interval
from hessdiag.check.writers import comparison
from hessdiag.gap.plots import SHOWN
from hessdiag.gap.report import GapReport
from hessdiag.gap.rows import rank_rows
from hessdiag.gap.text import MOST, gap_tables
from hessdiag.present import lines, terminal_table
from hessdiag.shift.page import shift_tables
from hessdiag.track.page import terminal_trajectory
from tests import example_analysis, example_gap
from tests import test_pages_in_a_browser as made

WIDTH = 80


def printed(make: Callable[[int], object], width: int = WIDTH) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(make(width))
    return out.getvalue().splitlines()


def records(n: int):
    found = example_gap.records(n, measures=61)
    found[2] = dataclasses.replace(found[2], name=made.LONG)
    return GapReport(tuple(found), failures={})


def caught(monkeypatch: pytest.MonkeyPatch, page: str, make: Callable[[], object]) -> list[object]:
    """What the page is made of."""
    kept: list[object] = []
    monkeypatch.setattr(made, page, lambda report, *_: kept.append(report))
    make()
    return kept


def analyze(_):
    own = example_analysis.build_own(made.LONG)
    names = [*own.metrics, "preconditioned_lambda_max"]
    more = {**own.metrics, names[-1]: dataclasses.replace(own.metrics["lambda_max"], quantity=names[-1])}
    return (lambda width: terminal_table({made.LONG: dataclasses.replace(own, metrics=more)}, width)), names


def demo(_):
    both = {"plain: SGD": example_analysis.build_own(), made.LONG: example_analysis.build_own(sign=-1.0)}
    names = list(next(iter(both.values())).metrics)
    return (lambda width: terminal_table(both, width)), ["plain: SGD", *names, "last.safetensors", *names]


def track(patch):
    (report,) = caught(patch, "trajectory_page", made.track)
    return (lambda width: terminal_trajectory(report, width)), [
        "epoch01",
        "last.safetensors",
        "epoch09",
        "epoch10",
    ]


def shift(patch):
    (report,) = caught(patch, "shift_page", made.shift)
    return (lambda width: shift_tables(report, width)), ["one", *["last.safetensors"] * 2] * 3


def gap(_):
    report = records(9)
    runs = ["run0/last", "é/last", "last.safetensors", *(f"run{i}/last" for i in range(3, 9))]
    return (lambda width: gap_tables(report, width)), [*runs, *(one.measure for one in rank_rows(report)[:MOST])]


def gap_of_few(_):
    report = records(3)
    names = [name for name in SHOWN if name in report.measures]
    return (lambda width: gap_tables(report, width)), ["run0/last", "é/last", "last.safetensors", *names]


def compare(_):
    one, other = Interval(3.5312, 3.53118, 3.53131, "x"), Interval(0.554483, 0.554474, 0.554536, "x")
    change = Interval(-0.842976, -0.842984, -0.84296, "x")
    names = ["lambda_max", "frobenius_squared", "negative_mass"]
    rows = [Compared(metric=name, first=one, second=other, difference=change, relative=True) for name in names]
    return (lambda width: comparison(rows, made.LONG, "demo/flat", width)), names


TABLES = {make.__name__: make for make in (analyze, demo, track, shift, gap, gap_of_few, compare)}


def body(text: list[str]) -> list[str]:
    """Lines of all tables below their heads."""
    kept, inside = [], False
    for number, line in enumerate(text):
        rule = line.startswith((" ─", "metric"))
        inside = rule or (inside and bool(line.strip()) and number > 0)
        kept += [line] if inside and not rule else []
    return kept


def faults(text: list[str], names: list[str], width: int = WIDTH) -> list[str]:
    """Rows that do not stand on a line of their own, and lines that are too long."""
    found = [f"{len(line)} wide: {line}" for line in text if len(line) > width]
    rows = body(text)
    if len(rows) != len(names):
        found.append(f"{len(rows)} lines for {len(names)} rows")
    for row, name in zip(rows, names, strict=False):
        if name not in row[: row.find("  ", 3)]:
            found.append(f"not the row of {name}: {row}")
        if row.count("[") != row.count("]"):
            found.append(f"an interval is broken: {row}")
    return found


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_one_line_at_80_columns(name, monkeypatch):
    make, names = TABLES[name](monkeypatch)
    assert faults(printed(make), names) == []


@pytest.mark.parametrize("name", TABLES)
def test_wide_terminals_show_every_interval(name, monkeypatch):
    make, names = TABLES[name](monkeypatch)
    text = printed(make, 160)
    beside = names[1 : len(names) // 2] if name == "demo" else names  # in columns, as there is room
    assert faults(text, beside, 160) == []
    assert sum(line.count("[") for line in text) >= sum(line.count("[") for line in printed(make))


def whole_names(patch):
    patch.setattr(lines, "ending", lambda name, _: name)


def as_wide_as_it_likes(patch):
    patch.setattr("hessdiag.gap.text.fits", lambda *_, **__: True)
    patch.setattr("hessdiag.track.page.fits", lambda *_, **__: True)
    patch.setattr("hessdiag.check.writers.side_by_side.fits", lambda *_, **__: True)
    patch.setattr("hessdiag.present.tables.fits", lambda *_, **__: True)


def no_room_for_numbers(patch):
    patch.setattr(lines, "_widths", lambda heads, *_: [30, *[6] * (len(heads) - 1)])


BREAKAGES = {
    "names not cut": (whole_names, "track"),
    "an interval in a column too narrow": (as_wide_as_it_likes, "compare"),
    "two intervals side by side": (as_wide_as_it_likes, "demo"),
    "columns too narrow": (no_room_for_numbers, "shift"),
    "readings with all intervals": (no_room_for_numbers, "gap"),
}


@pytest.mark.parametrize(("breakage", "name"), BREAKAGES.values(), ids=BREAKAGES)
def test_this_promise_would_notice(breakage, name, monkeypatch):
    make, names = TABLES[name](monkeypatch)
    breakage(monkeypatch)
    assert faults(printed(make), names)


def test_reasons_go_below_the_table():
    heads, rows = (
        ("checkpoint", "gap", "interval"),
        [("one", "—", "cannot tell: " + "x" * 60), ("two", "1.0", "[0, 2]")],
    )
    table, below = lines.one_line_each(heads, rows, 60, reason=2)
    text = printed(lambda _: table, 60)
    assert below == ["one: cannot tell: " + "x" * 60]
    assert [line.split() for line in text if "one" in line] == [["one", "—", "—"]]
    table, below = lines.one_line_each(heads, rows, 200, reason=2)
    assert below == []
    assert any("cannot tell" in line for line in printed(lambda _: table, 200))
