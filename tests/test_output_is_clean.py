"""Promise: stdout holds results and nothing else, and no name, file or error makes a reader obey it. (15 s)

A terminal obeys escape sequences, a build server lines that begin with ``::``, a spreadsheet cells that begin
with ``=``; and a program that reads ``--json`` chokes on one line of a user's subprocess.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from hessdiag import cli, shown
from hessdiag.cli import output, stdout
from hessdiag.errors import LoadError, UsageError
from hessdiag.shown import JOINER, csv_text, inert, visible
from tests.command import call

FACTORY = """
import ctypes, os, subprocess, sys, threading, time, atexit, logging, warnings
import torch
from torch import nn
import hessdiag

def shout(what):
    print(f"NOISE print {what}")
    print(f"NOISE dunder {what}", file=sys.__stdout__)
    os.write(1, f"NOISE write {what}\\n".encode())
    ctypes.CDLL(None).puts(f"NOISE puts {what}".encode())
    subprocess.run(["echo", f"NOISE echo {what}"], check=True)

class Loud(nn.Linear):
    def forward(self, x):
        if not torch._C._functorch.maybe_current_level() and os.environ.get("LOUD"):
            os.write(1, b"NOISE forward\\n")
        return super().forward(x)

def data(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(200, 3, generator=generator), torch.randint(2, (200,), generator=generator)

def quiet():
    torch.manual_seed(0)
    return hessdiag.Problem(nn.Linear(3, 2), {"train": data(0), "test": data(1)}, criterion="cross_entropy")

def loud():
    shout("factory")
    problem = quiet()
    torch.manual_seed(0)
    return hessdiag.Problem(Loud(3, 2), problem.data, criterion="cross_entropy")

def louder():
    shout("import")
    warnings.warn_explicit("torch warns of itself", FutureWarning, "jit.py", 1, module="torch.jit._script")
    warnings.warn("NOISE warning of mine", FutureWarning)
    def go_on():
        while True:
            print("NOISE thread", flush=True)
            os.write(1, b"NOISE thread write\\n")
            time.sleep(0.001)
    threading.Thread(target=go_on, daemon=True).start()
    atexit.register(lambda: print("NOISE at exit"))
    return loud()

class Own(BaseException):
    pass

def raises(kind):
    raise {"own": Own("no luck"), "exit": SystemExit(0), "generator": GeneratorExit(), "eof": EOFError("short"),
           "pipe": BrokenPipeError("worker"), "click": __import__("click").exceptions.Exit(1)}[kind]

class Raising(nn.Linear):
    def forward(self, x):
        raises(self.kind)

def raising(kind="own"):
    model = Raising(3, 2)
    model.kind = kind
    return hessdiag.Problem(model, {"train": data(0)}, criterion="cross_entropy")
"""
SMALL = ("--samples", "8", "--quantities", "trace")
HOSTILE = (
    "one\n::error file=a.py::owned",
    "two\n  ::set-output name=x::y\x1b[31m",
    "=cmd|'x'!A1",
    "+1+2",
    "@SUM(1)",
    "##vso[task.complete]\u202e",
)
COMMAND = re.compile(r"^\s*::|##\[|##vso", re.MULTILINE)


def save(path: str) -> None:
    model = nn.Linear(3, 2)
    torch.save(model.state_dict(), path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("p.py").write_text(FACTORY)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    root = Path(__file__).parent.parent
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **more}


# --------------------------------------------------------------------------------------------- nothing but results


def verbs() -> dict[str, list[str]]:
    for name in ("a.pt", "b.pt"):
        torch.manual_seed(ord(name[0]))
        save(name)
    Path("hessdiag.toml").write_text(
        'schema = 1\nproblem = "p.py:loud"\ncheckpoint = "a.pt"\n[run]\nsamples = 8\n'
        "[check.budgets]\ntrace = { max = 100.0 }\n"
    )
    return {
        "analyze": ["analyze", "p.py:loud", "-c", "a.pt", *SMALL, "--json"],
        "track": ["analyze", "p.py:loud", "-c", "?.pt", *SMALL, "--track", "--json"],
        "doctor": ["doctor", "p.py:loud", "--samples", "8", "--json"],
        "compare": ["compare", "a.pt", "b.pt", "--problem", "p.py:loud", *SMALL, "--json"],
        "gap": ["gap", "p.py:loud", "-c", "?.pt", "--samples", "8", "--measures", "weight_norm", "--json"],
        "shift": ["shift", "p.py:loud", "-c", "?.pt", "--tests", "covariate", "--json"],
        "check": ["check", "-o", "json"],
    }


ALL = """
import json, os, sys
from hessdiag import cli
for name, arguments in json.loads(sys.argv[1]).items():
    os.dup2(os.open(f"{name}.out", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
    print(name, cli.run(arguments), file=sys.stderr)
    os.write(1, b"the end")
"""


def json_is_one_document(folder: Path) -> None:
    """Of every verb that has it, over real descriptors; and afterwards stdout is given back."""
    given = verbs()
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(given)], env=environment(LOUD="1"), capture_output=True, text=True
    )
    for name in given:
        text = Path(f"{name}.out").read_text()
        assert text.endswith("the end"), (name, text, done.stderr[-2000:])
        assert isinstance(json.loads(text.removesuffix("the end")), dict), name
    for way in ("print", "dunder", "write", "puts", "echo"):
        assert f"NOISE {way} factory" in done.stderr
    assert "NOISE forward" in done.stderr
    assert done.stdout == ""


def test_json_is_one_document(folder):
    json_is_one_document(folder)


def test_a_thread_that_goes_on_is_no_result(folder):
    command = [sys.executable, "-m", "hessdiag", "analyze", "p.py:louder", *SMALL, "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trace" in json.loads(done.stdout)["metrics"]
    assert "torch warns of itself" not in done.stderr and "NOISE warning of mine" in done.stderr
    # in whatever order: a thread writes into the lines of others
    assert all(text in done.stderr for text in ("NOISE thread\n", "NOISE thread write", "NOISE at exit"))


# ------------------------------------------------------------------------------------------------ streams that end

ENDS = {
    "closed stdout": (">&-", 4, "stdout is closed"),
    "closed stderr": ("2>&- >out.txt", 0, ""),
    "full stderr": ("2>/dev/full >out.txt", 0, ""),
    "stderr that is no place to write": ("2</dev/null >out.txt", 0, ""),
    "a reader of the notes that has gone": ("2> >(true) >out.txt", 0, ""),
    "both closed": (">&- 2>&-", 4, ""),
    "a reader that has gone": ("| true; exit ${PIPESTATUS[0]}", 0, ""),
    "a full device": (">/dev/full", 4, "No space left"),
}


@pytest.mark.parametrize("name", ENDS)
def test_streams_that_end(folder, name):
    redirection, code, said = ENDS[name]
    command = f"{sys.executable} -m hessdiag analyze p.py:quiet {' '.join(SMALL)} {redirection}"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert said in done.stderr
    if said:
        assert ("samples in" in done.stderr) == (name == "a full device")  # else nothing was measured
    if "out.txt" in redirection:
        assert "trace" in Path("out.txt").read_text()


def test_paths_that_the_locale_cannot_spell(folder):
    """Spaces and foreign letters in a relative path, where the system says that all text is ASCII."""
    place = Path("mit Ordner é 漢")
    place.mkdir()
    shutil.copy("p.py", place / "p.py")
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "dumb", "COLUMNS": "40"}
    command = [sys.executable, "-m", "hessdiag", "analyze", f"{place}/p.py:quiet", *SMALL, "-o", f"{place}/out"]
    done = subprocess.run(command, env=environment() | odd, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"trace" in done.stdout and done.stdout.isascii()
    assert json.loads((place / "out" / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["own", "exit", "generator", "eof", "pipe", "click"])
def test_what_a_factory_or_model_raises_is_no_exceeded_limit(folder, kind):
    code, out, err = call("analyze", "p.py:raises", "-P", f"kind={kind}")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "raised" in err
    code, out, err = call("analyze", "p.py:raising", "-P", f"kind={kind}", *SMALL)
    assert code in (2, 4) and out == "", err
    assert err.splitlines()[-1].startswith("hessdiag: ") and "Traceback" not in err
    code, _, err = call("doctor", "p.py:raising", "-P", f"kind={kind}")
    assert code in (2, 4), err


# ----------------------------------------------------------------------------------------- names that are commands


def hostile_names_command_nothing(folder: Path) -> None:
    """In the output of every verb that shows a checkpoint's name, on stdout and on stderr."""
    for name in HOSTILE:
        save(f"{name}.pt")
    Path("cut\n::error::owned\x1b[2J.pt").write_bytes(b"no checkpoint")
    shown = 0
    for arguments in (
        ("gap", "p.py:quiet", "-c", "*.pt", "--samples", "8", "--measures", "weight_norm", "--csv", "gap.csv"),
        ("analyze", "p.py:quiet", "-c", "*.pt", *SMALL, "--track", "-o", "track"),
        ("shift", "p.py:quiet", "-c", "*.pt", "--tests", "covariate", "-o", "shift"),
        *(("analyze", "p.py:quiet", "-c", f"{name}.pt", *SMALL, "-o", "out") for name in HOSTILE),
        ("analyze", "p.py:quiet", "-c", "cut\n::error::owned\x1b[2J.pt", *SMALL, "--debug"),
        ("analyze", "p.py:quiet", "-c", "none\n::error::owned\x1b[2J.pt"),
        ("doctor", "p.py:quiet", "-c", f"{HOSTILE[1]}.pt"),
        ("compare", f"{HOSTILE[0]}.pt", f"{HOSTILE[1]}.pt", "--problem", "p.py:quiet", *SMALL),
    ):
        code, out, err = call(*arguments)
        assert code in (0, 4), err
        for text in (out, err):
            assert "\x1b" not in text and "\u202e" not in text, arguments
            assert not COMMAND.search(text), (arguments, COMMAND.search(text), text)
        shown += "owned" in out + err
    assert shown >= 6
    for file in ("gap.csv", "track/trajectory.csv", "shift/shift.csv"):
        cells = [
            cell for row in csv.reader(io.StringIO(Path(file).read_bytes().decode(), newline="")) for cell in row
        ]
        formulas = [cell for cell in cells if cell[:1] in {"=", "+", "-", "@"} and not number(cell)]
        assert formulas == [], file
        assert "'=cmd|'x'!A1" in cells, file
    for page in ("out/report.html", "track/report.html", "shift/shift.html"):
        assert "\x1b" not in Path(page).read_text()


def number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_hostile_names_command_nothing(folder):
    hostile_names_command_nothing(folder)


def test_what_a_file_says_of_itself_is_shown_only(folder):
    """The byte order of a zip checkpoint is any text."""
    save("a.pt")
    with zipfile.ZipFile("a.pt") as old, zipfile.ZipFile("b.pt", "w") as new:
        for entry in old.namelist():
            text = b"\x1b[31m\n::error::big" if entry.endswith("byteorder") else old.read(entry)
            new.writestr(entry, text)
    code, out, err = call("analyze", "p.py:quiet", "-c", "b.pt", *SMALL)
    assert "\x1b" not in out + err and not COMMAND.search(out + err)
    assert code in (0, 4)


def errors_are_shown_only() -> None:
    """From Python too, where a traceback goes to the terminal."""
    error = LoadError("no such file a\n\x1b]0;owned\x07.pt")
    assert str(error) == "no such file a↵\N{REPLACEMENT CHARACTER}]0;owned\N{REPLACEMENT CHARACTER}.pt"
    assert str(UsageError("plain ± text, 漢字")) == "plain ± text, 漢字"


def test_errors_are_shown_only():
    errors_are_shown_only()


# ---------------------------------------------------------------------------------------------------- the function


def test_texts_are_made_inert() -> None:
    assert visible("a\r\nb\x1b[0m\x85\u2028\ud800c") == "a↵b�[0m���c"
    assert visible("a\nb\tc", lines=True) == "a\nb�c"
    assert visible("abcdef", 4) == "abc…"
    for text in ("::error::x", "  ::x", "a\n\t::x", "\x1b[1m::x", "\x1b[1m  \x1b[0m::x"):
        assert inert(text) != text and inert(text).replace(JOINER, "") == text
        assert not re.search(r"^(\s|\x1b\[\d*m)*::", inert(text), re.MULTILINE)
    assert inert("##[error]x ##vso[x]") == f"#{JOINER}#[error]x #{JOINER}#vso[x]"
    for text in ("run/last.pt::model", "a: b", "## title", "http://x", "std::vector"):
        assert inert(text) == text


def test_tables_hold_no_formulas() -> None:
    frame = pd.DataFrame(
        {
            "=name": ["=1+1", "+x", "-x", "@x", "\tx", "plain", "-1.5", "", None],
            "value": [-1.5, 2e-300, float("nan"), 1, 2, 3, 4, 5, 6],
            "whole": range(-4, 5),
            "mixed": [-1.5, "=x", None, True, 3, "-inf", -7, "a\nb", "'="],
        }
    )
    text = csv_text(frame)
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["'=name", "value", "whole", "mixed"]
    assert [row[0] for row in rows[1:]] == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", "plain", "-1.5", "", ""]
    assert [row[1] for row in rows[1:4]] == ["-1.5", "2e-300", ""]
    assert [row[2] for row in rows[1:]] == [str(n) for n in range(-4, 5)]
    assert [row[3] for row in rows[1:]] == ["-1.5", "'=x", "", "True", "3", "-inf", "-7", "a\nb", "'="]
    numbers = frame[["value", "whole"]]
    assert csv_text(numbers) == numbers.to_csv(index=False, lineterminator="\n")
    assert csv_text(frame.head(0)) == "'=name,value,whole,mixed\n"


def test_drawn_tables_are_made_inert() -> None:
    """The last line of defence: a text that nobody had cleaned, in a cell, folded, and our own colours kept."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    table.add_column(Text("::error::head\x1b[31m"))
    table.add_row(Text("x" * 18 + " ::error::folded\x07\n::error::next", style="bold"))
    with pytest.MonkeyPatch.context() as patch:
        shown_there = io.StringIO()
        patch.setattr(output, "results", lambda: shown_there)
        patch.setattr(output, "result", lambda text, nl: shown_there.write(text))
        output.draw(lambda _: table, width=20)
    text = shown_there.getvalue()
    assert "error::next" in text and "folded" in text
    assert "\x1b" not in text and "\x07" not in text and not COMMAND.search(text)


# ------------------------------------------------------------------------------------------------ would be noticed


def as_it_is(text, *_, **__):
    return text


BROKEN = {
    "names as they are in notes": (stdout, "visible", as_it_is, hostile_names_command_nothing),
    "names as they are in tables": (output, "visible", as_it_is, test_drawn_tables_are_made_inert),
    "lines that begin with ::": (output, "inert", as_it_is, test_drawn_tables_are_made_inert),
    "no formula is seen": (shown, "FORMULA", (), test_tables_hold_no_formulas),
    "numbers taken for formulas": (shown, "_cell", lambda v: f"'{v}", test_tables_hold_no_formulas),
    "every :: is taken for a command": (shown, "COMMAND", re.compile("(:)(?=:)"), test_texts_are_made_inert),
    "errors as they are": (LoadError, "__str__", Exception.__str__, errors_are_shown_only),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, folder, monkeypatch):
    owner, attribute, broken, promise = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        promise(*([folder] if promise.__code__.co_argcount else []))


def test_a_verb_that_does_not_reserve_would_be_noticed(folder, monkeypatch):
    """In one process, by the one way that a test without descriptors sees."""
    arguments = verbs()
    for name in ("analyze", "doctor", "compare"):
        assert json.loads(call(*arguments[name])[1])
        with monkeypatch.context() as patch:
            patch.setattr(f"hessdiag.cli.{name}.reserve", lambda: None)
            with pytest.raises(json.JSONDecodeError):
                json.loads(call(*arguments[name])[1])
    assert cli.stdout.results() is sys.stdout
    assert shutil.which("bash")
