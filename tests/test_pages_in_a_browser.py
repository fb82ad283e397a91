"""Promise: pages are read without scrolling sideways, in light and dark, on a phone, a tablet and a desk. (40 s)

A headless Chromium opens what hessdiag writes. A script in the page (page_faults.js) computes what is cut off and
spills, and the contrast of every text; the browser tells what the page asked for and complained about. Without a
Chromium nothing can be said, and the tests are skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.gap.page import gap_page
from hessdiag.gap.report import GapReport
from hessdiag.present import notebook, page
from hessdiag.shift.experiments import ShiftCurve
from hessdiag.shift.page import shift_page
from hessdiag.shift.report import ShiftReport, ShiftSettings, shift_curves
from hessdiag.track.page import trajectory_page
from hessdiag.track.trajectory import Point, Rate, Trajectory
from tests import browser, example_analysis, example_gap
from tests import test_page_is_self_contained as checker

WIDTHS = (390, 768, 1280)  # a phone, a tablet, a desk
SCHEMES = ("light", "dark")
FAULTS = Path(__file__).with_name("page_faults.js").read_text()
LONG = "runs/" + "sweep_of_learning_rates_and_batch_sizes" * 3 + "/last.safetensors"
COMMAND = f"hessdiag analyze proj.problems:digits -c {LONG} --seed 0"
TEMPLATES = {
    "analyze": "hessdiag/present/templates/run.html.j2",
    "gap": "hessdiag/gap/templates/gap.html.j2",
    "track": "hessdiag/track/templates/trajectory.html.j2",
    "shift": "hessdiag/shift/templates/shift.html.j2",
}


def analyze() -> str:
    own = example_analysis.build_own(LONG)
    return page({LONG: dataclasses.replace(own, warnings=(f"{LONG} is no stationary point.",))}, COMMAND)


def compare() -> str:
    few = {name: checker.ANALYSES[name] for name in ("plain", example_analysis.ODD, "all zero")}
    return page(few | {LONG: example_analysis.build_own(sign=-1.0)}, COMMAND)


def gap() -> str:
    records = example_gap.records(9, measures=12)
    records[4] = dataclasses.replace(records[4], name=LONG)
    return gap_page(GapReport(tuple(records), failures={"last": f"{LONG}: no such file"}), COMMAND)


def track() -> str:
    names = ("epoch01", LONG, "epoch09")
    points = [
        Point(
            name=name,
            path=name,
            analysis=example_analysis.build_own(name, sharpness=1.0 + number),
            rate=Rate(lr=0.5, momentum=0.9, nesterov=False, origin="lr"),
        )
        for number, name in enumerate(names)
    ]
    failed = Point(name="epoch10", path="x", error=f"{LONG}: no such file")
    return trajectory_page(Trajectory(points=(*points, failed), notes=("A note.",)), COMMAND)


def shift() -> str:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(300, 1, 6, 6, generator=generator) for _ in range(2)]
    data = {split: (x, x.flatten(1)[:, :3].argmax(1)) for split, x in zip(("train", "test"), inputs, strict=True)}
    settings = ShiftSettings(tests=("covariate", "augmented", "distance"), shifts=20)
    curves = {}
    for name in ("one", LONG):
        torch.manual_seed(len(name))
        problem = hessdiag.Problem(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), data, criterion="cross_entropy")
        curves[name] = {
            test: curve for test, curve in shift_curves(problem, settings) if isinstance(curve, ShiftCurve)
        }
        assert curves[name].keys() == set(settings.tests)
    return shift_page(ShiftReport(curves, failures={"two": f"{LONG}: no such file"}, settings=settings), COMMAND)


def in_a_notebook() -> str:
    """The fragment on white and on black paper, as notebooks have."""
    style = "color-scheme: light dark; font: 14px/1.5 sans-serif; margin: 1em"
    body = "@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }"
    fragment = notebook(example_analysis.build_own())
    head = f"<meta charset='utf-8'><title>n</title><style>body {{ {style} }} {body}</style>"
    start = '<!DOCTYPE html><html lang="en" style="color-scheme: light dark">'
    return f"{start}<head>{head}</head><body>{fragment}</body></html>"


PAGES = {make.__name__: make for make in (analyze, compare, gap, track, shift, in_a_notebook)}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    found = browser.program()
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(browser.PROGRAMS)} is on the PATH")
    opened = browser.Browser(found, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


CHOICES = """Math.max(1, ...[...document.querySelectorAll("*")].map((one) =>
    [...one.children].filter((child) => child.type === "radio").length))"""
CHOOSE = """[...document.querySelectorAll("input[type=radio]")].filter((one) =>
    [...one.parentElement.children].filter((child) => child.type === "radio").indexOf(one) === %d
).forEach((one) => one.click())"""


def faults(tab: browser.Browser, file: Path, html: str) -> list[str]:
    """Everything that a reader would stumble over, with the widths and schemes where."""
    file.write_text(html)
    tab.open(file.as_uri(), WIDTHS[0], SCHEMES[0])
    tab.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    places: dict[str, list[str]] = {}
    for width in WIDTHS:
        for scheme in SCHEMES:
            tab.look(width, scheme)
            tab.look(width, scheme, tab.value("document.documentElement.scrollHeight"))
            for choice in range(tab.value(CHOICES)):
                tab.value(CHOOSE % choice)
                for fault in tab.value(FAULTS):
                    places.setdefault(fault, []).append(f"{width} {scheme}")
    found = [f"{fault} ({', '.join(dict.fromkeys(where))})" for fault, where in places.items()]
    return found + complaints(tab, file)


def complaints(tab: browser.Browser, file: Path) -> list[str]:
    """What the page logged, and what it asked for beside itself."""
    found = []
    for method, said in tab.heard:
        if method == "Network.requestWillBeSent":
            address = said["request"]["url"]
            found += (
                [] if address == file.as_uri() or address.startswith("data:") else [f"asks for {address[:80]}"]
            )
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            found.append(f"console.{said['type']}: {said['args'][:1]}")
        elif method == "Runtime.exceptionThrown":
            found.append(f"exception: {said['exceptionDetails']['text']}")
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            found.append(f"log: {said['entry']['text']}")
    return found


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_read_at_every_width_and_in_both_schemes(name, tab, tmp_path):
    assert faults(tab, tmp_path / "page.html", PAGES[name]()) == []


def test_every_template_is_opened():
    root = Path(hessdiag.__file__).parent.parent
    whole = [file for file in root.glob("hessdiag/*/templates/*.j2") if '{% extends "base' in file.read_text()]
    assert sorted(str(file.relative_to(root)) for file in whole) == sorted(TEMPLATES.values())
    assert TEMPLATES.keys() <= PAGES.keys()


PLAIN = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>t</title><style>
:root { --paper: #fff; --ink: #000 }
@media (prefers-color-scheme: dark) { :root { --paper: #111; --ink: #eee } }
body { background: var(--paper); color: var(--ink) }
svg { color: var(--ink) }
svg text { fill: currentColor; font-size: 12px }
</style></head><body><main><p>Text.</p>
<svg width="300" height="100" viewBox="0 0 300 100"><text x="10" y="20">legend</text></svg>
</main></body></html>"""
"""Nothing on it is wrong."""
BREAKAGES = {
    "an element of 2000 px": ('<div style="width: 2000px">wide</div>', "the page is"),
    "a name that does not break": (f"<p>{'x' * 300}</p>", "the page is"),
    "a table that does not scroll": (
        f"<table><tr>{'<td>a cell of some width</td>' * 30}</tr></table>",
        "the page is",
    ),
    "grey on grey": ('<p style="color: #999; background: #ccc">unread</p>', "contrast 1.7"),
    "too pale in dark alone": ('<p style="color: #000">unread</p>', "dark)"),
    "pale by opacity": ('<p style="opacity: 0.4">unread</p>', "contrast"),
    "a legend on a bar of its colour": (
        '<svg width="300" height="100"><rect width="300" height="100" fill="#777"/>'
        '<text x="9" y="50" style="fill: #888">unread</text></svg>',
        "contrast",
    ),
    "a legend cut off": ('<svg width="300" height="100"><text x="280" y="50">a legend</text></svg>', "cut off"),
    "labels on each other": (
        '<svg width="300" height="100"><text x="9" y="50">one</text><text x="12" y="52">two</text></svg>',
        "text on text",
    ),
    "text hidden by its box": (
        '<p style="width: 5em; overflow: hidden; white-space: nowrap">a text that ends early</p>',
        "cut off",
    ),
    "a value beyond its card": ('<p style="width: 5em; white-space: nowrap">[0.123, 0.456]×10⁻⁵</p>', "spills"),
    "letters too small": ('<p style="font-size: 6px">unread</p>', "letters"),
    "an error in the console": ("<script>console.error('no')</script>", "console.error"),
    "an exception": ("<script>nothing.at.all</script>", "exception"),
    "a picture from elsewhere": ('<img alt="" width="9" height="9" src="https://example.org/a.png">', "asks for"),
    "a second choice that spills": (
        "<style>.b { display: none; width: 2000px } #b:checked ~ .b { display: block }</style>"
        '<input type="radio" name="r" id="a" checked><input type="radio" name="r" id="b"><p class="b">wide</p>',
        "the page is",
    ),
    "in a closed part": (
        '<details><summary>more</summary><p style="width: 2000px">wide</p></details>',
        "the page is",
    ),
}


def test_a_plain_page_has_no_fault(tab, tmp_path):
    assert faults(tab, tmp_path / "page.html", PLAIN) == []


@pytest.mark.parametrize(("put", "said"), BREAKAGES.values(), ids=BREAKAGES)
def test_this_promise_would_notice(put, said, tab, tmp_path):
    found = faults(tab, tmp_path / "page.html", PLAIN.replace("</main>", f"{put}</main>"))
    assert any(said in one for one in found), found


def test_where_there_is_no_browser_the_reason_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert browser.program() is None


def test_a_browser_that_ends_is_no_page(tmp_path):
    with pytest.raises(RuntimeError, match="said nothing more"):
        browser.Browser("/bin/true", tmp_path)


SHOWN = "[...document.querySelectorAll('#spectrum svg')].filter((one) => one.checkVisibility()).length"


def choices(tab: browser.Browser, file: Path, html: str) -> tuple[list[int], int, list[str]]:
    """Drawings of the spectrum shown at first and after each choice; on paper; and the names of the choices."""
    file.write_text(html)
    tab.open(file.as_uri(), 1280, "light")
    shown = [tab.value(SHOWN)]
    for number in (1, 0):
        tab.value(f"document.querySelectorAll('#spectrum label')[{number}].click()")
        shown.append(tab.value(SHOWN))
    tab.ask("Emulation.setEmulatedMedia", media="print")
    printed = tab.value(SHOWN)
    tab.ask("Emulation.setEmulatedMedia", media="")
    names = tab.value("[...document.querySelectorAll('#spectrum input')].map((one) => one.labels[0].textContent)")
    return shown, printed, names


def test_one_of_two_axes_is_shown_and_both_are_printed(tab, tmp_path):
    shown, printed, names = choices(tab, tmp_path / "page.html", analyze())
    assert (shown, printed) == ([2, 2, 2], 3)  # the staircase is there always
    assert names == ["linear: bulk and outliers", "logarithmic"]


@pytest.mark.parametrize(
    ("rule", "instead"),
    [
        (".choice, .which { display: none; }", ""),
        (".choice { display: block !important", ".choice { display: none"),
        ('for="run1-axis-2"', ""),
    ],
    ids=["both at once", "one on paper", "a label of nothing"],
)
def test_a_choice_gone_wrong_would_be_noticed(rule, instead, tab, tmp_path):
    html = (
        analyze()
        .replace(".either > .choice, .either .which", ".choice, .which")
        .replace(".choice, .which { display: block !important", ".choice { display: block !important")
    )
    assert rule in html
    try:
        found = choices(tab, tmp_path / "page.html", html.replace(rule, instead))
    except RuntimeError:  # no label
        return
    assert found[:2] != ([2, 2, 2], 3)
