"""Promise: a measurement that is killed goes on where it was, with the numbers of one that was not. (30 s)

What kill -9 leaves is what lies on the disk: the folder is copied at many moments of a run, and each copy goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.analysis import Measurement, going_on, run
from hessdiag.analysis import measurement as measuring
from hessdiag.engine.products.curvature import Curvature
from hessdiag.resume import Kept, Log, Pace, effects, kept, log, pace
from hessdiag.resume.entry import Entry, usable
from hessdiag.resume.values import plain, restored
from hessdiag.settings import Settings
from hessdiag.shift import images
from hessdiag.shift import report as shift_report
from hessdiag.shift.kept import KeptScores
from hessdiag.shift.report import shift_curves
from hessdiag.shift.settings import ShiftSettings
from hessdiag.spectral.basis import Storage
from tests import models
from tests.command import call

CLOCKS = {"cost": ("seconds", "gradients"), "environment": ("date", "seconds_per_gradient", "method_reason")}
MOMENTS = 10  # of each kind, at random


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written as soon as it is found."""
    monkeypatch.setattr(pace, "FIRST", 0.0)
    monkeypatch.setattr(pace, "SHARE", 1e9)


def tanh(seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> hessdiag.Problem:
    """Curved in every tensor: its trace takes probes on R, or on H."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 7), activation(), nn.Linear(7, 5), activation(), nn.Linear(5, 3)).double()
    return hessdiag.Problem(
        model, {"train": (models.randn(60, 8), models.labels(60, 3))}, criterion="cross_entropy"
    )


def three_layers() -> hessdiag.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 3))
    return hessdiag.Problem(
        model, {"train": (models.randn(60, 8).float(), models.labels(60, 3))}, criterion="cross_entropy"
    )


def stepped() -> hessdiag.Problem:
    """With an optimizer that has made steps."""
    problem = tanh()
    optimizer = torch.optim.Adam(problem.model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        x, y = problem.data["train"]
        nn.functional.cross_entropy(problem.model(x), y).backward()
        optimizer.step()
    return hessdiag.Problem(problem.model, problem.data, criterion="cross_entropy", optimizer=optimizer)


KINDS: dict[str, tuple[Callable[[], hessdiag.Problem], dict[str, Any]]] = {
    "a kept graph": (tanh, {"max_steps": 20}),
    "probes on R": (tanh, {"quantities": ["lambda_max", "trace"], "probes": 20, "block": 4}),
    "the closed form": (three_layers, {"max_steps": 20}),
    "the Gauss-Newton matrix": (tanh, {"operator": "ggn", "max_steps": 20, "effort": "quick"}),
    "a budget of products": (tanh, {"budget": "40p"}),
    "differences": (
        tanh,
        {
            "method": "finite_difference",
            "quantities": ["lambda_max", "trace"],
            "max_steps": 6,
            "probes": 4,
            "block": 2,
        },
    ),
    "a run that restarts": (tanh, {"quantities": ["lambda_max", "lambda_min"], "max_steps": 26, "rtol": 1e-9}),
    "rows in half precision": (tanh, {"quantities": ["lambda_max", "trace"], "max_steps": 18, "rtol": 1e-2}),
    "every direction": (models.regression, {}),
    "further starts": (tanh, {"quantities": ["density", "trace"], "density_probes": 6, "steps": 8, "block": 2}),
    "an optimizer's coordinates": (
        stepped,
        {"quantities": ["preconditioned_lambda_max", "lambda_max"], "max_steps": 15},
    ),
}
FEW = {"a run that restarts": Storage(12), "rows in half precision": Storage(12, half=True)}
"""How a basis is held."""


@pytest.fixture(autouse=True)
def small_basis(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    if kind in FEW:
        monkeypatch.setattr(run, "held", lambda *_: FEW[kind])


def ready(kind: str, **more: Any) -> Measurement:
    make, options = KINDS[kind]
    return Measurement(make(), Settings(**{**options, **more}))


def numbers(found: hessdiag.Analysis) -> str:
    """run.json without its clocks."""
    return without_clocks(json.loads(found.to_json()))


def without_clocks(whole: dict[str, Any]) -> str:
    for part, names in CLOCKS.items():
        for name in names:
            del whole[part][name]
    return json.dumps(whole, sort_keys=True, indent=1)


class Moments:
    """Copies of a folder at moments of a run: what kill -9 would leave there.

    Attributes:
        stages: the last copy before a result of another name.
        others: copies before every ``each``-th product.
        products: formed so far.
    """

    def __init__(self, folder: Path, copies: Path, each: int) -> None:
        self.folder, self.copies, self.each, self.products = folder, copies, each, 0
        self.stages: list[Path] = []
        self.others: list[Path] = []
        self._last = ""

    def product(self, rows: int) -> None:
        self.products += rows
        if self.each and self.products % self.each < rows:
            self.others.append(self._copy())

    def entry(self, what: str) -> None:
        if what != self._last and self.products:
            self.stages.append(self._copy())
        self._last = what

    def _copy(self) -> Path:
        copy = self.copies / f"{len(self.stages) + len(self.others):04d}"
        if self.folder.exists():
            shutil.copytree(self.folder, copy)
        return copy


def watched(measurement: Measurement, folder: Path, each: int = 0) -> tuple[hessdiag.Analysis, Moments]:
    """A run that is kept, with copies of the folder at the end of every stage and before some products."""
    moments = Moments(folder, folder.with_name("copies"), each)
    multiply, append = Curvature.multiply, Log.append

    def multiplied(self: Curvature, rows: torch.Tensor) -> torch.Tensor:
        moments.product(len(rows))
        return multiply(self, rows)

    def appended(self: Log, found: Any) -> None:
        moments.entry(found[0][0].what)
        append(self, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curvature, "multiply", multiplied)
        patch.setattr(Log, "append", appended)
        measurement.keep_in(folder)
        found = measurement.run()
    moments.entry("the files are not written yet")
    return found, moments


def goes_on(kind: str, folder: Path, expected: str, **more: Any) -> int:
    """Go on from a folder to the numbers expected; the products that were formed anew."""
    again = ready(kind, **more)
    said, formed = again.keep_in(folder), 0
    multiply = Curvature.multiply

    def counted(self: Curvature, rows: torch.Tensor) -> torch.Tensor:
        nonlocal formed
        formed += len(rows)
        return multiply(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curvature, "multiply", counted)
        found = again.run()
    assert numbers(found) == expected
    if said:
        assert said.startswith("goes on from ")
        assert formed < found.cost.products
    again.kept.forget()
    assert not [path for path in folder.glob("*") if path.is_dir()]
    return formed


@functools.cache
def uninterrupted(kind: str) -> str:
    return numbers(ready(kind).run())


def moments_of(kind: str, tmp_path: Path, each: int = 0) -> Moments:
    found, moments = watched(ready(kind), tmp_path / "kept", each)
    assert numbers(found) == uninterrupted(kind)  # keeping changes nothing
    return moments


@pytest.mark.parametrize("kind", KINDS)
def test_killed_after_every_stage(kind: str, tmp_path: Path) -> None:
    moments = moments_of(kind, tmp_path)
    assert moments.stages
    stages = moments.stages[:: 1 + len(moments.stages) // 5]  # of many alike a few
    if stages[-1] != moments.stages[-1]:
        stages.append(moments.stages[-1])
    formed = [goes_on(kind, copy, uninterrupted(kind)) for copy in stages]
    assert formed == sorted(formed, reverse=True)  # the later it was killed, the less is left
    assert formed[-1] == 0


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_products(kind: str, tmp_path: Path) -> None:
    moments = moments_of(kind, tmp_path, 1)
    assert len(moments.others) > 3
    chosen = random.Random(kind).sample(moments.others, min(MOMENTS, len(moments.others)))
    for copy in chosen:
        goes_on(kind, copy, uninterrupted(kind))


class Clock:
    """A second for each product."""

    def __init__(self, begin: float) -> None:
        self.now = begin

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


def by_the_clock(patch: pytest.MonkeyPatch, begin: float) -> None:
    """From here on time is what products take."""
    clock, multiply = Clock(begin), Curvature.multiply

    def timed(self: Curvature, rows: torch.Tensor) -> torch.Tensor:
        clock.now += len(rows)
        return multiply(self, rows)

    patch.setattr(time, "perf_counter", clock)
    patch.setattr(Curvature, "multiply", timed)


def check_budget(tmp_path: Path) -> None:
    """A budget of time counts what was spent before, and is spent in the same way."""
    options = {"budget": "30s", "block": 4}
    with pytest.MonkeyPatch.context() as patch:
        by_the_clock(patch, 1e3)
        whole, moments = watched(ready("a kept graph", **options), tmp_path / "kept", 9)
    assert 20 <= whole.cost.products <= 34
    assert any("budget of 30 seconds" in warning for warning in whole.warnings)
    for copy in (*moments.stages, *moments.others):
        with pytest.MonkeyPatch.context() as patch:
            by_the_clock(patch, 7e6)  # another day
            again = ready("a kept graph", **options)
            again.keep_in(copy)
            found = again.run()
        assert numbers(found) == numbers(whole)
        assert found.cost.seconds == pytest.approx(whole.cost.seconds, abs=0.01)


def test_a_budget_of_time_counts_what_was_spent(tmp_path: Path) -> None:
    check_budget(tmp_path)


def left_by(kind: str, folder: Path, products: int = 12, **more: Any) -> Path:
    """A folder in which a run ended after so many products."""
    multiply, formed = Curvature.multiply, 0

    def killed(self: Curvature, rows: torch.Tensor) -> torch.Tensor:
        nonlocal formed
        formed += len(rows)
        if formed > products:
            raise KeyboardInterrupt
        return multiply(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curvature, "multiply", killed)
        measurement = ready(kind, **more)
        measurement.keep_in(folder)
        with pytest.raises(KeyboardInterrupt):
            measurement.run()
    return folder


QUICK = "probes on R"


def others() -> dict[str, Measurement]:
    """Measurements that are not the one of `QUICK`."""
    make, options = KINDS[QUICK]
    problem = make()

    def of(problem: hessdiag.Problem, **more: Any) -> Measurement:
        return Measurement(problem, Settings(**{**options, **more}))

    return {
        "another seed": of(problem, seed=1),
        "other weights": of(tanh(seed=1)),
        "another function of the same weights": of(tanh(activation=nn.Sigmoid)),
        "other batches": of(problem, batch_size=7),
        "another accuracy": of(problem, rtol=1e-2),
        "another block": of(problem, block=3),
        "another method": of(problem, method="double_backward"),
        "another budget": of(problem, budget="100p"),
    }


def check_others(tmp_path: Path) -> None:
    folder = left_by(QUICK, tmp_path)
    for name, other in others().items():
        assert other.keep_in(folder) == "", name
    assert ready(QUICK).keep_in(folder) == ""  # a function of the same weights took the place: nothing is mixed
    left_by(QUICK, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "3.0.0")
        assert ready(QUICK).keep_in(folder) == ""
    assert ready(QUICK).keep_in(folder).startswith("goes on from ")


def test_another_measurement_is_not_gone_on_with(tmp_path: Path) -> None:
    check_others(tmp_path)


def check_torn(tmp_path: Path) -> None:
    """Lines cut anywhere, a byte changed anywhere, rows that are half there or gone."""
    left_by("a kept graph", tmp_path / "whole", 60)
    (lines,) = (tmp_path / "whole").glob("*/found.jsonl")
    rows = sorted(lines.parent.glob("rows-*"))
    whole, entries = lines.read_bytes(), len(lines.read_bytes().splitlines())
    assert entries > 24
    chance, least = random.Random(0), entries

    def found() -> int:
        log = Log(lines.parent)
        log.read()
        log.release()
        return len(log.entries)

    def attempt(spoil: Callable[[], object], number: int | None = None) -> None:
        nonlocal least
        copy = tmp_path / "copy"
        shutil.copytree(lines.parent, copy)
        spoil()
        read = found()
        least = min(least, read)
        assert read < entries
        assert number is None or read == number
        shutil.rmtree(lines.parent)
        copy.rename(lines.parent)

    for _ in range(10):
        cut = chance.randrange(len(whole))
        attempt(lambda cut=cut: lines.write_bytes(whole[:cut]), whole[:cut].count(b"\n"))
        changed = bytearray(whole)
        changed[cut] ^= 1
        attempt(lambda changed=changed: lines.write_bytes(changed))
    for number in (1, 5, len(rows) - 1):
        first = int(rows[number].stem.split("-")[1])
        attempt(rows[number].unlink, first)
        content = rows[number].read_bytes()
        attempt(lambda n=number, c=content: rows[n].write_bytes(c[: len(c) // 2]), first)
        attempt(lambda n=number, c=content: rows[n].write_bytes(c[:-1] + bytes([c[-1] ^ 1])), first)
    lines.write_bytes(whole[: len(whole) * 2 // 3])
    goes_on("a kept graph", tmp_path / "whole", uninterrupted("a kept graph"))


def test_half_a_file_is_ignored(tmp_path: Path) -> None:
    check_torn(tmp_path)


def test_rows_that_a_restart_replaced_are_not_needed() -> None:
    def entry(number: int, *, fills: bool = True, anew: bool = False) -> Entry:
        return Entry(number=number, what="step", fills=fills, anew=anew, file=str(number))

    steps = [entry(0), entry(1), entry(2, anew=True), entry(3), entry(4, fills=False)]
    for lacking, number in {(): 5, (0,): 5, (0, 1): 5, (3,): 3, (2,): 2, (0, 2): 0, (1, 2): 1, (4,): 4}.items():
        assert usable(steps, lambda one, lacking=lacking: one.number not in lacking) == number, lacking


def check_ended(tmp_path: Path) -> None:
    """Ctrl-C ends with what there is; what came after it is no part of the whole."""
    measurement, multiply = ready("a kept graph"), Curvature.multiply
    said = measurement.keep_in(tmp_path)

    def pressed(self: Curvature, rows: torch.Tensor) -> torch.Tensor:
        if self.products >= 9:
            measurement.interrupt()
        return multiply(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curvature, "multiply", pressed)
        found = measurement.run()
    assert not said
    assert any("interrupted" in warning for warning in found.warnings)
    assert measurement.kept.written
    goes_on("a kept graph", tmp_path, uninterrupted("a kept graph"))


def test_an_interrupted_measurement_goes_on_to_its_end(tmp_path: Path) -> None:
    check_ended(tmp_path)


def check_two(tmp_path: Path) -> None:
    """Of two at the same time one keeps; both are right."""
    left_by(QUICK, tmp_path)
    first, second = ready(QUICK), ready(QUICK)
    assert first.keep_in(tmp_path).startswith("goes on")
    assert second.keep_in(tmp_path) == ""
    found = second.run()
    second.kept.forget()
    assert [note for note in found.notes if "another run of the same measurement has" in note]
    found = first.run()
    assert numbers(found) == uninterrupted(QUICK)
    first.kept.forget()
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


def test_two_at_the_same_time(tmp_path: Path) -> None:
    check_two(tmp_path)


def test_two_begun_at_the_same_time(tmp_path: Path) -> None:
    first, second = ready(QUICK), ready(QUICK)
    assert first.keep_in(tmp_path) == second.keep_in(tmp_path) == ""
    one = first.run()
    other = second.run()  # nothing was there when it looked; the first has the folder
    assert numbers(one) == uninterrupted(QUICK)
    assert any("another run" in note for note in other.notes)
    first.kept.forget()


def check_full(tmp_path: Path) -> None:
    """A disk that is full or read-only costs one note."""
    (tmp_path / "file").write_text("")
    measurement = ready(QUICK)
    measurement.keep_in(tmp_path / "file")
    found = [measurement.run()]

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "_save", full)
        measurement = ready(QUICK)
        measurement.keep_in(tmp_path / "full")
        found.append(measurement.run())
    for one in found:
        (note,) = [note for note in one.notes if note.startswith("nothing is kept for a next time: ")]
        assert "\n" not in note
        whole = json.loads(numbers(one))
        whole["notes"].remove(note)
        assert whole == json.loads(uninterrupted(QUICK))


def test_a_full_disk_costs_a_note(tmp_path: Path) -> None:
    check_full(tmp_path)


def test_fresh_takes_nothing(tmp_path: Path) -> None:
    left_by(QUICK, tmp_path)
    measurement = ready(QUICK)
    assert measurement.keep_in(tmp_path, fresh=True) == ""
    assert numbers(measurement.run()) == uninterrupted(QUICK)
    measurement.kept.forget()
    assert ready(QUICK).keep_in(tmp_path) == ""


def test_python_keeps_where_it_is_told(tmp_path: Path) -> None:
    make, options = KINDS[QUICK]
    left_by(QUICK, tmp_path)
    found = hessdiag.analyze(make(), **options, resume=tmp_path)
    assert numbers(found) == uninterrupted(QUICK)
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


def test_a_silent_rank_reads_and_writes_nothing(tmp_path: Path) -> None:
    left_by(QUICK, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    measurement = ready(QUICK)
    measurement.keep_in(tmp_path, writes=False)
    assert numbers(measurement.run()) == uninterrupted(QUICK)
    measurement.kept.forget()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def check_pace(_: Path) -> None:
    """Whatever the disk: nothing in the first seconds, and then a fiftieth of the time at most."""
    for rate, each, size in ((2e9, 1e-4, 2e5), (5e7, 0.05, 5e6), (1e6, 2.0, 1e6)):
        with pytest.MonkeyPatch.context() as patch:
            clock = Clock(0.0)
            patch.setattr(time, "perf_counter", clock)
            paced, pending, writing, first = Pace(10.0, 0.02), list[int](), 0.0, 0.0
            while clock.now < 7200:
                clock.now += 2.0
                pending.append(int(size))
                if number := paced.due(pending):
                    first = first or clock.now
                    taken, pending = sum(pending[:number]), pending[number:]
                    with paced.writing(taken):
                        clock.now += each + taken / rate
                    writing += each + taken / rate
        assert first >= 10
        assert 0 < writing <= 0.021 * clock.now + 2 * each, (rate, each, size)
        assert not pending[1:] or writing > 0.01 * clock.now, (rate, each, size)  # as much as it may


def test_writing_takes_a_fiftieth_of_the_time(tmp_path: Path) -> None:
    check_pace(tmp_path)


def test_a_fast_measurement_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    left_by(QUICK, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_what_nobody_goes_on_with_is_removed(tmp_path: Path) -> None:
    (folder,) = (path for path in left_by(QUICK, tmp_path).iterdir() if path.is_dir())
    other = folder.rename(tmp_path / "old")
    recent = tmp_path / "recent"
    shutil.copytree(other, recent)
    os.utime(other / log.LINES, (time.time() - log.OLD - 60,) * 2)
    left_by(QUICK, tmp_path)
    assert recent.exists()
    assert not other.exists()


def check_memory(tmp_path: Path) -> None:
    """What running out of memory changed holds after the kill, and is said once."""
    form, asked = Curvature._form, {"method": "retained_graph", "block": 4}

    def short(self: Curvature, piece: Any, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return form(self, piece, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curvature, "_form", short)
        whole = ready("a kept graph", **asked).run()
        assert [text for text in whole.warnings if text.startswith("out of memory: 2 vectors")]
        left_by("a kept graph", tmp_path, 60, **asked)
        goes_on("a kept graph", tmp_path, numbers(whole), **asked)


def test_memory_that_ran_out_stays_so(tmp_path: Path) -> None:
    check_memory(tmp_path)


def shifted(seed: int = 0) -> hessdiag.Problem:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    pictures = {
        name: models.randn(300, 1, 8, 8, seed=n).float() for n, name in enumerate(("train", "test", "other"))
    }
    data = {name: (x, x.flatten(1)[:, :3].argmax(1)) for name, x in pictures.items()}
    return hessdiag.Problem(model, data, criterion="cross_entropy")


def shifts(folder: Path, passes: int | None = None, seed: int = 0) -> tuple[str, int, list[str]]:
    """What the tests of a checkpoint find, the forward passes that took, and what was said; or killed before."""
    done, said, correct = 0, list[str](), images.correct
    settings = ShiftSettings(tests=("covariate", "augmented", "distance", "other"), other="other", samples=300)

    def counted(*given: Any) -> Any:
        nonlocal done
        if done == passes:
            raise KeyboardInterrupt
        done += 1
        return correct(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "correct", counted)
        patch.setattr(shift_report, "correct", counted)
        kept = KeptScores(folder)
        try:
            found = dict(shift_curves(shifted(seed), settings, say=said.append, kept=kept))
        except KeyboardInterrupt:
            return "", done, said
    kept.forget()
    assert not kept.notes
    return json.dumps({name: dataclasses.asdict(one) for name, one in found.items()}, default=repr), done, said


def test_shift_goes_on(tmp_path: Path) -> None:
    whole, all_passes, said = shifts(tmp_path / "none")
    assert all_passes > 4
    assert not [line for line in said if "goes on" in line]
    for passes in range(2, all_passes):
        shifts(tmp_path, passes)
        again, done, said = shifts(tmp_path)
        assert again == whole
        assert done == all_passes - passes + 1
        assert [f"goes on from {passes - 1} forward passes" in line for line in said].count(True) == 1
        assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "none"]
    shifts(tmp_path, 3)
    assert shifts(tmp_path, seed=1)[1] == all_passes  # other weights


def test_values_come_back_to_the_bit() -> None:
    large: dict[str, torch.Tensor] = {}
    given = (1.1, float("inf"), 3, None, "µ", True, models.randn(3, 2), torch.zeros(0, 4), models.randn(200, 90))
    text = json.dumps(plain((given, [models.randn(5).numpy(), models.randn(4).bfloat16()]), large))
    first, (array, half) = restored(json.loads(text), large)
    assert models.same(list(first), list(given))
    assert array.tolist() == models.randn(5).tolist()
    assert torch.equal(half, models.randn(4).bfloat16())
    assert len(large) == 1
    assert str(restored(plain(hessdiag.errors.Refused("so"), large), large)) == "so"


FACTORY = """
import os, time, torch, hessdiag
from torch import nn

class Slow(nn.Tanh):
    def forward(self, x):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return super().forward(x)

def make():
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    model = nn.Sequential(nn.Linear(6, 7), Slow(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return hessdiag.Problem(model, {"train": (x.double(), y)}, criterion="cross_entropy")
"""
COMMAND = ("analyze", "problem.py:make", "--method", "double_backward", "--quantities", "lambda_max,trace")
EAGER = "from hessdiag.resume import pace; pace.FIRST, pace.SHARE = 0, 1e9; from hessdiag.cli import main; main()"


def test_kill_9_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("problem.py").write_text(FACTORY)
    kept = Path(".hessdiag/cache/resume")
    whole = json.loads(call(*COMMAND, "--json")[1])
    assert not [path for path in kept.iterdir() if path.is_dir()]
    program = [sys.executable, "-c", EAGER, *COMMAND]
    with subprocess.Popen(program, env={**os.environ, "PAUSE": "0.03"}, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            lines = [file.read_bytes().count(b"\n") for file in kept.glob("*/found.jsonl")]
            if lines and lines[0] > 12:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    shutil.copytree(kept, "again")
    code, _, err = call(*COMMAND)
    assert code == 0
    assert "goes on from " in err
    assert "--fresh begins anew" in err
    assert not [path for path in kept.iterdir() if path.is_dir()]
    shutil.rmtree(kept)
    Path("again").rename(kept)
    found = json.loads(call(*COMMAND, "--json")[1])
    assert found["cost"]["seconds"] > 0.3  # of the process that was killed
    assert without_clocks(found) == without_clocks(whole)


def check_preflight(tmp_path: Path) -> None:
    """Floor, plan and self-test are those of the run that goes on."""
    left_by(QUICK, tmp_path)
    first, again = ready(QUICK), ready(QUICK)
    again.operator.floor *= 3  # as another order of sums on a GPU may
    checked = again.checked
    test, plan = checked.self_test, checked.plan
    again.checked = dataclasses.replace(
        checked,
        self_test=dataclasses.replace(test, symmetry=test.symmetry * 3 + 1e-9),
        plan=dataclasses.replace(plan, reason="another"),
        gradient_norm=checked.gradient_norm * (1 + 1e-5),
    )
    assert again.keep_in(tmp_path).startswith("goes on")
    assert again.operator.floor == first.operator.floor
    assert again.checked.self_test == first.checked.self_test
    assert again.checked.plan.reason != "another"
    assert numbers(again.run()) == uninterrupted(QUICK)
    again.kept.forget()


def test_floor_plan_and_self_test_are_loaded(tmp_path: Path) -> None:
    check_preflight(tmp_path)


def stage_of(kind: str) -> Callable[[Path], None]:
    """One kill, two thirds into a measurement."""

    def check(tmp_path: Path) -> None:
        expected = uninterrupted(kind)
        goes_on(kind, left_by(kind, tmp_path, ready(kind).products // 2), expected)

    return check


def without(**fields: Any) -> Callable[..., None]:
    """`repeat` of entries without some of their fields."""
    whole = effects.repeat
    return lambda op, found: whole(op, dataclasses.replace(found, **fields))


def unloaded(found: Kept, checked: Any) -> Any:
    going_on.taken(found, checked)
    return checked


def zeros(whole: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: {name: rows * 0 for name, rows in whole(*given).items()}


def unclaimed(self: Log) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    self._claim = SimpleNamespace(release=lambda: None)


@contextmanager
def heedless(found: Kept | None, operator: Curvature, _: Callable[[], bool]) -> Iterator[None]:
    with going_on.keeping(found, operator, lambda: False):
        yield


def raised(_: Kept, error: BaseException) -> None:
    raise error


def trusting(line: bytes) -> Entry:
    return Entry(**json.loads(line.partition(b", ")[2].rstrip()[:-1]))


BROKEN: dict[str, tuple[object, str, object, Callable[[Path], None]]] = {
    "products of before are not counted": (kept, "repeat", without(products=(0,)), stage_of(QUICK)),
    "what products showed is lost": (kept, "repeat", without(shown=None), stage_of(QUICK)),
    "what ran out of memory is not said": (kept, "repeat", without(notes=()), check_memory),
    "rows are left empty": (Log, "tensors", zeros(Log.tensors), stage_of("a kept graph")),
    "rows that are gone are called whole": (Log, "_whole", lambda *_: True, check_torn),
    "a damaged row is taken": (log, "checksum", lambda _: 0, check_torn),
    "a damaged line is taken": (log, "entry_of", trusting, check_torn),
    "floor and self-test are measured anew": (measuring, "taken", unloaded, check_preflight),
    "the clock begins anew": (Kept, "clock", lambda _: time.perf_counter(), check_budget),
    "any measurement goes on": (measuring, "name_of", lambda *_: "one", check_others),
    "another function goes on": (going_on, "_same", lambda *_: True, check_others),
    "what comes after Ctrl-C is kept": (measuring, "keeping", heedless, check_ended),
    "nobody is kept out": (Log, "claim", unclaimed, check_two),
    "a full disk ends the measurement": (Kept, "give_up", raised, check_full),
    "what is done stays": (Kept, "forget", lambda _: None, stage_of(QUICK)),
    "everything is written at once": (Pace, "due", lambda _, sizes: len(sizes), check_pace),
}


@pytest.mark.parametrize(("place", "name", "broken", "promise"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(
    place: object,
    name: str,
    broken: object,
    promise: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uninterrupted(QUICK), uninterrupted("a kept graph")
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(Exception):  # noqa: B017  (an assertion, or what the fault leads to)
        promise(tmp_path)
