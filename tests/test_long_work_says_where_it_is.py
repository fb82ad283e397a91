"""Promise: long work says on one line what is done now, how long it has taken and how long it will take. (10 s)

Oracles: a clock that the tests set, the printed characters, and a notebook's display that keeps what it is given.
"""

from __future__ import annotations

import io
import sys
import types

import pytest
import torch
from rich.console import Console
from torch import nn

import hessdiag
from hessdiag.analysis.so_far import Row, SoFar
from hessdiag.cli import progress
from hessdiag.cli.progress import Course
from hessdiag.formatting import clock, to_go
from hessdiag.present import arriving as rows
from hessdiag.present import watching
from hessdiag.present.arriving import arriving, course
from tests import example_analysis
from tests import test_page_is_self_contained as checker

NOTEBOOK_LIMIT = 200_000  # bytes of a cell's output: a notebook of twenty stays small


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (41.3, "41 s"), (99.4, "99 s"), (99.6, "1:40 min"), (3599.6, "1:00 h"), (125, "2:05 min")],
)
def test_time_that_passes(seconds, said):
    assert clock(seconds) == said


def test_what_is_left_is_as_fast_as_what_was_done():
    assert to_go(30.0, 10, 40) == ", about 90 s to go"
    assert to_go(30.0, 0, 40) == to_go(30.0, 40, 40) == ""


class Clock:
    """The tests' own `time.monotonic`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr(progress.time, "monotonic", lambda: self.now)


def a_survey(patch: pytest.MonkeyPatch) -> list[str]:
    """Lines of two checkpoints of four, each of 10 measures that take 3 s together, and the loading before."""
    ticking = Clock(patch)
    told, seen = Course(), []
    for checkpoint in range(2):
        told.report(f"checkpoints: run{checkpoint}", checkpoint, 4)
        ticking.now += 7
        for measure in range(10):
            told.report(f"measures: m{measure}", measure, 10)
            ticking.now += 0.3
        seen.append(told.line())
    told.report("checkpoints: run2", 2, 4)
    return [*seen, told.line()]


SURVEY = [
    "checkpoints 0/4 (run0), measures 9/10 (m9): 10 s",
    "checkpoints 1/4 (run1), measures 9/10 (m9): 20 s, about 30 s to go",
    "checkpoints 2/4 (run2): 20 s, about 20 s to go",
]


def test_the_line_says_what_is_done_now_and_what_is_left(monkeypatch):
    assert a_survey(monkeypatch) == SURVEY


def test_work_of_one_stage_has_its_own_time(monkeypatch):
    ticking = Clock(monkeypatch)
    told = Course()
    for _ in range(2):  # as a comparison, which measures one after the other
        for done in range(0, 41, 10):
            told.report("products", done, 40)
            ticking.now += 1
    assert told.line() == "products 40/40: 10 s"
    told.report("products", 0, 40)
    ticking.now += 5
    told.report("products", 10, 40)
    assert told.line() == "products 10/40: 15 s, about 15 s to go"
    assert told.share == 0.25


BREAKAGES = {
    "time left by all steps": ("_left", lambda one: to_go(one.stepped, one.done, one.total)),
    "nothing left": ("_left", lambda _: ""),
    "what is done now left out": ("_part", lambda name, one: f"{name} {one.done}/{one.total}"),
    "stages within taken for the whole": ("OUTER", ("measures",)),
}


@pytest.mark.parametrize(("name", "instead"), BREAKAGES.values(), ids=BREAKAGES)
def test_this_promise_would_notice(name, instead, monkeypatch):
    monkeypatch.setattr(progress, name, instead)
    assert a_survey(monkeypatch) != SURVEY


def test_the_line_fits_a_terminal_of_80_columns(monkeypatch):
    ticking = Clock(monkeypatch)
    told = Course()
    told.report("checkpoints: " + "a_long_name" * 9, 17, 120)
    ticking.now += 3000
    told.report("measures: pac_bayes_magnitude_sharpness", 34, 61)
    out = io.StringIO()
    Console(file=out, width=80).print(progress._row(told))
    (line,) = out.getvalue().splitlines()
    assert len(line) <= 80 and "checkpoints 17/120" in line and "…" in line


NOW = SoFar(
    (Row("lambda_max", 3.5, 3.4, 3.6, "known"), Row("trace", 9.0, 8.0, 10.0, "narrowing"), Row("x")), 34, 78, 8
)


def test_a_measurement_says_what_it_measures_now():
    assert course(NOW, 41.2) == "34 of about 78 products, 8 probes, 41 s, about 53 s to go; now trace"
    waiting = SoFar((Row("lambda_max", 3.5, state="known"), Row("trace", waits="the probes")), 34, 34)
    assert course(waiting, 41.2) == "34 products, 41 s; now the probes"
    assert course(None, 1.0) == "1 s; now the first product"
    many = SoFar(tuple(Row(f"q{i}", 1.0, state="narrowing") for i in range(5)), 1, 2)
    assert course(many, 1.0) == "1 of about 2 products, 1 s, about 1 s to go; now q0, q1 and 3 more"


def the_table_says_it_too() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(arriving(NOW, 41.2, width=80))
    assert course(NOW, 41.2) in out.getvalue()


def test_the_table_says_it_too():
    the_table_says_it_too()


def test_a_table_without_it_would_be_noticed(monkeypatch):
    before = course(NOW, 41.2)
    monkeypatch.setattr(rows, "course", lambda *_: "34 products")
    out = io.StringIO()
    Console(file=out, width=80).print(arriving(NOW, 41.2, width=80))
    assert before not in out.getvalue()


# ------------------------------------------------------------------------------------------------ notebooks


class Display:
    """What a notebook shows, state after state."""

    def __init__(self, patch: pytest.MonkeyPatch, kernel: object | None) -> None:
        self.shown: list[dict[str, str]] = []
        module, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
        module.get_ipython = lambda: types.SimpleNamespace(kernel=kernel)
        display.display = self
        patch.setitem(sys.modules, "IPython", module)
        patch.setitem(sys.modules, "IPython.display", display)
        patch.setattr(watching, "OFTEN", 0.0)

    def __call__(self, bundle, *, raw, display_id):
        assert raw and display_id is True
        self.update(bundle, raw=True)
        return self

    def update(self, bundle, *, raw):
        assert raw
        self.shown.append(bundle)


def measured(**more) -> hessdiag.Analysis:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=generator), torch.randint(3, (64,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y), **more)


def test_a_notebook_shows_a_bar_and_keeps_one_line(monkeypatch, capfd):
    display = Display(monkeypatch, kernel=object())
    found = measured(progress=True)
    first, *middle, last = display.shown
    assert first["text/plain"] == "0 s; now the first product"
    assert middle and all("<progress" in one["text/html"] and " s" in one["text/plain"] for one in middle)
    assert any("of about" in one["text/plain"] for one in middle)
    assert (
        last["text/plain"].startswith(f"{found.cost.products} products, ") and "<progress" not in last["text/html"]
    )
    assert capfd.readouterr() == ("", "")


def test_a_bar_ends_with_what_failed(monkeypatch):
    display = Display(monkeypatch, kernel=object())
    with pytest.raises(KeyboardInterrupt), watching.watched() as look:
        look(NOW)
        raise KeyboardInterrupt
    assert display.shown[-1]["text/plain"].startswith("34 products, ")


def test_scripts_are_silent_unless_asked(monkeypatch, capfd):
    asked = measured()
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(watching, "SELDOM", 0.0)
    assert measured(progress=True).metrics == asked.metrics
    out, err = capfd.readouterr()
    assert out == "" and "; now " in err
    Display(monkeypatch, kernel=None)  # IPython on a terminal is no notebook
    assert not watching.in_notebook()


def test_numbers_do_not_depend_on_who_looks(monkeypatch):
    Display(monkeypatch, kernel=object())
    seen: list[tuple[str, int, int]] = []
    told = measured(progress=lambda *state: seen.append(state))
    assert measured(progress=True).metrics == measured(progress=False).metrics == told.metrics
    assert seen


FIRST_SIGHT = ("<table", "<svg", "20.39", "outliers")


def at_once(fragment: str) -> None:
    """Table and density are there without a click, in one fragment without script or style sheet."""
    reader = checker.Reader()
    reader.feed(fragment)
    reader.close()
    assert reader.faults == [] and reader.open == []
    outside = fragment
    while "<details" in outside:  # what is folded is not seen at once
        before, _, after = outside.partition("<details")
        outside = before + after.partition("</details>")[2]
    assert all(said in outside for said in FIRST_SIGHT)
    assert not {"script", "style", "link", "iframe", "img"} & {tag for tag, _, _ in reader.elements}
    assert len(fragment.encode()) < NOTEBOOK_LIMIT


def test_an_analysis_shows_its_table_and_density_at_once():
    for analysis in (example_analysis.build_own(), example_analysis.build_analysis(probes=16, tensors=60)):
        at_once(analysis._repr_html_())


@pytest.mark.parametrize(
    "breakage",
    [
        lambda html: f"<details>{html}</details>",
        lambda html: html.replace("<svg", "<details><svg", 1).replace("</svg>", "</svg></details>", 1),
        lambda html: html + "<style></style>",
        lambda html: html.replace("</table>", ""),
        lambda html: html + "<!--" + "x" * NOTEBOOK_LIMIT + "-->",
    ],
    ids=["all folded", "density folded", "a style sheet", "a table left open", "too large"],
)
def test_a_fragment_gone_wrong_would_be_noticed(breakage):
    with pytest.raises(AssertionError):
        at_once(breakage(example_analysis.build_own()._repr_html_()))
