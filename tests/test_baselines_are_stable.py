"""Promise: a baseline reads back as written, byte for byte, or says what is wrong; no update is lost. (8 s)"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessdiag.check import baseline as module
from hessdiag.check import baseline_text as form
from hessdiag.check.baseline import Baseline, Field, Line, diff, lock, read, text, updated, write
from hessdiag.check.recorded import DIGITS, Entry, Recorded
from hessdiag.errors import HessdiagError, NonFiniteError, NoVerdictError, OutputError, UsageError
from hessdiag.results.fingerprint import DEFAULTS, Fingerprint
from tests.example_analysis import build_analysis

TRACE = Recorded(
    value=5.85, lo=5.21, hi=6.49, kind="probes", confidence=0.95, per_probe=(5.31, 6.02, 6.22), per_draw=(5.0, 6.0)
)
LAMBDA = Recorded(
    value=0.8471,
    lo=0.847,
    hi=0.8472,
    kind="ritz",
    confidence=1.0,
    block_values=(0.8, 0.9),
    block_weights=(64.0, 36.0),
    block_examples=(64, 36),
)
ENTRY = Entry(
    fingerprint=Fingerprint(samples=100, available=None, rtol=1e-3, data_sha256="ab" * 32),
    metrics={"trace": TRACE, "lambda_max": LAMBDA},
    env={"torch": "2.13.0", "seconds_per_gradient": 0.1 + 0.2},
    reason="first, größer «7»\n<<<<<<< no conflict",
)
GOOD = Baseline(entries={"train": ENTRY, "train@layer4.*": replace(ENTRY, reason="")})


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def parsed(content: str) -> Baseline:
    return form.parsed(content)


finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(max_size=6)


@st.composite
def recordings(draw: st.DrawFn) -> Recorded:
    lo, value, hi = sorted(draw(st.tuples(finite, finite, finite)))
    probes = draw(st.lists(finite, max_size=4).filter(lambda found: len(found) != 1))
    blocks = draw(st.lists(st.tuples(finite, finite.map(abs), st.integers(1, 10**6)), max_size=3))
    values, weights, examples = zip(*blocks, strict=True) if blocks else ((), (), ())
    return Recorded(
        value=value,
        lo=lo,
        hi=hi,
        kind=draw(st.sampled_from(["exact", "probes", "ritz", "bracket", "bound"])),
        confidence=draw(st.floats(0.5, 1.0)),
        per_probe=tuple(probes),
        block_values=values,
        block_weights=weights,
        block_examples=examples,
    )


scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | words
entries = st.builds(
    Entry,
    fingerprint=st.dictionaries(words | st.sampled_from(sorted(DEFAULTS)), scalars, max_size=3).map(
        Fingerprint.of
    ),
    metrics=st.dictionaries(words, recordings(), max_size=3),
    env=st.dictionaries(words, scalars, max_size=2),
    reason=words,
)
baselines = st.builds(Baseline, entries=st.dictionaries(words, entries, max_size=3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(baselines)
def test_reading_and_writing_is_stable(baseline):
    content = text(baseline)
    again = parsed(content)
    assert text(again) == content
    assert content.endswith("}\n")
    assert set(again.entries) == set(baseline.entries)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(finite, finite)
def test_rounding_keeps_order_and_ten_digits(a, b):
    low, high = sorted((a, b))
    assert form.rounded(low) <= form.rounded(high)
    assert math.isfinite(form.rounded(a))
    assert form.rounded(form.rounded(a)) == form.rounded(a)
    # half a unit of the tenth digit, a whole one at the end of the range; nothing below the least normal number
    assert abs(form.rounded(a) - a) <= max(10.0 ** (1 - DIGITS) * abs(a), sys.float_info.min)


def test_what_is_kept_is_all_of_it(tmp_path):
    assert write(tmp_path / "b.json", GOOD) == read(tmp_path / "b.json")
    back = read(tmp_path / "b.json")
    assert back.entries["train"].metrics == {"trace": TRACE, "lambda_max": LAMBDA}  # ten digits are enough here
    assert back.entries["train"].fingerprint == ENTRY.fingerprint
    assert back.entries["train"].reason == ENTRY.reason
    assert back.entries["train"].env["seconds_per_gradient"] == 0.3
    assert (back.schema, back.tool) == (1, GOOD.tool)


def test_the_order_of_entries_and_metrics_does_not_matter():
    swapped = replace(ENTRY, metrics=dict(reversed(ENTRY.metrics.items())))
    other = Baseline(entries={"train@layer4.*": GOOD.entries["train@layer4.*"], "train": swapped})
    assert text(other) == text(GOOD)


def test_a_real_analysis_is_small_and_diff_friendly():
    content = text(Baseline(entries={"train": Entry.of(build_analysis(), reason="initial")}))
    lines = content.splitlines()
    changed = content.replace('"value": ', '"value": 1', 1).splitlines()
    assert sum(a != b for a, b in zip(lines, changed, strict=True)) == 1
    assert all(line.count('":') <= 1 for line in lines)
    assert len(content) < 20_000
    assert not any(token in content for token in ("NaN", "Infinity"))
    assert text(parsed(content)) == content


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_written(tmp_path, bad):
    write(tmp_path / "b.json", GOOD)
    before = (tmp_path / "b.json").read_bytes()
    probes = replace(TRACE, per_probe=(1.0, bad))
    with pytest.raises(NonFiniteError, match=r"entries\.train\.metrics\.trace\.per_probe\[1\]"):
        updated(tmp_path / "b.json", {"train": replace(ENTRY, metrics={"trace": probes})})
    assert (tmp_path / "b.json").read_bytes() == before
    assert names(tmp_path) == ["b.json"]


def test_a_missing_baseline_is_no_verdict_and_says_what_makes_one(tmp_path):
    with pytest.raises(NoVerdictError, match=r"hessdiag baseline update --reason") as found:
        read(tmp_path / "none" / "b.json")
    assert found.value.exit_code == 3
    assert "hessdiag init" in str(found.value)


def edited(change) -> str:
    content = json.loads(text(GOOD))
    change(content)
    return json.dumps(content)


def metric(**fields):
    return edited(lambda content: content["entries"]["train"]["metrics"]["trace"].update(fields))


WRONG = {
    "empty": ("", "line 1"),
    "truncated": (text(GOOD)[:700], "line"),
    "truncated to a word": (text(GOOD)[:5], "line 2"),
    "not text": (b"\xff\xfe\x00", "utf-8"),
    "a list": ("[]", "schema, tool and entries"),
    "another tool's": ('{"version": 3}', "schema, tool and entries"),
    "no schema": (edited(lambda c: c.pop("schema")), "schema, tool and entries"),
    "a run.json": ('{"schema": 1, "metrics": {}, "fingerprint": {}}', "run.json"),
    "schema as text": (edited(lambda c: c.update(schema="1")), "schema, tool and entries"),
    "schema true": (edited(lambda c: c.update(schema=True)), "schema, tool and entries"),
    "older than any": (edited(lambda c: c.update(schema=-1)), "schema -1 is unknown"),
    "merge conflict": ("<<<<<<< HEAD\n" + text(GOOD), "merge conflict at line 1"),
    "conflict inside": (text(GOOD).replace("    ", "<<<<<<< HEAD\n    ", 1), "merge conflict at line 3"),
    "key twice": (text(GOOD).replace('"reason"', '"reason": "", "reason"', 1), "'reason' twice"),
    "NaN": (metric(value=math.nan), "entries.train.metrics.trace.value is no finite number"),
    "infinity": (metric(hi=math.inf), "entries.train.metrics.trace.hi is no finite number"),
    "overflow": (text(GOOD).replace("6.49", "1e999", 1), "trace.hi is no finite number"),
    "huge integer": (metric(hi=10**400), "trace.hi is no finite number"),
    "NaN in a list": (metric(per_probe=[1, math.nan]), "trace.per_probe[1]"),
    "infinite setting": (edited(lambda c: c["entries"]["train"]["env"].update(x=math.inf)), "env.x"),
    "null": (metric(value=None), "entries.train.metrics.trace.value"),
    "null list": (metric(per_probe=None), "trace.per_probe"),
    "number as text": (metric(value="5.85"), "trace.value"),
    "number as truth": (metric(value=True), "trace.value"),
    "list as number": (metric(per_probe=5.0), "trace.per_probe"),
    "text in list": (metric(per_probe=[1, "2"]), "trace.per_probe[1]"),
    "one probe": (metric(per_probe=[5.85]), "per_probe has 1 value"),
    "blocks of unequal length": (metric(block_values=[1.0]), "differ in length"),
    "negative weight": (
        metric(block_values=[1.0], block_weights=[-1.0], block_examples=[1]),
        "block_weights or block_examples",
    ),
    "no examples": (metric(block_values=[1.0], block_weights=[1.0], block_examples=[0]), "block_examples"),
    "half an example": (metric(block_examples=[0.5]), "trace.block_examples[0]"),
    "low above value": (metric(lo=6.0), "value 5.85 lies outside [6.0, 6.49]"),
    "high below value": (metric(hi=5.5), "lies outside"),
    "confidence": (metric(confidence=95), "confidence 95"),
    "unknown kind": (metric(kind="guess"), "trace.kind"),
    "misspelt field": (metric(per_prob=[1, 2]), "trace.per_prob"),
    "no value": (edited(lambda c: c["entries"]["train"]["metrics"]["trace"].pop("value")), "trace.value"),
    "no fingerprint": (edited(lambda c: c["entries"]["train"].pop("fingerprint")), "entries.train.fingerprint"),
    "entries a list": (edited(lambda c: c.update(entries=[])), "entries"),
    "more at the top": (edited(lambda c: c.update(more=1)), "more"),
    "too deep": ('{"a":' * 100_000, "recursion"),
}


def refusal(folder: Path, content: str | bytes) -> HessdiagError | None:
    """What reading these bytes as a baseline raises."""
    file = folder / "b.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        read(file)
    except HessdiagError as error:
        return error
    return None


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_baseline_is_one_line_with_the_place_and_the_way_out(tmp_path, case):
    content, place = WRONG[case]
    error = refusal(tmp_path, content)
    assert isinstance(error, UsageError)
    said = str(error)
    assert place in said
    assert "\n" not in said
    assert f"git checkout -- {tmp_path / 'b.json'}" in said
    assert "hessdiag baseline update" in said
    with pytest.raises(UsageError):  # an update does not write over what it cannot read
        updated(tmp_path / "b.json", {"train": ENTRY})
    assert (tmp_path / "b.json").read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_every_truncation_is_refused(tmp_path):
    content = text(GOOD).rstrip()
    assert all(isinstance(refusal(tmp_path, content[:end]), UsageError) for end in range(0, len(content), 37))


def test_a_newer_schema_asks_for_a_newer_hessdiag(tmp_path):
    said = str(refusal(tmp_path, edited(lambda c: c.update(schema=2, surprise=1))))
    assert "schema 2" in said
    assert "update hessdiag" in said
    assert "git checkout" not in said


def test_a_folder_is_no_baseline(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read"):
        read(tmp_path)


def test_older_schemas_are_migrated_step_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(form, "SCHEMA", 3)
    monkeypatch.setitem(form.MIGRATIONS, 1, lambda old: old | {"entries": old["entries"] | {"one": {}}})
    full = json.loads(text(GOOD))["entries"]["train"]
    monkeypatch.setitem(form.MIGRATIONS, 2, lambda old: old | {"entries": old["entries"] | {"two": full}})
    assert "entries.one" in str(refusal(tmp_path, text(GOOD)))  # the first step's result is what the second gets
    monkeypatch.setitem(form.MIGRATIONS, 1, dict)
    assert refusal(tmp_path, text(GOOD)) is None
    back = read(tmp_path / "b.json")
    assert back.schema == 3
    assert back.entries["two"] == back.entries["train"]
    monkeypatch.setitem(form.MIGRATIONS, 1, lambda old: old["absent"])
    assert "not in the form of its schema 1" in str(refusal(tmp_path, text(GOOD)))


# Updates


def test_an_update_keeps_the_other_entries(tmp_path):
    file = tmp_path / "deep" / "b.json"
    old, new = updated(file, {"train": ENTRY})
    assert old is None
    assert set(new.entries) == {"train"}
    old, new = updated(file, {"test": ENTRY})
    assert set(old.entries) == {"train"}
    assert set(new.entries) == {"train", "test"}
    assert new == read(file)
    assert names(file.parent) == ["b.json"]


WRITER = """
import sys
from hessdiag.check.baseline import updated
from hessdiag.check.recorded import Entry
from hessdiag.results import Fingerprint
path, name, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
updated(path, {})
print("ready", flush=True)
input()
for index in range(times):
    updated(path, {f"{name}{index}": Entry(fingerprint=Fingerprint(), metrics={}, reason=name)})
"""


def race(file: Path, program: str, times: int = 25) -> set[str]:
    """Labels left after two processes added as many entries each."""
    command = [sys.executable, "-c", program, str(file)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [subprocess.Popen([*command, name, str(times)], text=True, **pipes) for name in "ab"]
    assert [process.stdout.readline() for process in both] == ["ready\n"] * 2
    for process in both:  # started together: else one may be done before the other begins
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return set(read(file).entries)


def test_two_processes_lose_nothing(tmp_path):
    assert race(tmp_path / "b.json", WRITER) == {f"{name}{index}" for name in "ab" for index in range(25)}
    assert names(tmp_path) == ["b.json"]


def lock_file(folder: Path, pid: int, host: str) -> Path:
    file = folder / ".b.json.lock"
    file.write_text(f"{pid}\n{host}\n")
    return file


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_of_a_dead_process_is_broken(tmp_path):
    lock_file(tmp_path, dead_process(), socket.gethostname())
    start = time.monotonic()
    updated(tmp_path / "b.json", {"train": ENTRY}, wait=5)
    assert time.monotonic() - start < 4
    assert names(tmp_path) == ["b.json"]


@pytest.mark.parametrize(("pid", "host"), [(os.getppid(), socket.gethostname()), (dead_process(), "elsewhere")])
def test_a_lock_that_may_be_held_is_waited_for_and_named(tmp_path, pid, host):
    file = lock_file(tmp_path, pid, host)
    with pytest.raises(OutputError) as found:
        updated(tmp_path / "b.json", {"train": ENTRY}, wait=0.2)
    assert str(file) in str(found.value)
    assert f"process {pid} on {host}" in str(found.value)
    assert names(tmp_path) == [file.name]


@pytest.mark.parametrize("content", ["", "\n", "4711"])
def test_a_lock_whose_process_was_killed_before_it_named_itself_is_broken(tmp_path, content):
    file = tmp_path / ".b.json.lock"
    file.write_text(content)
    os.utime(file, (0, 0))
    start = time.monotonic()
    updated(tmp_path / "b.json", {"train": ENTRY}, wait=5)
    assert time.monotonic() - start < 4
    assert names(tmp_path) == ["b.json"]
    file.write_text("")  # just made: its process may be about to write
    with pytest.raises(OutputError, match=r"another process"):
        updated(tmp_path / "b.json", {"train": ENTRY}, wait=0.2)


def test_the_lock_is_given_back_when_the_update_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock(tmp_path / "b.json"):
        assert str(os.getpid()) in (tmp_path / ".b.json.lock").read_text().split()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize("folder", ["file.json", "/proc/nowhere"])
def test_what_cannot_be_written_says_so(tmp_path, folder):
    (tmp_path / "file.json").write_text("{}")
    with pytest.raises(OutputError, match=r"cannot write .*set another baseline"):
        updated(tmp_path / folder / "b.json", {"train": ENTRY})
    with pytest.raises(OutputError, match=r"cannot write .*set another baseline"):
        write(tmp_path / folder / "b.json", GOOD)
    assert (tmp_path / "file.json").read_text() == "{}"


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path / "b.json", GOOD)
    before = (tmp_path / "b.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hessdiag.files.os.fsync", full)
    with pytest.raises(OutputError, match=r"No space left"):
        updated(tmp_path / "b.json", {"test": ENTRY})
    assert (tmp_path / "b.json").read_bytes() == before
    assert names(tmp_path) == ["b.json"]


def git(folder: Path, *arguments: str) -> int:
    options = ("-c", "user.name=x", "-c", "user.email=x@y", "-c", "init.defaultBranch=main")
    return subprocess.run(["git", *options, *arguments], cwd=folder, capture_output=True).returncode


@pytest.mark.parametrize("style", ["merge", "diff3"])
def test_after_a_merge_conflict_the_advice_works_and_an_update_goes_through(tmp_path, style):
    """A true conflict of git; what both sides agree on is kept, what they dispute is recorded anew or left out."""
    file = tmp_path / "b.json"
    git(tmp_path, "init", "-q")
    for branch, value in (("main", 6.40), ("other", 6.42), ("main", 6.41)):
        git(tmp_path, "checkout", "-q", branch)
        entry = replace(ENTRY, metrics={"trace": replace(TRACE, value=value, lo=6.3)})
        write(file, Baseline(entries={"train": entry, "test": ENTRY, "zoo": entry}))
        git(tmp_path, "add", "-A")
        assert git(tmp_path, "commit", "-qm", str(value)) == 0
        if value == 6.40:
            git(tmp_path, "branch", "other")
    assert git(tmp_path, "-c", f"merge.conflictStyle={style}", "merge", "other") == 1
    conflict = file.read_text()
    with pytest.raises(UsageError, match=r"merge conflict at line \d+; run hessdiag baseline update") as found:
        read(file)
    assert git(tmp_path, "checkout", "--", "b.json") == 1  # which was the advice
    assert f"git checkout --ours -- {file}, or --theirs" in str(found.value)
    for side, value in (("--ours", 6.41), ("--theirs", 6.42)):
        assert git(tmp_path, "checkout", side, "--", "b.json") == 0
        assert read(file).entries["train"].metrics["trace"].value == value
    file.write_text(conflict)
    updated(file, {"train": ENTRY})
    assert read(file).entries == {"train": read(file).entries["train"], "test": read(file).entries["test"]}
    assert read(file).entries["train"].metrics.keys() == ENTRY.metrics.keys()


# Differences


def test_differences_are_listed_metric_by_metric():
    higher = replace(LAMBDA, value=0.97, lo=0.969, hi=0.971)
    entry = replace(ENTRY, fingerprint=replace(ENTRY.fingerprint, samples=200), metrics={"lambda_max": higher})
    lines = diff(GOOD, Baseline(entries={"train": entry, "test": ENTRY}))
    assert [(line.scope, getattr(line, "metric", None) or line.field) for line in lines] == [
        ("test", "lambda_max"),
        ("test", "trace"),
        ("train", "samples"),
        ("train", "lambda_max"),
        ("train", "trace"),
        ("train@layer4.*", "lambda_max"),
        ("train@layer4.*", "trace"),
    ]
    assert lines[2] == Field(scope="train", field="samples", old=100, new=200)
    assert lines[3] == Line(scope="train", metric="lambda_max", old=LAMBDA, new=higher)
    assert str(lines[3]) == "train lambda_max: 0.8471 [0.847, 0.8472] → 0.97 [0.969, 0.971] (+14.5%)"
    assert str(lines[4]) == "train trace: 5.85 [5.21, 6.49] → none"
    assert all(line.changed for line in lines if isinstance(line, Line))


def test_nothing_changed_where_nothing_was_measured_anew():
    assert not any(isinstance(line, Field) or line.changed for line in diff(GOOD, parsed(text(GOOD))))
    finer = replace(TRACE, value=5.85 * (1 + 1e-13))
    unrounded = Baseline(entries={"train": replace(ENTRY, metrics={"trace": finer, "lambda_max": LAMBDA})})
    assert not any(line.changed for line in diff(Baseline(entries={"train": ENTRY}), unrounded))
    assert all(line.old is None and line.changed for line in diff(None, GOOD))


def test_importing_needs_no_torch():
    code = "import hessdiag.check.baseline, hessdiag.check.comparable, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Breakages


def stays_the_same() -> bool:
    # as measured, with digits that ten cannot hold
    odd = replace(TRACE, value=17 / 3, lo=16 / 3, hi=6.1, per_probe=(1 / 3, 2 / 3))
    first = text(Baseline(entries={"b": replace(ENTRY, metrics={"trace": odd}), "a": ENTRY}))
    second = text(Baseline(entries={"a": ENTRY, "b": replace(ENTRY, metrics={"trace": odd})}))
    nearly = replace(odd, value=17 / 3 * (1 + 1e-14))
    third = text(Baseline(entries={"a": ENTRY, "b": replace(ENTRY, metrics={"trace": nearly})}))
    return first == second == third == text(parsed(first))


def refuses(case: str, folder: Path) -> bool:
    return isinstance(refusal(folder, WRONG[case][0]), UsageError)


LOSER = WRITER.replace("from hessdiag", "from contextlib import nullcontext\nfrom hessdiag", 1).replace(
    "path, name", "from hessdiag.check import baseline\nbaseline.lock = lambda *_: nullcontext()\npath, name"
)
BROKEN = {
    "all digits": (form, "rounded", lambda number: number, lambda folder: stays_the_same()),
    "as it comes": (
        form,
        "_laid_out",
        lambda content, indent="": json.dumps(content),
        lambda folder: stays_the_same(),
    ),
    "NaN let in": (form, "_not_finite", lambda content: "", lambda folder: refuses("NaN in a list", folder)),
    "contradictions let in": (
        form,
        "_contradiction",
        lambda _: "",
        lambda folder: refuses("low above value", folder),
    ),
    "the last key wins": (form, "_without_repeats", dict, lambda folder: refuses("key twice", folder)),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(tmp_path, monkeypatch, breakage):
    where, name, instead, promise = BROKEN[breakage]
    assert promise(tmp_path)
    monkeypatch.setattr(where, name, instead)
    assert not promise(tmp_path)


def test_this_promise_would_notice_a_missing_lock(tmp_path):
    # Each update reads and writes in a few milliseconds, and most of these overlap: 50 kept of 50 is no chance.
    assert len(race(tmp_path / "b.json", LOSER, times=25)) < 50


def test_this_promise_would_notice_a_file_written_in_place(tmp_path, monkeypatch):
    def in_place(path, content):
        Path(path).write_text(content[:10])
        raise OutputError("full")

    write(tmp_path / "b.json", GOOD)
    monkeypatch.setattr(module, "write_whole", in_place)
    with pytest.raises(OutputError):
        updated(tmp_path / "b.json", {"test": ENTRY})
    with pytest.raises(UsageError):
        read(tmp_path / "b.json")
