"""Promise: ``hessdiag shift`` shows what the tests found, for every checkpoint, and refuses in one line. (15 s)

Oracle: the library's tests called directly; the page's checker.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from contextlib import suppress
from html import escape
from pathlib import Path

import pytest
import torch
from torch import nn

from hessdiag import Problem
from hessdiag.present import pictures
from hessdiag.shift import features
from hessdiag.shift import plots as shift_plots
from hessdiag.shift import report as shift_report
from hessdiag.shift.page import shift_page, slope_rows
from hessdiag.shift.plots import shift_plot
from hessdiag.shift.report import ShiftReport, ShiftSettings, shift_curves
from hessdiag.sources import datasets
from tests import test_page_is_self_contained as checker
from tests.command import call

PROBLEM = """
import hessdiag
from torch import nn
from hessdiag.sources import datasets


def small():
    train, test = datasets.digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return hessdiag.Problem(model, {"train": train, "test": test, "again": test}, criterion="cross_entropy")
"""


def linear(seed: int) -> nn.Module:
    """A few steps from its start, so that it is right about nine times in ten."""
    train, _ = datasets.digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, y = train.pixels.float() * train.scale, train.targets
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("problem.py").write_text(PROBLEM)
    for seed in range(2):
        torch.save(linear(seed).state_dict(), f"run{seed}.pt")
    return tmp_path


def test_what_the_tests_found_is_shown(folder):
    torch.save({"0.weight": torch.zeros(3)}, "run9.pt")
    code, out, err = call("shift", "problem.py:small", "-c", "run*.pt", "--other", "again", "-o", "out")
    assert code == 4
    assert "1 of 3 checkpoints could not be tested: run9" in err
    plain = json.loads(Path("out/shift.json").read_text())
    train, test = datasets.digits()
    problem = Problem(linear(0), {"train": train, "test": test, "again": test}, criterion="cross_entropy")
    asked = ShiftSettings(tests=shift_report.TESTS[:4], other="again")
    direct = dict(shift_curves(problem, asked))
    for name, curve in direct.items():
        assert plain["curves"]["run0"][name]["slope"]["value"] == pytest.approx(curve.slope.value, rel=1e-9)
    assert plain["curves"]["run0"]["other"]["slope"]["value"] == pytest.approx(0.0, abs=1e-12)
    assert all("run0" in out and title in out for title in ("Covariate shift", "Augmented", "distance", "another"))
    html = Path("out/shift.html").read_text()
    assert checker.faults(html, ()) == []
    assert "run9" in html


def made(patch: pytest.MonkeyPatch) -> list[str]:
    """What two checkpoints on the same data and a third on other data had to compute, shared and each alone."""
    train, test = datasets.digits()
    found: list[str] = []
    for of, name in ((features.Weighted, "of"), (shift_report, "nearest")):
        original = getattr(of, name)
        patch.setattr(of, name, lambda *a, f=original, n=name, **k: found.append(n) or f(*a, **k))
    asked, shared = ShiftSettings(tests=("covariate", "distance")), shift_report.Prepared()
    for seed, known in ((0, train), (1, train), (0, test)):
        problem = Problem(linear(seed), {"train": known, "test": test}, criterion="cross_entropy")
        together, alone = dict(shift_curves(problem, asked, shared)), dict(shift_curves(problem, asked))
        found += [f"other numbers of {name}" for name in asked.tests if together[name] != alone[name]]
    return found


ONCE = ["of", "nearest"] * 5  # each alone: 3; shared: one for two checkpoints, another for the other data


def test_what_depends_on_inputs_alone_is_made_once(monkeypatch):
    assert made(monkeypatch) == ONCE


@pytest.mark.parametrize(
    "get",
    [lambda self, name, of, make: make(), lambda self, name, of, make: self._made.setdefault(name, make())],
    ids=["made again", "kept for other data"],
)
def test_sharing_gone_wrong_would_be_noticed(get, monkeypatch):
    monkeypatch.setattr(shift_report.Prepared, "get", get)
    assert made(monkeypatch) != ONCE


def test_bad_questions_are_one_line(folder):
    for arguments, words in {
        ("--tests", "weather"): "allowed: covariate, augmented, distance, other, findings",
        ("--tests", "other"): "name it as other",
        ("--test", "none"): "split none: the problem has train, test, again",
        ("--reference", "nobody"): "--reference nobody: there are run0, run1",
        ("--samples", "0"): "--samples 0",
        ("--samples", "20"): "no test could be made",
    }.items():
        code, _, err = call("shift", "problem.py:small", "-c", "run*.pt", *arguments)
        assert code in (2, 4), arguments
        assert words in err, (arguments, err)
        assert "Traceback" not in err


def faults(report: ShiftReport) -> list[str]:
    """What of the curves is not on the page."""
    html = shift_page(report)
    found = [f"{name} is missing" for name in report.curves if escape(name) not in html]
    for test in ("augmented", "distance"):
        found += [f"{row} is missing" for row in slope_rows(report, test) if row[1] not in html]
        found += [] if len(slope_rows(report, test)) == len(report.curves) else [f"{test}: rows"]
    found += [f"{name} is not in the legend" for name in report.curves if f">{escape(name)}</text>" not in html]
    found += [] if "accuracy falls with the shift at" in html else ["the summary is missing"]
    return found + checker.faults(html, ())


PAGES = pictures.environment  # before a breakage takes its place
BROKEN = {
    "a checkpoint is left out": lambda patch: patch.setattr(
        ShiftReport, "of_test", lambda self, test: dict(list(_of_test(self, test).items())[:1])
    ),
    "names not escaped": lambda patch: patch.setattr("hessdiag.present.pictures.environment", _unescaped),
    "names read as formulas": lambda patch: patch.setattr("hessdiag.present.axes._verbatim", lambda legend: None),
    "no summary": lambda patch: patch.setattr("hessdiag.shift.page.summary", lambda report: []),
    "a figure without its table": lambda patch: patch.setattr(
        "hessdiag.present.pictures.environment", lambda *_: _without("<table>")
    ),
}
_of_test = ShiftReport.of_test


def _unescaped(*_):
    made = PAGES("hessdiag.shift")
    made.autoescape = False
    return made


def _changed(get, tag, *a):
    found = get(*a)
    return found[0].replace(tag, "<div>"), *found[1:]


def _without(tag: str):
    made = PAGES("hessdiag.shift")
    for loader in made.loader.loaders:
        loader.get_source = functools.partial(_changed, loader.get_source, tag)
    return made


@pytest.fixture(scope="module")
def report() -> ShiftReport:
    train, test = datasets.digits()
    settings = ShiftSettings(tests=("augmented", "distance"))
    curves = {
        f"run{seed} <b>&$x_1$": dict(
            shift_curves(
                Problem(linear(seed), {"train": train, "test": test}, criterion="cross_entropy"), settings
            )
        )
        for seed in range(2)
    }
    return ShiftReport(curves, settings=settings)


def slope_faults(report: ShiftReport) -> list[str]:
    """Of more checkpoints than clouds can be told apart: what the drawn dots and bars get wrong."""
    pair = list(report.curves.values())
    shown = {f"run{n} $x_1$": {"distance": pair[n % 2]["distance"]} for n in range(9)}
    shown["run4 $x_1$"] = {"distance": dataclasses.replace(pair[0]["distance"], slope=None, cannot_tell="too few")}
    ax = shift_plot(ShiftReport(shown, settings=report.settings), "distance")
    found, drawn = [], {}
    for container in ax.containers:
        ((x, row),) = container.lines[0].get_xydata()
        ((lo, _), (hi, _)) = container.lines[2][0].get_segments()[0]
        drawn[round(row)] = (x, lo, hi)
    for row, (name, curves) in enumerate(shown.items()):
        slope = curves["distance"].slope
        if slope is None:
            found += [f"{name} has a dot without a slope"] if row in drawn else []
            continue
        expected = (slope.value, slope.over_examples.lo, slope.over_examples.hi)
        found += [] if drawn.get(row) == pytest.approx(expected, rel=1e-12) else [f"{name}: {drawn.get(row)}"]
    labels = ax.get_yticklabels()
    found += [] if [label.get_text() for label in labels] == list(shown) else ["names"]
    found += [] if list(ax.get_yticks()) == list(range(9)) else ["places of the names"]
    found += ["names read as formulas"] if any(label.get_parse_math() for label in labels) else []
    low, high = ax.get_xlim()
    found += [] if low < 0 < high and ax.get_ylim()[0] > 8 and ax.get_ylim()[1] < 0 else ["cut off"]
    return found


def test_many_checkpoints_are_slopes(report):
    assert slope_faults(report) == []


SLOPES_BROKEN = {
    "clouds however many": lambda patch: patch.setattr(shift_plots, "MOST_CLOUDS", 99),
    "only half of the dots": lambda patch: patch.setattr(
        shift_plots, "_slopes", lambda curves, *rest: _slopes(dict(list(curves.items())[:5]), *rest)
    ),
    "in another order": lambda patch: patch.setattr(
        shift_plots, "_slopes", lambda curves, *rest: _slopes(dict(reversed(curves.items())), *rest)
    ),
}
_slopes = shift_plots._slopes


@pytest.mark.parametrize("name", SLOPES_BROKEN)
def test_wrong_slopes_would_be_noticed(name, report, monkeypatch):
    SLOPES_BROKEN[name](monkeypatch)
    with suppress(ValueError):  # what is drawn is no slope at all
        assert slope_faults(report) != []


def test_the_page_shows_every_curve(report):
    assert faults(report) == []


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, report, monkeypatch):
    BROKEN[name](monkeypatch)
    assert faults(report) != []
