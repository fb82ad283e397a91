"""Promise: the page is one valid HTML file that needs no script, no network, no other file, and no colour vision.

The checker is the standard library's parser plus the rules of WCAG 2.2 that a machine can check.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hessdiag.errors import UsageError
from hessdiag.present import page, svg
from hessdiag.present.density import density
from hessdiag.present.report import MOST_LINEAR
from hessdiag.results import Fingerprint
from tests import example_analysis as example

COMMAND = "hessdiag analyze proj.problems:digits -c 'a & b<c>.safetensors' --seed 0"
ANALYSIS = example.build_analysis()
NOTHING = (
    "spectrum",
    "layers",
    "convergence",
    "metrics",
    "self_test",
    "other_bounds",
    "fingerprint",
    "environment",
)
ANALYSES = {
    "plain": ANALYSIS,
    example.ODD: dataclasses.replace(
        example.build_analysis(example.ODD, probes=1, sign=-1.0, tensors=9),
        warnings=("<b>bold</b> & \x00 control",),
        notes=('"><img src=x onerror=alert(1)>',),
        fingerprint=Fingerprint.of({"<script>": {"nested": [1, None, "</dd>"]}}),
    ),
    "no spectrum": example.without(ANALYSIS, "spectrum", "layers", "convergence"),
    "nothing": example.without(ANALYSIS, *NOTHING, "warnings", "notes", "title"),
    "all zero": example.all_zero(),
}
VOID = {"meta", "br", "link", "img", "hr", "input", "wbr"}
SECTIONS = ("summary", "spectrum", "layers", "convergence", "warnings", "reproduce", "data", "meanings")
ALWAYS = ("summary", "reproduce", "data")  # the others are there where something is in them
LIMIT = 2_000_000  # bytes a browser opens at once; a page of 80 MB was filed against ydata-profiling (#1579)


@pytest.fixture(scope="module")
def html() -> str:
    return page(ANALYSES, COMMAND)


class Reader(HTMLParser):
    """Collects elements and every fault of nesting and attributes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.faults: list[str] = []

    def handle_starttag(self, tag, attributes):
        if len(attributes) != len({name for name, _ in attributes}):
            self.faults.append(f"attribute twice in <{tag}>")
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()
            if "svg" not in self.open:
                self.faults.append(f"<{tag}/> closes nothing in HTML")

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()


def faults(html: str, sections: Collection[str] = SECTIONS) -> list[str]:
    """Everything that breaks the promise, in words; empty for a good page with these sections."""
    reader = Reader()
    reader.feed(html)
    reader.close()
    found = reader.faults + [f"<{tag}> left open" for tag in reader.open]
    found += [] if html.startswith("<!DOCTYPE html>") else ["no doctype"]
    found += ["control character"] if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", html) else []
    found += ["too large"] if len(html.encode()) > LIMIT else []
    return found + _alone(html, reader) + _references(html, reader) + _accessible(reader, sections)


def _alone(html: str, reader: Reader) -> list[str]:
    found = []
    for tag, attributes, _ in reader.elements:
        if tag in {"script", "iframe", "object", "embed", "link", "base", "form", "img"}:
            found.append(f"<{tag}>")
        for name, value in attributes.items():
            if name.startswith("on"):
                found.append(f"handler {name}")
            if name in {"href", "src", "xlink:href", "action"} and not (value or "").startswith(("#", "data:")):
                found.append(f"{name}={value}")
    found += ["style sheet loads a file"] if re.search(r"@import|@font-face|url\((?!#)", html) else []
    return found


def _references(html: str, reader: Reader) -> list[str]:
    ids = Counter(attributes["id"] for _, attributes, _ in reader.elements if "id" in attributes)
    asked = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html))
    targets = {a or b for a, b in asked}
    for _, attributes, _ in reader.elements:
        targets |= set((attributes.get("aria-labelledby") or "").split())
    return [f"id {key} twice" for key, count in ids.items() if count > 1] + [
        f"no id {target}" for target in sorted(targets - set(ids))
    ]


def _accessible(reader: Reader, sections: Collection[str]) -> list[str]:
    tags = Counter(tag for tag, _, _ in reader.elements)
    found = [f"{tags[tag]} <{tag}>" for tag in ("header", "nav", "main", "footer", "h1") if tags[tag] != 1]
    for tag, attributes, _ in reader.elements:
        if tag == "svg" and not (attributes.get("role") == "img" and attributes.get("aria-labelledby")):
            found.append("svg without a name")
        if tag == "html" and attributes.get("lang") != "en":
            found.append("no language")
        if tag == "th" and "scope" not in attributes:
            found.append("th without scope")
    levels = [int(tag[1]) for tag, _, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    found += [f"h{a} then h{b}" for a, b in itertools.pairwise(levels) if b > a + 1]
    in_figure = Counter(tag for tag, _, around in reader.elements if "figure" in around)
    if not in_figure["svg"] == in_figure["table"] == in_figure["figcaption"] == tags["figure"]:
        found.append("a figure without its table or caption")
    present = {attributes.get("id") for tag, attributes, _ in reader.elements if tag == "section"}
    return found + [f"no section {name}" for name in sections if name not in present]


BROKEN = {
    "a script": lambda html: html.replace("<main>", "<main><script>1</script>"),
    "a name not escaped": lambda html: html.replace("&lt;script&gt;", "<script>"),
    "a picture from the network": lambda html: html.replace("<main>", '<main><img src="https://a.b/c.png">'),
    "a style sheet from the network": lambda html: html.replace(
        "</style>", "@import 'https://a.b/c.css'; </style>"
    ),
    "a font file": lambda html: html.replace("</style>", "x { background: url(font.woff) } </style>"),
    "an event handler": lambda html: html.replace("<main>", '<main onclick="x()">'),
    "ids of two figures alike": lambda html: html.replace('id="run2-', 'id="run1-'),
    "an id nobody has": lambda html: html.replace('id="run1-density-title"', ""),
    "a table left open": lambda html: html.replace("</table>", "", 1),
    "a figure without table": lambda html: re.sub(
        r"</figcaption>\s*<details>.*?</details>", "</figcaption>", html, count=1, flags=re.DOTALL
    ),
    "a figure without a name": lambda html: html.replace(' role="img"', "", 1),
    "no landmarks": lambda html: html.replace("<main>", "<div>").replace("</main>", "</div>"),
    "a heading level skipped": lambda html: html.replace("<h2", "<h5").replace("</h2", "</h5"),
    "a section missing": lambda html: html.replace('<section id="reproduce"', "<section"),
    "no language": lambda html: html.replace('lang="en"', ""),
    "a control character": lambda html: html.replace("Summary", "Sum\x00mary"),
    "all raw data inline": lambda html: html.replace("</main>", "<p>" + "1 " * LIMIT + "</p></main>"),
}


def test_the_page_keeps_the_promise(html):
    assert faults(html) == []


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, html):
    assert faults(breakage(html))


def test_one_analysis_and_an_empty_one_are_pages_too():
    assert faults(page({"only": ANALYSIS})) == []
    empty = page({"": ANALYSES["nothing"]})
    assert faults(empty, ALWAYS) == []
    assert [part for part in SECTIONS if f'href="#{part}"' in empty or f'id="{part}"' in empty] == list(ALWAYS)


def test_what_was_measured_is_on_the_page(html):
    for shown in (
        "20.39",
        "[19.96, 20.82]",
        "29.6%",
        "482",
        "911.4",
        "a &amp; b&lt;c&gt;.safetensors",
        "3c1f6a0c8ce24f7e",
    ):
        assert shown in html
    assert "No spectrum was measured." in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    content = re.search(r"data:text/csv;base64,([A-Za-z0-9+/=]+)", html)
    assert base64.b64decode(content[1]).decode() == ANALYSIS.to_frame().to_csv(index=False)


def test_twelve_large_analyses_stay_below_two_megabytes(monkeypatch):
    large = example.build_analysis(probes=16, tensors=60)
    overlay = svg(density({str(i): large for i in range(8)}, show_caption=False))
    # counts what the twelve share but the style sheet twelve times: a bound without drawing sixty figures
    for most, linear in ((MOST_LINEAR, MOST_LINEAR), (12, 0)):
        monkeypatch.setattr("hessdiag.present.report.MOST_LINEAR", linear)
        html = page({"large": large}).partition("</style>")
        assert len((html[0] + overlay).encode()) + most * len(html[2].encode()) < LIMIT
    with pytest.raises(UsageError, match="1 to 12"):
        page({str(i): large for i in range(13)})
    with pytest.raises(UsageError, match="1 to 12"):
        page({})


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    darker, lighter = sorted((luminance(a), luminance(b)))
    return (lighter + 0.05) / (darker + 0.05)


def test_text_contrasts_with_its_background_in_light_dark_and_print(html):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # WCAG's own example of a pass
    themes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", html)
    ]
    assert len(themes) == 3
    assert "prefers-color-scheme: dark" in html
    for theme in themes:
        for ink in ("ink", "soft", "link", "warn"):
            for ground in ("paper", "tint"):
                assert contrast(theme[ink], theme[ground]) >= 4.5


def test_curves_are_seen_on_light_and_dark():
    from hessdiag.present.axes import COLOURS

    for colour in COLOURS:
        # 3:1 is WCAG's demand on graphics; Okabe-Ito's light hues keep 2:1 on white, and their line style
        assert contrast(colour, "#15171b") >= 3.0
        assert contrast(colour, "#ffffff") >= 2.0
    assert contrast(COLOURS[0], "#ffffff") >= 3.0


def test_the_same_results_give_the_same_bytes():
    small = {name: ANALYSES[name] for name in ("nothing", "all zero")}
    assert page(small, COMMAND) == page(small, COMMAND)
    here = svg(ANALYSIS.plot.density())
    assert "<metadata" not in here
    code = (
        "from tests import example_analysis as e; import hashlib; from hessdiag.present import svg;"
        "print(hashlib.sha256(svg(e.build_analysis().plot.density()).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[1])}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()
