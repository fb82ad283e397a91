"""Promise: every block of every page runs, and every number, measure, warning and verb has a page.

A console block is run in this process; the words of its output must be among those that come out ("…" stands for
what is left out), or be the same where the block is marked exact. Numbers are not compared: they differ between
machines in the last digits. Python blocks of a page run in order; one that begins with "# name.py" is a file.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
import yaml

import hessdiag
from hessdiag import errors, pages
from hessdiag.check.comparable import SUBJECT
from hessdiag.check.config import load_config
from hessdiag.cli import VERBS, reference
from hessdiag.gap.registry import FAMILIES, built_in
from hessdiag.present import page as report_page
from hessdiag.results import QUANTITIES
from tests.command import call

PACKAGE = Path(hessdiag.__file__).parent
DOCS = PACKAGE / "docs"
FILES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(?P<language>\w+)(?P<exact> exact)?\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
KNOWN = {"console", "python", "toml", "yaml", "bash"}
WORD = re.compile(r"[A-Za-z_]{3,}")
FIXTURE = "def test_"  # a block that pytest would collect: its fixture is tested in test_pytest_fixture_gates
RENAMED = {"gradient": "gradient of the loss"}  # the name of a number, too


@dataclass(frozen=True)
class Command:
    """A line of a console block with what is shown below it."""

    words: list[str]
    shown: str
    code: int = 0


def commands(body):
    """The commands of a console block; ``echo $?`` tells the exit code of the one before."""
    found = []
    for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        if line == "echo $?":
            found[-1] = Command(found[-1].words, found[-1].shown, int(shown))
        else:
            found.append(Command(shlex.split(line), shown))
    return found


def missing(shown, printed):
    """Words that are shown and were not printed."""
    return set(WORD.findall(shown)) - set(WORD.findall(printed))


def run_console(body, exact, demo=None):
    for command in commands(body):
        assert command.words[0] == "hessdiag", command.words
        recorded = command.words[1:] == ["demo"] and demo is not None
        code, out, err = demo if recorded else call(*command.words[1:])
        assert code == command.code, (command.words, err)
        if exact:
            assert (err if code else out) == command.shown
        else:
            assert missing(command.shown, out + err) == set()


def run_page(text, folder, demo=None):
    """Every block of a page, in order, in ``folder``."""
    names = {"__name__": "page"}
    for block in BLOCK.finditer(text):
        language, body = block["language"], block["body"]
        file = re.match(r"# (\w+\.py)\n", body)
        if language == "console":
            run_console(body, block["exact"], demo)
        elif language == "toml":
            table = tomllib.loads(body)["tool"]["hessdiag"]
            (folder / "shown.toml").write_text(body if "schema" in table else f"{HEADER}\n{body}")
            (folder / "shown.toml").rename(folder / "pyproject.toml")
            assert load_config(folder / "pyproject.toml").budgets
            (folder / "pyproject.toml").unlink()
        elif language == "yaml":
            assert yaml.safe_load(body)
        elif language == "bash":  # for a cluster: its grammar only
            subprocess.run(["bash", "-n"], input=body, text=True, check=True)
        elif file and FIXTURE not in body:
            (folder / file[1]).write_text(body)
        elif language == "python":
            code = compile(body, "page.md", "exec")
            if FIXTURE not in body:
                exec(code, names)
        assert language in KNOWN


HEADER = '[tool.hessdiag]\nschema = 1\nproblem = "hessdiag.sources.digits:problem"'


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of one demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    before = Path.cwd()
    os.chdir(folder)
    try:
        printed = call("demo")
    finally:
        os.chdir(before)
    return folder, printed


@pytest.fixture
def place(demo, tmp_path, monkeypatch):
    """A folder of a page's own, with the demo's files in it."""
    shutil.copytree(demo[0] / "hessdiag-demo", tmp_path / "hessdiag-demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(tmp_path))]:
        del sys.modules[name]


WITH_BLOCKS = [file for file in FILES if BLOCK.search(file.read_text())]


@pytest.mark.parametrize("file", WITH_BLOCKS, ids=lambda file: file.stem)
def test_every_block_runs(file, place, demo):
    run_page(file.read_text(), place, demo[1])


def test_no_fence_is_left_out():
    for file in FILES:
        text = file.read_text()
        assert text.count("```") == 2 * len(BLOCK.findall(text)), file.name


def anchors(file):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", file.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def dead_links(text, folder):
    found = []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", BLOCK.sub("", text)):
        name, _, anchor = target.partition("#")
        file = folder / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


def test_no_link_is_dead():
    assert {file.name: dead for file in FILES if (dead := dead_links(file.read_text(), DOCS))} == {}


def test_the_index_names_every_page_and_no_other():
    listed = {page.file for page in pages.pages().values() if not page.heading}
    assert listed | {pages.INDEX} == {file.name for file in FILES}


def unexplained(names):
    """Names without a page or section."""
    found = []
    for name in names:
        try:
            pages.find(name)
        except errors.UsageError:
            found.append(name)
    return found


def findings():
    """What a doctor's line may be called: the second argument of every Finding, and the self-test's faults."""
    found = set()
    for path in (PACKAGE / "engine").rglob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Finding", "Fault"):
                named = node.args[1 if node.func.id == "Finding" else 0]
                if isinstance(named, ast.Name | ast.Constant):
                    found.add(named.value if isinstance(named, ast.Constant) else constants[named.id])
    return found


NEVER_SHOWN = {"ScarceError", "NewerSchemaError"}  # shown as an OptionError; caught


def refusals():
    """The classes of refusals, of every room."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any("Error" in ast.unparse(base) for base in node.bases):
                found.add(node.name)
    return found - {"HessdiagError", *NEVER_SHOWN}


def test_everything_has_a_page():
    assert unexplained(QUANTITIES) == []
    assert unexplained(built_in()) == []
    assert unexplained(VERBS) == []
    seen = {RENAMED.get(name, name) for name in findings()}
    assert len(seen) > 20
    assert unexplained(seen) == unexplained(refusals()) == []
    incomparable = pages.text(pages.find("incomparable"))
    assert [field for field in SUBJECT if f"`{field}`" not in incomparable] == []


PARTS = ("Formula", "How it is computed", "What its interval means", "When it misleads", "What to do")


def test_a_page_of_a_number_says_what_a_reader_must_know():
    for page in pages.pages().values():
        if page.group.startswith("Numbers"):
            headings = re.findall(r"^## (.+)$", pages.text(page), re.MULTILINE)
            assert tuple(headings) == PARTS, page.name
            assert 100 < len(pages.meaning(page.name)) < 500


def test_a_page_of_a_verb_shows_it():
    for page in pages.pages().values():
        if page.group == "Verbs":
            assert "$ hessdiag" in pages.text(page), page.name


def test_every_family_is_explained():
    for family in FAMILIES:
        assert "mislead" in pages.text(pages.find(family)), family


def outdated(written):
    return [file for file, text in written.items() if pages.source(file, comments=True) != text]


def test_generated_pages_are_current():
    assert outdated(reference.written()) == [], "python -m hessdiag.cli.reference"


def test_pages_are_the_same_under_any_spelling():
    for name in ("Second Opinion", "second-opinion", "second_opinion", "SECONDOPINION"):
        assert pages.find(name).name == "second opinion"
    assert pages.find("ws-upper").file == "ws_bounds.md"


def without_page(kind=errors.HessdiagError):
    """Kinds of refusals that name a page which does not exist."""
    mine = {kind.__name__} if kind.page and kind.page not in pages.pages() else set()
    return mine.union(*map(without_page, kind.__subclasses__()))


def test_a_refusal_names_a_page_that_exists(tmp_path, monkeypatch):
    assert without_page() == set()
    code, _, err = call("analyze", f"{PACKAGE}/sources/digits.py:problem", "--probes", "1")
    assert code == 2 and err.endswith(" (more: hessdiag explain intervals)\n"), err
    monkeypatch.setattr(errors.MeasurementError, "page", "nowhere")
    assert without_page() >= {"MeasurementError"}


def test_an_unknown_name_is_one_line():
    code, out, err = call("explain", "lamda_max")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "did you mean lambda_max?" in err
    assert "did you mean" not in call("explain", "qqqqqqqq")[2]
    assert call("explain") == call("explain", "--list")


def test_every_name_can_be_shown_in_80_columns():
    for page in pages.pages().values():
        if page.file not in ("options.md", "configuration.md"):  # their tables are long
            code, out, _ = call("explain", *page.name.split())
            assert code == 0
            assert max(map(len, out.splitlines())) <= 80, page.name
            assert "](" not in out and "<!--" not in out and out.endswith("\n")


def test_the_list_has_every_name():
    code, out, _ = call("explain", "--list")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert [name for name in pages.pages() if f"  {name} " not in out] == []


HEAVY = "torch", "numpy", "scipy", "pandas", "matplotlib"
LIMIT = 0.3  # seconds of CPU: less than importing torch takes


def test_explaining_needs_no_torch():
    code = f"""
import sys, time
from hessdiag import cli
code = cli.run(["explain", "path_norm"])
print(*({{*{HEAVY!r}}} & set(sys.modules)), code, time.process_time(), sep="|")
"""
    seen = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        *heavy, exit_code, seconds = done.stdout.splitlines()[-1].split("|")
        assert ([one for one in heavy if one], exit_code) == ([], "0")
        seen.append(float(seconds))
    assert min(seen) < LIMIT


def test_no_page_has_a_path_of_a_machine_or_a_placeholder():
    for file in FILES:
        text = file.read_text()
        assert not re.search(r"/(tmp|home|root|work|Users)/|OWNER|HOST\b", text), file.name


def test_quotes_are_plain_text():
    for name in QUANTITIES:
        assert not re.search(r"[`*\[\]]", pages.meaning(name)), name


LINKED = re.compile(r'href="#(meaning-[^"]+)"><code>([^<]+)</code>')


def unlinked(html, names):
    """Names of a report that do not lead to the text of their page."""
    text = unescape(html)
    led = {name for target, name in LINKED.findall(html) if f'id="{target}"' in html}
    return [name for name in names if name not in led or pages.meaning(name) not in text]


def test_terms_of_a_report_lead_to_the_text_of_their_page(place):
    runs = {name: hessdiag.load_run(place / "hessdiag-demo" / name) for name in ("plain", "flat")}
    for shown in (runs, {"plain": runs["plain"]}):
        html = report_page(shown)
        assert unlinked(html, list(runs["plain"].metrics)) == []
        assert unlinked(html.replace("href", "name"), ["trace"]) == ["trace"]
        assert unlinked(html.replace("adds negative", "adds"), ["trace"]) == ["trace"]


def page(body):
    return f"# page\n\n```{body}\n```\n"


BROKEN = {
    "a command that fails": page("console\n$ hessdiag explain nothing_at_all"),
    "an exit code that is another": page("console\n$ hessdiag schema\n$ echo $?\n3"),
    "output that does not come": page("console\n$ hessdiag schema\nnever printed"),
    "output that is not the same": page("console exact\n$ hessdiag schema\n{"),
    "a command of another program": page("console\n$ rm x"),
    "python that raises": page("python\n1 / 0"),
    "a budget that is none": page("toml\n[tool.hessdiag.check.budgets]\nlambda = { max = 1 }"),
    "a language that nobody runs": page("json\n{}"),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ZeroDivisionError, errors.HessdiagError)):
        run_page(text, tmp_path)


def test_this_promise_would_notice_what_is_missing():
    assert dead_links("[a](nowhere.md) [b](trace.md#nothing)", DOCS) == ["nowhere.md", "trace.md#nothing"]
    assert unexplained(["a new number"]) == ["a new number"]
    assert outdated({"options.md": "old"}) == ["options.md"]
    assert missing("lambda_max\n…", "trace") == {"lambda_max"}
    assert json.loads(call("schema")[1])
