"""Promise: a run's folder holds the files of one run, at every moment and whatever kills the process. (20 s)

Files of other names are the user's and stay; a full disk leaves the earlier run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from hessdiag import files, folders
from hessdiag.cli import gap as gap_verb
from hessdiag.cli import output
from hessdiag.errors import OutputError
from hessdiag.folders import complete, write_together
from hessdiag.gap.report import GapReport
from hessdiag.results import load_run
from hessdiag.results.analysis import SAVED
from hessdiag.shown import csv_text
from tests import command, example_gap
from tests import example_analysis as example

OWNED = ("run.json", "metrics.csv", "layers.csv", "density.svg", "report.html")
LARGE, SMALL = OWNED, ("run.json", "metrics.csv", "report.html")
KILLED = 9


def run(word: str, names: tuple[str, ...] = LARGE) -> dict[str, str]:
    return {name: f"{word} of {len(names)}\n" * 50 for name in names}


def seen(folder: Path) -> dict[str, str]:
    """What a user sees: no hidden names."""
    return {p.name: p.read_text() for p in folder.iterdir() if p.name[0] != "." and p.is_file()}


def of_one_run(folder: Path) -> str:
    """Which run the files are of; none of them in part."""
    found = {name: text for name, text in seen(folder).items() if name in OWNED}
    words = {text.split()[0] for text in found.values()}
    assert len(words) <= 1, f"files of {words} side by side"
    for name, text in found.items():
        word, _, count = text.split("\n")[0].split()
        assert text == run(word, LARGE if int(count) == len(LARGE) else SMALL)[name], f"{name} is half-written"
    return words.pop() if words else ""


def whole(folder: Path, *words: str) -> None:
    """After the next start: all files of one of these runs, and nothing hidden."""
    folders.complete(folder)
    word = of_one_run(folder)
    assert word in words
    files_of = {name: text for name, text in seen(folder).items() if name in OWNED}
    assert files_of in (run(word, LARGE), run(word, SMALL))


# -------------------------------------------------------------------------------------- a process dies at any call


CALLS = ("rename", "fsync", "open", "mkdir", "rmdir", "unlink", "close", "replace")


def die(at: int, *, after: bool) -> None:
    """From now on the system call number ``at`` ends this process, before or after it is made."""
    count = iter(range(1, 100_000))

    def dying(function):
        def call(*given: object, **named: object) -> object:
            number = next(count)
            if number == at and not after:
                os._exit(KILLED)
            result = function(*given, **named)
            if number == at:
                os._exit(KILLED)
            return result

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def dies_at(folder: Path, at: int, *, after: bool, contents: dict[str, str], write=write_together) -> bool:
    """Write in a child that ends at its call number ``at``; whether it came so far."""
    child = os.fork()
    if not child:
        die(at, after=after)
        write(folder, contents, OWNED)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) in (0, KILLED)
    return os.waitstatus_to_exitcode(status) == KILLED


def every_moment_is_one_run(tmp: Path, write=None) -> None:
    """An end before and after each system call, to fewer files and to more; then a second end on the way."""
    write = write or folders.write_together
    folder, at, deaths = tmp / "out", 1, 0
    write_together(folder, run("first"), OWNED)
    (folder / "notes.txt").write_text("mine")
    died = True
    while died:
        died = False
        for after in (False, True):
            names = SMALL if (at + after) % 2 else LARGE
            before = of_one_run(folder)
            word = f"run{at}{after}"
            if dies_at(folder, at, after=after, contents=run(word, names), write=write):
                died, deaths = True, deaths + 1
                of_one_run(folder)
                dies_at(folder, at % 7 + 1, after=after, contents=run("again", names), write=write)
                of_one_run(folder)
            whole(folder, before, word, "again")
            assert seen(folder)["notes.txt"] == "mine"
        at += 1
    assert deaths > 20
    write_together(folder, run("last"), OWNED)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_every_moment_is_one_run(tmp_path):
    every_moment_is_one_run(tmp_path)


# ---------------------------------------------------------------------------------------- killed at random moments


def killed_at_random(folder: Path, seconds: float, word: str) -> None:
    """A process that writes run after run, and is killed (kill -9) after so long."""
    child = os.fork()
    if not child:
        number = 0
        while True:
            number += 1
            folders.write_together(folder, run(f"{word}.{number}", SMALL if number % 2 else LARGE), OWNED)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def thirty_kills_leave_one_run(tmp: Path) -> None:
    folder, chance = tmp / "out", random.Random(0)
    write_together(folder, run("first"), OWNED)
    for kill in range(30):
        killed_at_random(folder, chance.uniform(0.002, 0.05), f"kill{kill}")
        of_one_run(folder)
        if kill % 2:  # else the next process finds what this one left
            complete(folder)
            whole(folder, of_one_run(folder))
    write_together(folder, run("last"), OWNED)
    whole(folder, "last")
    assert sorted(p.name for p in folder.iterdir()) == sorted(OWNED)


def test_thirty_kills_leave_one_run(tmp_path):
    thirty_kills_leave_one_run(tmp_path)


def test_two_processes_take_turns(tmp_path):
    folder = tmp_path / "out"
    children = []
    for word in ("one", "two"):
        child = os.fork()
        if not child:
            for number in range(20):
                write_together(folder, run(f"{word}.{number}", SMALL if number % 2 else LARGE), OWNED)
            os._exit(0)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    whole(folder, "one.19", "two.19")


# ------------------------------------------------------------------------------------------ what cannot be written


def a_full_disk_leaves_the_earlier_run(tmp: Path) -> None:
    """Wherever the room ends, and whatever the system refuses: one line, the earlier files, nothing hidden."""
    folder, refused = tmp / "out", 0
    write_together(folder, run("before"), OWNED)
    for call, number in (("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("rename", errno.EACCES)):
        for room in range(20):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, call, failing(getattr(os, call), room, number))
                try:
                    folders.write_together(folder, run("after", SMALL), OWNED)
                except OutputError as error:
                    refused += 1
                    assert "\n" not in str(error) and os.strerror(number) in str(error) and "-o" in str(error)
            word = of_one_run(folder)
            if word == "before":
                assert seen(folder) == run("before")
                assert [p.name for p in folder.iterdir() if p.name[0] == "."] == []
            complete(folder)
            assert seen(folder) in (run("before"), run("after", SMALL))
            write_together(folder, run("before"), OWNED)
    assert refused > 15


def failing(made, room: int, number: int):
    """Fails once, after so many calls; those that put things back succeed."""
    count = iter(range(10_000))

    def call(*given: object, **named: object) -> object:
        if next(count) == room:
            raise OSError(number, os.strerror(number))
        return made(*given, **named)

    return call


def test_a_full_disk_leaves_the_earlier_run(tmp_path):
    a_full_disk_leaves_the_earlier_run(tmp_path)


def test_odd_folders(tmp_path, monkeypatch):
    """A link, the current folder, one that is not there yet; each keeps its identity and the user's files."""
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    monkeypatch.chdir(real)
    for path in (tmp_path / "link", Path(), Path("deep/er")):
        (real / "own.txt").write_text("mine")
        for word in ("one", "two"):
            write_together(path, run(word), OWNED)
            whole(Path(path), word)
    assert (tmp_path / "link").is_symlink() and (real / "own.txt").read_text() == "mine"
    assert real.samefile(Path.cwd())
    (real / "report.html").unlink()
    (real / "report.html").symlink_to(tmp_path / "elsewhere.html")
    (tmp_path / "elsewhere.html").write_text("mine")
    write_together(real, run("three"), OWNED)
    assert (tmp_path / "elsewhere.html").read_text() == "mine"
    whole(real, "three")


def test_a_folder_in_the_way_is_refused_before_anything_changes(tmp_path):
    write_together(tmp_path, run("before", SMALL), OWNED)
    (tmp_path / "density.svg").mkdir()
    with pytest.raises(OutputError, match=r"density.svg: a folder of that name"):
        write_together(tmp_path, run("after"), OWNED)
    whole(tmp_path, "before")
    write_together(tmp_path, run("after", SMALL), OWNED)  # which has no such file
    assert (tmp_path / "density.svg").is_dir()


@pytest.mark.parametrize("text", ['["../mine.txt", "/etc/x"]', "no list", "3", "[1]", None])
def test_what_others_left_there_reaches_nothing_outside(tmp_path, text):
    """A folder of results may come from anybody, a hidden folder with a list of names included."""
    (tmp_path / "mine.txt").write_text("mine")
    stage = tmp_path / "out" / folders.DECIDED
    (stage / "new").mkdir(parents=True)
    (stage / "old").mkdir()
    if text is not None:
        (stage / "replaced.json").write_text(text)
    complete(tmp_path / "out")
    try:
        write_together(tmp_path / "out", run("after"), OWNED)
    except OutputError as error:
        assert "delete it" in str(error)
    assert (tmp_path / "mine.txt").read_text() == "mine"


# -------------------------------------------------------------------------------------------- and the verbs use it


def a_run_is_written_at_once(tmp: Path) -> None:
    """Numbers, tables, plots and page of `analyze -o` in one write; of an earlier run nothing is left."""
    (tmp / "notes.svg").write_text("mine")
    rich, poor = (
        example.build_analysis("rich"),
        example.without(example.build_analysis("poor"), "spectrum", "layers"),
    )
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "page_of", lambda analyses: f"page of {list(analyses)}")
        patch.setattr(output, "write_together", lambda *given: written.append(given) or write_together(*given))
        for analysis in (rich, poor):
            output.write_run(analysis, tmp, report=True)
            assert load_run(tmp).title == analysis.title
    assert len(written) == 2
    assert set(written[0][1]) > {*SAVED, "density.svg", "cumulative.svg", "layers.svg", "report.html"}
    assert sorted(seen(tmp)) == sorted({*written[1][1], "notes.svg"})
    assert (tmp / "report.html").read_text() == "page of ['poor']"


def test_a_run_is_written_at_once(tmp_path):
    a_run_is_written_at_once(tmp_path)


def gap_reports_are_of_one_run(tmp: Path) -> None:
    """Page, table and JSON of `gap -o`, wherever the process dies."""
    one, two = (GapReport(example_gap.records(2 + seed), {}, seed=seed) for seed in (1, 2))
    targets = gap_verb._targets(tmp, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gap_verb, "_page", lambda report: f"page of {report.seed}")
        gap_verb._write(one, targets, tmp)
        at, deaths, died = 1, 0, True
        while died:
            died = False
            for after in (False, True):
                write = partial(gap_verb._write, two, targets, tmp)
                died |= dies_at(tmp, at, after=after, contents={}, write=lambda *_, write=write: write())
                deaths += died
                complete(tmp)
                found = seen(tmp)
                report = {"page of 1": one, "page of 2": two}[found["gap.html"]]
                assert found["gap.json"] == report.to_json()
                assert found["gap.csv"] == csv_text(report.to_frame())
                gap_verb._write(one, targets, tmp)
            at += 1
    assert deaths > 20


def test_gap_reports_are_of_one_run(tmp_path):
    gap_reports_are_of_one_run(tmp_path)


def files_are_written_wherever_they_go(tmp: Path) -> None:
    """Several folders and a pipe; a folder that cannot be written costs its own files only."""
    (tmp / "a").mkdir()
    (tmp / "file").write_text("mine")
    (tmp / "a" / "old.csv").write_text("of an earlier run")
    os.mkfifo(tmp / "pipe")
    reader = os.open(tmp / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    contents = {tmp / "file" / "x": "1", tmp / "a" / "new.csv": "2", tmp / "b" / "c.txt": "3", tmp / "pipe": "4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp)
        error = folders.write_files(contents, tmp / "a", ("old.csv", "new.csv"))
    assert isinstance(error, OutputError) and "cannot write file: " in str(error)
    assert (tmp / "file").read_text() == "mine"
    assert seen(tmp / "a") == {"new.csv": "2"} and seen(tmp / "b") == {"c.txt": "3"}
    assert os.read(reader, 10) == b"4" and (tmp / "pipe").is_fifo()
    os.close(reader)


def test_files_are_written_wherever_they_go(tmp_path):
    files_are_written_wherever_they_go(tmp_path)


def an_init_that_fails_leaves_nothing(tmp: Path) -> None:
    """A baseline without its configuration would be in the way of the next init."""
    (tmp / "problem.py").write_text(PROBLEM)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp)

        written, recorded = files.write_whole, []

        def full(path: Path, content: str) -> Path:
            if Path(path).name == "hessdiag.toml":
                recorded.append(Path("tests/hessdiag-baseline.json").exists())
                raise OutputError(f"cannot write {path}: No space left on device")
            return written(path, content)

        patch.setattr(files, "write_whole", full)
        code, _, err = command.call("init", "problem.py:small", "-q")
        assert (code, err.count("\n")) == (4, 1) and "No space left" in err
        assert recorded == [True]
        assert not Path("tests/hessdiag-baseline.json").exists() and not Path("hessdiag.toml").exists()


def test_an_init_that_fails_leaves_nothing(tmp_path):
    an_init_that_fails_leaves_nothing(tmp_path)


def test_saved_analyses_are_read_after_a_kill(tmp_path):
    """`load_run`, and so compare and check --result, finish what was decided."""
    one, two = example.build_analysis("one"), example.build_analysis("two")
    one.save(tmp_path)
    for at in range(1, 60):
        died = dies_at(
            tmp_path, at, after=True, contents=two.files(), write=lambda f, c, _: write_together(f, c, SAVED)
        )
        assert load_run(tmp_path).title in ("one", "two")
        one.save(tmp_path)
        if not died:
            break
    else:
        pytest.fail("it never came to its end")


# ------------------------------------------------------------------------------- whole commands, signals at random

PROBLEM = """
import hessdiag, torch
from torch import nn

def small():
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    data = x, (x[:, 0] + torch.randn(60) > 0).long()
    return hessdiag.Problem(nn.Linear(3, 2), {"train": data, "test": data}, criterion="cross_entropy")
"""
CONFIG = """
schema = 1
problem = "problem.py:small"
[check]
baseline = "record/baseline.json"
[check.budgets]
trace = { max = 100.0 }
"""
MANY = ("problem.py:small", "-c", "*.pt", "--seed")
COMMANDS = {
    "analyze": lambda seed: ["analyze", "problem.py:small", "-o", "out", "--seed", seed],
    "doctor": lambda _: ["doctor", "problem.py:small"],
    "check": lambda _: ["check", "-o", "junit=ci/junit.xml", "-o", "json=ci/check.json", "--fresh"],
    "gap": lambda seed: ["gap", *MANY, seed, "-o", "gap", "--measures", "weight_norm", "--no-guard"],
    "shift": lambda seed: ["shift", *MANY, seed, "-o", "shift", "--tests", "covariate"],
    "track": lambda seed: ["analyze", *MANY, seed, "-o", "track", "--track", "--probes", "4"],
    "baseline": lambda seed: ["baseline", "update", "--reason", f"the {seed}th", "--fresh"],
    "init": lambda seed: ["init", "../problem.py:small", "-q", "--seed", seed],
}
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


def trials() -> None:
    """In a process of its own: commands in forked children, each sent a signal after a random time."""
    import torch

    from hessdiag import cli

    chance = random.Random(0)
    for number in range(2):
        torch.save({"weight": torch.randn(2, 3), "bias": torch.randn(2)}, f"run{number}.pt")
    for verb, arguments in COMMANDS.items():
        for trial in range(-2, 2 * len(ENDS)):  # the first two run to their ends
            if verb == "init":
                shutil.rmtree("init", ignore_errors=True)
                Path("init").mkdir()
            start, end = time.monotonic(), ENDS[trial % len(ENDS)]
            begun, begin = os.pipe()
            before = left_over()  # by those that were killed
            child = os.fork() if trial > -2 else 0  # the very first here: children find all modules imported
            if not child:
                with contextlib.chdir("init" if verb == "init" else "."):
                    code = ended(cli, arguments(str(trial + 100)), begin)
                if trial > -2:
                    os._exit(code)
                assert code == 0, verb
                continue
            if trial == -1:
                os.waitpid(child, 0)
                took = time.monotonic() - start
                continue
            os.read(begun, 1)
            time.sleep(chance.uniform(0, took))
            os.kill(child, end)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, CODES[end]), (verb, end, code)
            left = left_over() - before
            assert end is signal.SIGKILL or not left, left
            for folder in ("out", "ci", "gap", "shift", "track", "record", "init", "init/tests", ".hessdiag"):
                readable(Path(folder))


def left_over() -> set[Path]:
    """Temporary files and folders."""
    files = {path for path in Path().rglob(".*.*") if path.name != ".gitignore" and path.is_file()}
    return files | set(Path().rglob(".hessdiag-*"))


def ended(cli: ModuleType, arguments: list[str], begin: int) -> int:
    """The code of a command that answers signals as the program does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cli.end_on_signals()
    os.write(begin, b"1")
    try:
        return cli.run(arguments)
    except BaseException:
        return 70


def readable(out: Path) -> None:
    """Every file is whole, and those of a run are of one."""
    complete(out)
    for file in [*out.glob("*.json"), *out.glob("cache/*.json"), *out.glob("cache/gap/*.json")]:
        json.loads(file.read_text())
    for file in [*out.glob("*.svg"), *out.glob("*.xml")]:
        ElementTree.parse(file)
    for file in out.glob("*.toml"):
        tomllib.loads(file.read_text())
    seeds = set()
    for page in out.glob("*.html"):
        text = page.read_text()
        assert text.rstrip().endswith("</html>")
        seeds |= set(re.findall(r"--seed (\d+)", text))
    for file in out.glob("*.json") if seeds else ():
        seeds |= set(re.findall(r'"seed": (\d+)', file.read_text()))
    assert len(seeds) <= 1, (out, seeds)


def test_commands_that_are_interrupted_leave_whole_files(tmp_path):
    (tmp_path / "problem.py").write_text(PROBLEM)
    (tmp_path / "hessdiag.toml").write_text(CONFIG)
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", "from tests.test_run_folders_are_whole import trials; trials()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------- would notice


def one_by_one(folder, contents, owned=()):
    for name in owned:
        (Path(folder) / name).unlink(missing_ok=True)
    for name, content in contents.items():
        files.write_whole(Path(folder) / name, content)
    return Path(folder)


def new_before_old(folder):
    """Moved in before all old ones are out."""
    decided = folder / folders.DECIDED
    if decided.is_dir():
        for file in sorted((decided / "new").iterdir()):
            file.rename(folder / file.name)
        shutil.rmtree(decided)


BROKEN = {
    "one file after the other": (every_moment_is_one_run, folders, "write_together", one_by_one),
    "one after the other, at random": (thirty_kills_leave_one_run, folders, "write_together", one_by_one),
    "new files beside old ones": (every_moment_is_one_run, folders, "_complete", new_before_old),
    "old files are not put back": (
        a_full_disk_leaves_the_earlier_run,
        folders,
        "_move",
        lambda file, target: file.rename(target) if folders.OLD in str(target) and file.exists() else None,
    ),
    "what a kill left is not finished": (every_moment_is_one_run, folders, "complete", lambda _: None),
    "a gap report's files one by one": (
        gap_reports_are_of_one_run,
        folders,
        "write_files",
        lambda contents, *_: [files.write_whole(path, text) for path, text in contents.items()] and None,
    ),
    "a pipe is replaced": (files_are_written_wherever_they_go, folders, "is_stream", lambda _: False),
    "the first folder that fails ends it": (
        files_are_written_wherever_they_go,
        folders,
        "_refused",
        lambda write, *given: [write(*given)][1:],
    ),
    "a baseline is left alone": (an_init_that_fails_leaves_nothing, Path, "unlink", lambda *_, **__: None),
    "a run without its plots": (a_run_is_written_at_once, output, "PLOTS", ()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, tmp_path, monkeypatch):
    promise, owner, attribute, broken = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises((AssertionError, OutputError, FileNotFoundError)):
        promise(tmp_path)
