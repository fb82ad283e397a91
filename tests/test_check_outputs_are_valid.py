"""Promise: every output of a check is valid in its format and says the same, whatever a user's names hold. (15 s)

The oracles are the formats' own readers: lxml with an XSD, prometheus_client, markdown-it, json, and GitHub's
grammar of workflow commands as its runner parses it.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree, html
from markdown_it import MarkdownIt
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from pydantic import TypeAdapter
from rich.cells import cell_len

from hessdiag.check.verdict import Interval, Report, Verdict
from hessdiag.check.writers import FORMATS, check_schema, document, metrics, parse_output, terminal
from hessdiag.check.writers.document import Document
from hessdiag.check.writers.github import escape_data, escape_property
from hessdiag.check.writers.markdown import escape
from hessdiag.check.writers.openmetrics import escape_label
from hessdiag.errors import UsageError
from hessdiag.shown import visible

from .example_reports import failing, hostile, mixed, passing, row

JOINER = "\N{WORD JOINER}"
REPORTS = {
    "every verdict": mixed(),
    "every verdict, strict": mixed(strict=True),
    "all passed": passing(),
    "nothing checked": Report(),
    "only a problem": Report(problems=("no baseline at tests/hessdiag-baseline.json", "no baseline")),
    "eleven failures": failing(11),
    "ten failures": failing(10),
    "twelve warnings": failing(12, level="warn"),
    "hostile names": hostile(),
    "hostile names nobody can tell": hostile(Verdict.UNSURE, problems=()),
    "hostile names nobody can tell, strict": hostile(Verdict.UNSURE, strict=True),
    "names that look alike": mixed(
        rows=tuple(row(budget=f"trace@{char}") for char in "\0\a"), problems=("a", "a")
    ),
    "infinite interval": mixed(rows=(row(Verdict.UNSURE, tested=Interval(0.1, -math.inf, math.inf)),)),
    "more than GitHub shows": mixed(
        rows=failing(450, reason="|" * 500).rows,
        **dict.fromkeys(("problems", "warnings", "notes"), ("{" * 1000,) * 40),
        environment={"{" * 1000 + str(number): "}" * 1000 for number in range(40)},
    ),
}
XSD = etree.XMLSchema(etree.parse(Path(__file__).parent / "junit.xsd"))
COMMAND = re.compile(r"::(?P<kind>error|warning) (?P<properties>.*?)::(?P<data>.*)")
TAGS = {"main", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "strong", "ul", "li"}
TAGS |= {"details", "summary"}
GITHUB_STEP = 1024 * 1024  # bytes of a summary, docs.github.com, "Workflow commands"


def warns(report, given):
    """Rows that are no pass and do not count against the check."""
    return given.verdict is not Verdict.PASS and not report.fails(given) and not report.undecided(given)


def kinds(report):
    """How many rows fail the check, leave it undecided, or only warn."""
    rows = report.rows
    return (
        sum(map(report.fails, rows)),
        sum(map(report.undecided, rows)),
        sum(warns(report, each) for each in rows),
    )


def junit_holds(text, report):
    tree = etree.fromstring(text.encode())
    XSD.assertValid(tree)
    suite = tree.find("testsuite")
    fails, undecided, _ = kinds(report)
    problems = len(report.problems) or int(not report.rows)
    skipped = sum(each.verdict is Verdict.UNSURE for each in report.rows) * (not report.strict)
    for name, tag, expected in (
        ("failures", "failure", fails),
        ("errors", "error", undecided + problems),
        ("skipped", "skipped", skipped),
    ):
        assert int(suite.get(name)) == expected == len(suite.findall(f"testcase/{tag}"))
    cases = suite.findall("testcase")
    assert int(suite.get("tests")) == len(cases) == len(report.rows) + problems
    numbers = {each.get("name"): each.get("value") for each in suite.find("properties")}
    for case, each in zip(cases, report.rows, strict=False):
        assert case.get("name").startswith(visible(each.name))
        assert case.get("classname") == visible(f"hessdiag.{each.scope}")
        assert float(numbers[visible(f"{each.name}: value")]) == each.measured.value
        if each.verdict is not Verdict.PASS:
            said = [*case.itertext(), *(result.get("message", "") for result in case)]
            assert any(visible(each.reason) in text for text in said)


def markdown_holds(text, report):
    assert len(text.encode()) < GITHUB_STEP
    page = html.fromstring(f"<main>{MarkdownIt('js-default', {'html': True}).render(text)}</main>")
    assert {each.tag for each in page.iter()} <= TAGS
    assert not re.search(r"[@#]\w", page.text_content())
    assert (
        page.find("h3").text_content().split()
        == f"hessdiag: {visible(report.headline, 500)}".replace("@", f"@{JOINER}")
        .replace("#", f"#{JOINER}")
        .replace("GH-1", f"GH-{JOINER}1")
        .split()
    )
    shown = {tuple(each.text_content().split()) for each in page.findall(".//td/code")}
    names = {tuple(escaped_words(each.budget)) for each in report.rows}
    assert shown <= names
    left = len(report.rows) - len(page.findall(".//td/code"))
    assert (f"{left} more rows" in page.text_content()) == (left > 0) == (len(report.rows) > 150)
    verdicts = Counter(
        each[4].text_content() for each in page.iterfind(".//tr") if each[0].find("code") is not None
    )
    passes = sum(count for words, count in verdicts.items() if "pass" in words)
    assert passes == sum(each.verdict is Verdict.PASS for each in report.rows)
    items = [each.text_content() for each in page.findall(".//li")]
    said = (report.problems, report.warnings, report.notes)
    assert len(items) == sum(min(len(lines), 31) for lines in said)  # thirty, and how many more


def escaped_words(name):
    shown = visible(name, 200).replace("@", f"@{JOINER}").replace("#", f"#{JOINER}")
    return shown.replace("GH-1", f"GH-{JOINER}1").split()


def commands_hold(text, report):
    assert all(COMMAND.fullmatch(line) for line in text.splitlines())
    commands = [COMMAND.fullmatch(line) for line in text.splitlines()]
    fails, undecided, warnings = kinds(report)
    errors = fails + undecided + (len(report.problems) or int(not report.rows))
    for kind, count in (("error", errors), ("warning", warnings)):
        of_kind = [each for each in commands if each["kind"] == kind]
        assert len(of_kind) == min(count, 10)
        more = [each for each in of_kind if "more in the summary" in each["data"]]
        assert [each["data"].split()[0] for each in more] == ([str(count - 9)] if count > 10 else [])
    written = {each.file for each in report.rows} | {None}
    titles = {visible(f"hessdiag: {each.name}", 200) for each in report.rows} | {"hessdiag"}
    for each in commands:
        properties = dict(pair.split("=", 1) for pair in each["properties"].split(","))
        assert properties.keys() <= {"file", "line", "title"}
        assert read_property(properties.get("file")) in written
        assert read_property(properties["title"]) in titles


def read_property(text):
    """As GitHub's runner does: %25 last."""
    for code, char in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text and text.replace(code, char)
    return text


def openmetrics_holds(text, report):
    assert text.endswith("\n# EOF\n")
    families = {each.name: each.samples for each in text_string_to_metric_families(text)}
    assert families["hessdiag_exit_code"][0].value == report.exit_code
    measured = {(each.metric, visible(each.scope)): each.measured for each in report.rows}
    values = {
        (each.labels["metric"], each.labels["scope"], each.labels["bound"]): each.value
        for each in families["hessdiag_value"]
    }
    assert values == {
        (*key, bound): getattr(interval, bound)
        for key, interval in measured.items()
        for bound in ("value", "lo", "hi")
    }
    said = {
        (each.labels["budget"], each.labels["kind"]): each.labels["hessdiag_verdict"]
        for each in families["hessdiag_verdict"]
        if each.value == 1
    }
    assert said == {(visible(each.budget), each.limit_kind): each.verdict.value for each in report.rows}
    limits = {(each.labels["budget"], each.labels["kind"]): each.value for each in families["hessdiag_limit"]}
    assert limits == {(visible(each.budget), each.limit_kind): each.threshold for each in report.rows}


def json_holds(text, report):
    def refuse(name):
        raise AssertionError(name)

    content = json.loads(text.encode(), parse_constant=refuse)
    TypeAdapter(Document).validate_python(content, strict=True)
    assert content["schema"] == 1
    assert content["exit_code"] == report.exit_code
    assert content["verdict"] == {0: "pass", 1: "fail", 3: "no verdict"}[report.exit_code]
    assert content == document(report)
    for found, each in zip(content["rows"], report.rows, strict=True):
        assert (found["budget"], found["verdict"]) == (each.budget, each.verdict.value)
        assert (found["fails"], found["undecided"]) == (report.fails(each), report.undecided(each))


def text_holds(text, report):
    text.encode()
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= 110
    assert not any(line.lstrip().startswith("::") or "##" in line for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    squeezed = "".join(text.split()).replace(JOINER, "")
    assert "".join(visible(report.headline, 300).split()) in squeezed
    said = Counter(
        found for line in lines for found in re.findall(r"([✓✗?!]) (?:pass|fail|cannot tell|no verdict)", line)
    )
    signs = {Verdict.PASS: "✓", Verdict.FAIL: "✗", Verdict.UNSURE: "?", Verdict.NONE: "!"}
    assert said == Counter(signs[each.verdict] for each in report.rows)
    assert text.count("(warning)") == sum(
        each.verdict is Verdict.FAIL and not report.fails(each) for each in report.rows
    )
    for each in report.rows:
        assert visible(each.budget).split()[0][:20] in squeezed


HOLDS = {
    "text": text_holds,
    "json": json_holds,
    "junit": junit_holds,
    "md": markdown_holds,
    "github": commands_hold,
    "openmetrics": openmetrics_holds,
}


def test_every_format_has_a_reader():
    assert HOLDS.keys() == FORMATS.keys()


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize("name", FORMATS)
def test_output_is_read_back(name, report):
    HOLDS[name](FORMATS[name](report), report)


def test_worst_annotations_are_the_ones_shown():
    shown = FORMATS["github"](failing(30))
    assert [index for index in range(30) if f"layer{index}." in shown] == list(range(21, 30))


def test_nothing_is_annotated_where_all_passed():
    assert FORMATS["github"](passing()) == ""


def test_text_is_the_terminal_without_colour():
    from rich.console import Console

    for width in (80, 100, 120):
        console = Console(width=width, force_terminal=True, color_system="standard", highlight=False)
        with console.capture() as shown:
            console.print(terminal(mixed(), width))
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.get())
        assert max(map(cell_len, plain.splitlines())) <= width
        limits = [
            line.index("≤ +15%")
            for line in plain.splitlines()[1:]
            if line.startswith("lambda_max") and "15" in line
        ]
        assert limits == [next(line.index("limit") for line in plain.splitlines() if line.startswith("budget"))]
        assert "\x1b[1;31m✗ fail" in shown.get()


def test_numbers_for_dvc_are_flat_and_plain():
    found = metrics(mixed())
    assert found["train/lambda_max"] == 0.8471
    assert found["train@layer4.*/trace"] == 5.85
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert metrics(Report()) == {}


def test_document_carries_fingerprints_and_its_schema_is_complete():
    found = document(mixed(), {"train": {"samples": 1024, "hash": b"x", "nan": math.nan}})
    assert found["fingerprints"] == {"train": {"samples": 1024, "hash": "b'x'", "nan": None}}
    assert set(check_schema()["required"]) == found.keys()


@given(st.text(), st.text(st.characters() | st.sampled_from("%:,=\r\n0A25")))
@settings(max_examples=100, deadline=None)
def test_commands_round_trip(message, title):
    command = f"::error title={escape_property(title)},line=1::{escape_data(message)}"
    assert not {"\r", "\n"} & set(command)
    properties, data = command.removeprefix("::error ").split("::", 1)
    assert [read_property(pair.split("=", 1)[1]) for pair in properties.split(",")] == [title, "1"]
    assert data.replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%") == message


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_labels_round_trip(text):
    shown = visible(text)
    page = f'# TYPE a gauge\na{{b="{escape_label(shown)}"}} 1\n# EOF\n'
    (family,) = text_string_to_metric_families(page)
    assert family.samples[0].labels["b"] == shown
    assert escape_label('\\n"\n') == '\\\\n\\"\\n'


@given(st.text(st.characters() | st.sampled_from("|`*_<>&[]()#@-+1.\\~!\n :$")))
@settings(max_examples=200, deadline=None)
def test_markdown_shows_what_was_written(text):
    words = visible(text).replace(JOINER, "").split()
    for frame in ("| x |\n| --- |\n| {} |", "x\n- {}", "### x {}"):
        page = MarkdownIt("js-default", {"html": True}).render(frame.format(escape(text)))
        shown = html.fromstring(f"<main>{page}</main>").text_content().replace(JOINER, "").split()
        assert shown == ["x", *words]


@given(st.tuples(*[st.floats(-1e12, 1e12)] * 3).map(sorted))
@settings(max_examples=200, deadline=None)
def test_interval_shown_holds_the_interval(ends):
    lo, value, hi = ends
    for percent in (False, True):
        shown = Interval(value, lo, hi).words(percent=percent, signed=percent)
        numbers = [float(each) for each in re.findall(r"-?[\d.]+(?:e[+-]?\d+)?", shown.replace("−", "-"))]
        scale = 100 if percent else 1
        if lo < hi:
            # the text is decimal, the comparison binary: one rounding of each end
            assert numbers[1] <= scale * lo + 1e-15 * abs(scale * lo)
            assert numbers[2] >= scale * hi - 1e-15 * abs(scale * hi)
            assert numbers[2] - numbers[1] <= 1.25 * scale * (hi - lo) + 4e-5 * max(map(abs, numbers))


OUTPUTS = {
    "text": ("text", None),
    "json": ("json", None),
    "github": ("github", None),
    "junit=hd.xml": ("junit", Path("hd.xml")),
    "md=a=b.md": ("md", Path("a=b.md")),
    "openmetrics=-": ("openmetrics", None),
}
REFUSED = {
    "junti=hd.xml": "did you mean junit?",
    "JUnit=hd.xml": "did you mean junit?",
    "hd.xml": "write FORMAT=FILE, with one of text, json",
    "": "no format",
    "=hd.xml": "no format",
    "junit": "write junit=FILE",
    "json=": "write json=FILE",
    "a\nb" * 1000 + "=x": "no format",
}


@pytest.mark.parametrize(("asked", "expected"), OUTPUTS.items())
def test_output_is_understood(asked, expected):
    assert parse_output(asked) == expected


@pytest.mark.parametrize(("asked", "said"), REFUSED.items())
def test_output_is_refused_in_one_line(asked, said):
    with pytest.raises(UsageError) as found:
        parse_output(asked)
    assert said in str(found.value)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 300


def test_writers_need_no_torch():
    code = "import hessdiag.check.writers, sys; assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def changed(name, attribute, value, module=None):
    """The writer ``name`` with one name of its module replaced."""

    def make(monkeypatch):
        monkeypatch.setattr(import_module(f"hessdiag.check.writers.{module or name}"), attribute, value)
        return FORMATS[module_format(module or name)]

    return make


def module_format(module):
    return {"markdown": "md", "document": "json", "table": "text"}.get(module, module)


def output(name, *pairs):
    """The writer ``name`` with its text changed."""

    def make(monkeypatch):
        def write(report):
            text = FORMATS[name](report)
            for old, new in pairs:
                text = re.sub(old, new, text, flags=re.DOTALL)
            return text

        return write

    return make


def as_it_is(text, most=None):
    return text


BROKEN = {
    "a control character in XML": ("junit", changed("junit", "visible", as_it_is)),
    "a case without a class": ("junit", output("junit", (' classname="[^"]*"', ""))),
    "an unsure limit counted as passed": ("junit", output("junit", ("<skipped[^>]*/>", ""))),
    "a failure counted as skipped": (
        "junit",
        output("junit", ("<failure(.*?)</failure>", r"<skipped\1</skipped>")),
    ),
    "two cases of one name": ("junit", changed("junit", "_tell_apart", lambda cases: None)),
    "properties inside a case": (
        "junit",
        output("junit", ("(<testcase[^>]*>)", r"\1<properties><property name='a' value='b'/></properties>")),
    ),
    "a bracket of CDATA": ("junit", output("junit", ("]]&gt;", "]]>"))),
    "a name unescaped in Markdown": ("md", changed("markdown", "escape", as_it_is)),
    "a mention": ("md", output("md", (JOINER, ""))),
    "HTML in Markdown": ("md", output("md", ("&#60;", "<"), ("&#62;", ">"))),
    "a pipe in a cell": ("md", output("md", ("&#124;", "|"))),
    "an unsure limit shown as passed": ("md", output("md", (r"\? cannot tell", "✓ pass"))),
    "a summary too long": ("md", changed("markdown", "MOST_ROWS", 10_000_000)),
    "no room for what follows the table": ("md", changed("markdown", "MOST_ROWS", 900_000)),
    "rows dropped in silence": ("md", output("md", ("[0-9]+ more rows.*?[.]", ""))),
    "eleven annotations": ("github", changed("github", "MOST", 11)),
    "one command inside another": ("github", changed("github", "visible", as_it_is)),
    "a colon in a property": ("github", output("github", ("%3A", ":"))),
    "a comma in a property": ("github", output("github", ("%2C", ","))),
    "a percent sign unescaped": ("github", output("github", ("%25", "%"))),
    "a line end in the file's name": ("github", output("github", ("%0A", "\n"))),
    "a warning as an error": ("github", output("github", ("::warning", "::error"))),
    "no EOF": ("openmetrics", output("openmetrics", ("# EOF\n$", ""))),
    "a quote in a label": ("openmetrics", changed("openmetrics", "escape_label", as_it_is)),
    "a line end in a label": ("openmetrics", changed("openmetrics", "visible", as_it_is)),
    "digits lost": ("openmetrics", changed("openmetrics", "_number", "{:.2f}".format)),
    "a fail told as pass": ("openmetrics", output("openmetrics", ('verdict="fail"', 'verdict="pass"'))),
    "infinity in JSON": ("json", changed("document", "as_json", lambda value: value)),
    "a surrogate in JSON": ("json", output("json", (r"\\ud800", "\ud800"))),
    "a verdict unknown": ("json", output("json", ('"cannot tell"', '"pass"'))),
    "markup in the terminal": ("text", output("text", (r"\[/?bold[^]]*\]", ""))),
    "an escape in the terminal": ("text", changed("table", "visible", as_it_is)),
    "a command in the terminal": ("text", output("text", (JOINER, ""))),
    "a table too wide": ("text", changed("table", "WIDTH", 130)),
    "a warning not marked": ("text", output("text", (r"\(warning\)", ""))),
    "a verdict by colour alone": ("text", output("text", (r"[✗✓?!] (pass|fail|cannot tell|no verdict)", ""))),
}


@pytest.mark.parametrize(("name", "make"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(name, make, monkeypatch):
    write = make(monkeypatch)

    def caught(report):
        try:
            HOLDS[name](write(report), report)
        except Exception:  # a reader may refuse in its own way
            return True
        return False

    assert any(map(caught, REPORTS.values()))
