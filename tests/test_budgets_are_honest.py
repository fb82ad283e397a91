"""Promise: budgets are kept; however it is ended, intervals hold and what is missing is said. (90 s)"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import hessdiag
from hessdiag.accuracy import EFFORTS, Budget, budget
from hessdiag.analysis import Measurement, run, so_far, spending, sweep
from hessdiag.analysis.so_far import Row, SoFar
from hessdiag.analysis.spending import Spending
from hessdiag.analysis.sweep import Sweep
from hessdiag.cli import measuring, progress
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.errors import Refused
from hessdiag.operator import SymmetricOperator, as_operator
from hessdiag.present.arriving import arriving, heartbeat
from hessdiag.results.interval import mean_interval, watched
from hessdiag.settings import Settings
from hessdiag.sources.factory import Built
from hessdiag.spectral import forms, lanczos
from hessdiag.track.follow import Follower
from tests import models
from tests.command import call
from tests.models import rotated
from tests.seeds import band, seeds
from tests.test_stderr_is_honest import SPECTRA, truth

SEEDS = seeds(2000)
ENDS = SEEDS // 3  # whole sweeps, 50 ms each
QUANTITIES = ("lambda_max", "lambda_min", "trace", "frobenius_squared", "effective_rank")
LEAST = 5  # three steps of the run and both ends verified: fewer say nothing
SURE = "failure=1e-6"  # of a certificate: none of a thousand may miss


def problem() -> hessdiag.Problem:
    """A network curved in every tensor, of 227 parameters: its trace comes from probes on H."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh()).double()
    return hessdiag.Problem(model, {"train": (models.randn(30, 12), models.randn(30, 7, seed=1))}, criterion="mse")


@functools.cache
def subject() -> Measurement:
    return Measurement(problem(), Settings(quantities=QUANTITIES, accuracy=SURE))


@functools.cache
def true() -> dict[str, float]:
    values = torch.linalg.eigvalsh(models.dense_hessian(problem()))
    return {
        "lambda_max": float(values[-1]),
        "lambda_min": float(values[0]),
        "trace": float(values.sum()),
        "frobenius_squared": float(values.square().sum()),
        "effective_rank": float(values.sum() ** 2 / values.square().sum()),
    }


def swept(seed: int, *, after: int | None = None, **options: Any) -> Any:
    """A sweep at a seed, interrupted after so many products."""
    settings, op = dataclasses.replace(subject().settings, seed=seed, **options), subject().operator
    before = op.products
    spent = Spending(settings.spending, op, 1e-3, time.perf_counter())

    def watch(_: int) -> None:
        spent.interrupted |= after is not None and op.products - before >= after

    op.watch = watch
    try:
        found = Sweep(op, settings, spent).run()
    finally:
        op.watch = op.room = None
    return found, op.products - before, spent


# ------------------------------------------------------------------------------------------ budgets of products


ASKED: dict[str, dict[str, Any]] = {
    "the usual": {"quantities": QUANTITIES},
    "an end": {"quantities": ("lambda_max",)},
    "ends": {"quantities": ("lambda_min",), "top": 4},
    "the trace": {"quantities": ("trace",)},
    "a number of probes": {"quantities": QUANTITIES, "probes": 32},
    "everything": {"quantities": hessdiag.results.QUANTITIES},
    "further starts": {"quantities": hessdiag.results.QUANTITIES, "density_probes": 3, "steps": 12},
}


@pytest.mark.parametrize("asked", ASKED)
def test_products_are_kept_to_the_last(asked):
    for amount in (1, 5, 6, 9, 14, 22, 31, 45, 60, 90):
        options = ASKED[asked]
        quantities = options["quantities"]
        found, products, spent = swept(amount, budget=f"{amount}p", **options)
        assert products <= max(amount, LEAST + options.get("top", 1) - 1), (amount, products)
        missing = [name for name in quantities if name != "density" and name not in found.metrics]
        assert not missing or "budget" in found.warnings[0]
        said = " ".join(found.warnings)
        assert all(name in said or "follows" in said or "the density" in said for name in missing)
        assert spent.repeatable


def test_a_budget_is_spent_where_there_is_use_for_it():
    """Nothing is kept back that no later stage takes."""
    for amount in (20, 30, 40):
        found, products, _ = swept(0, budget=f"{amount}p")
        assert products >= amount - 1, found.warnings
    found, products, _ = swept(0, budget="40p", accuracy="trace=0.9,frobenius_squared=0.5")
    assert len(found.forms.trace) <= 12 and found.krylov.size >= 26  # what was foreseen a step before


def test_a_larger_budget_knows_more():
    widths = []
    for amount in (10, 20, 40):
        metric = swept(3, budget=f"{amount}p")[0].metrics["lambda_max"]
        widths.append(metric.hi - metric.lo)
    assert widths[0] > widths[1] > widths[2]


def test_the_same_budget_of_products_gives_the_same_again():
    first, again = (swept(1, budget="25p")[0].metrics for _ in range(2))
    assert first["frobenius_squared"].per_probe == again["frobenius_squared"].per_probe


def test_time_that_is_over_leaves_the_least(monkeypatch):
    found, products, spent = swept(0, budget="1s")
    assert spent.repeatable
    clock = iter(np.arange(0.0, 1e6, 10.0))
    monkeypatch.setattr(spending.time, "perf_counter", lambda: float(next(clock)))
    found, products, spent = swept(0, budget="1s")
    assert products == LEAST and not spent.repeatable
    assert found.metrics["lambda_max"].hi >= true()["lambda_max"] >= found.metrics["lambda_max"].lo
    assert "budget of 1 seconds ended it" in found.warnings[0] and "trace" in found.warnings[-1]


def test_a_clock_is_kept_by_products_that_take_time(monkeypatch):
    """Every product takes a second: a budget of 40 s is that of 40 products."""
    op, began = subject().operator, subject().operator.products
    monkeypatch.setattr(spending.time, "perf_counter", lambda: float(op.products - began))
    for amount in (15, 25, 40):
        began = op.products
        _, products, _ = swept(0, budget=f"{amount}s")
        assert amount - 9 <= products <= amount + 1  # nothing fresh is begun that cannot be eight probes


def test_gradients_that_cannot_end_are_not_begun_in_vain():
    small = hessdiag.Problem(
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)),
        {"train": (models.randn(64, 4).float(), torch.arange(64) % 2)},
        criterion="cross_entropy",
    )
    op = Measurement(small, Settings(quantities=("trace",), batch_size=8)).operator
    whole = gauss_newton_trace(op)
    assert not isinstance(whole, Refused)
    left = iter([10.0, 10.0, 10.0, *[8.0] * 100])  # an eighth of the examples took a fifth of the time
    op.room = lambda: next(left)
    ended = gauss_newton_trace(op)
    assert isinstance(ended, Refused) and "ended" in ended.reason
    assert next(left) == 8.0


# ---------------------------------------------------------------------------------------------- ends at random


@functools.cache
def ended() -> list[tuple[dict[str, tuple[float, float]], int]]:
    """Intervals of sweeps interrupted after a random number of products."""
    chance, rows = np.random.default_rng(0), []
    for seed in range(ENDS):
        found, products, _ = swept(seed, after=int(chance.integers(1, 90)))
        rows.append(({name: (m.lo, m.hi) for name, m in found.metrics.items()}, products))
        if "trace" in found.metrics:  # the parts are of the same probes as the whole
            assert sum(layer.trace for layer in found.layers) == pytest.approx(found.metrics["trace"].value)
    return rows


def shares(rows: list[tuple[dict[str, tuple[float, float]], int]]) -> dict[str, tuple[float, int]]:
    """How often each interval held, and of how many."""
    found = {}
    for name, value in true().items():
        held = [row[name][0] <= value <= row[name][1] for row, _ in rows if name in row]
        found[name] = (float(np.mean(held)), len(held))
    return found


@pytest.mark.coverage
def test_intervals_hold_whenever_it_is_interrupted():
    held = shares(ended())
    assert held["lambda_max"] == held["lambda_min"] == (1.0, ENDS)
    for name in ("trace", "frobenius_squared", "effective_rank"):
        share, number = held[name]
        low, high = band(number, 0.92, 0.97)
        assert number > ENDS / 4 and low <= share <= high, (name, held)


def watching(name: str, index: int, confidence: Callable[[int], float]) -> float:
    """How often the interval shown last holds, when somebody ends it as soon as one is narrow."""
    eigenvalues, steps, _ = SPECTRA[name]
    op, value = as_operator(rotated(eigenvalues, seed=6)), truth(name)[index]
    op.block, held = 8, []
    narrow = _typical(name, index)
    for seed in range(SEEDS):
        shown: list[tuple[float, float]] = []

        def look(found: Any, shown: list[tuple[float, float]] = shown) -> None:
            samples = (found.trace, found.squares)[index]
            shown.append(mean_interval(samples, confidence(len(shown) + 1))[1:])

        op.room = lambda shown=shown: 0 if shown and shown[-1][1] - shown[-1][0] <= narrow else math.inf
        forms(op, lanczos(op, steps=steps, seed=seed) if steps else None, 64, seed, on_block=look)
        held.append(shown[-1][0] <= value <= shown[-1][1])
    return float(np.mean(held))


@functools.cache
def _typical(name: str, index: int) -> float:
    """The width of half of all intervals after 24 probes."""
    eigenvalues, steps, _ = SPECTRA[name]
    op, widths = as_operator(rotated(eigenvalues, seed=6)), []
    for seed in range(40):
        found = forms(op, lanczos(op, steps=steps, seed=seed) if steps else None, 24, seed)
        _, lo, hi = mean_interval((found.trace, found.squares)[index], 0.95)
        widths.append(hi - lo)
    return float(np.median(widths))


@pytest.mark.coverage
@pytest.mark.parametrize("index", [0, 1], ids=["trace", "square"])
def test_who_watches_and_ends_it_when_it_is_narrow_gets_what_holds(index):
    assert watching("trained", index, lambda look: watched(0.95, look)) >= band(SEEDS)[0]


def test_intervals_are_wider_for_who_saw_them(monkeypatch):
    monkeypatch.setattr(so_far, "PAUSE", 0.0)

    def end(found: SoFar) -> None:
        if found.probes:
            measurement.interrupt()

    measurement = Measurement(problem(), Settings(quantities=QUANTITIES, probes=40))
    seen = measurement.run(look=end)
    unseen = measurement.run(
        progress=lambda _stage, done, _total: done >= seen.cost.products and measurement.interrupt()
    )
    assert seen.cost.products == unseen.cost.products
    ours, theirs = seen.metrics["frobenius_squared"], unseen.metrics["frobenius_squared"]
    assert ours.per_probe == theirs.per_probe and ours.confidence == theirs.confidence == 0.95
    assert ours.hi - ours.lo > 1.05 * (theirs.hi - theirs.lo)
    assert any("somebody who saw the numbers" in note for note in seen.notes)
    assert not any("somebody who saw the numbers" in note for note in unseen.notes)
    assert "interrupted" in seen.warnings[0]


def test_asked_before_it_begins_it_ends_at_the_least():
    measurement = Measurement(problem(), Settings(quantities=QUANTITIES))
    measurement.interrupt()
    assert measurement.run().cost.products == LEAST
    assert measurement.run().cost.products > LEAST  # and only that one


def test_what_was_ended_is_not_kept_as_finished():
    def followed(end: bool, **options: Any) -> list[str]:
        kept: list[str] = []
        follower = Follower(
            Settings(quantities=("lambda_max", "trace"), **options), keep=lambda key, *_: kept.append(key)
        )

        def measured(measurement: Measurement, /, *, warm: Any) -> hessdiag.Analysis:
            if end:
                measurement.interrupt()
            return measurement.run(warm=warm)

        assert follower.point("a", "a", lambda: Built(problem(), None, ()), measured).analysis is not None
        return kept

    assert len(followed(end=False)) == len(followed(end=False, budget="9p")) == 1
    assert followed(end=True) == followed(end=False, budget="0.0001s") == []


# ---------------------------------------------------------------------------------------------- what is shown


def looks() -> tuple[list[SoFar], hessdiag.Analysis]:
    seen: list[SoFar] = []
    return seen, Measurement(problem(), Settings()).run(look=seen.append)


def test_numbers_arrive_and_only_get_better(monkeypatch):
    monkeypatch.setattr(so_far, "PAUSE", 0.0)
    seen, found = looks()
    assert [row.quantity for row in seen[0].rows] == list(hessdiag.results.QUANTITIES)
    assert all(before.products <= after.products <= after.foreseen for before, after in itertools.pairwise(seen))
    ends = [row for one in seen[:-1] for row in one.rows if row.quantity == "lambda_max" and row.hi is not None]
    assert all(after.hi <= before.hi * (1 + 1e-9) for before, after in itertools.pairwise(ends))
    assert len({row.hi for row in ends}) > 5  # the certificates of the run as it goes on
    last = {row.quantity: row for row in seen[-1].rows}
    assert all(row.state == "known" for row in last.values())
    for name, metric in found.metrics.items():
        assert (last[name].value, last[name].lo, last[name].hi) == (metric.value, metric.lo, metric.hi)
    states = [{row.quantity: row.state for row in one.rows} for one in seen]
    assert states[0]["frobenius_squared"] == "waiting"
    assert any(state["frobenius_squared"] == "narrowing" for state in states)


def test_a_look_is_told_a_few_times_per_second_only(monkeypatch):
    monkeypatch.setattr(so_far, "PAUSE", 1e9)
    seen, _ = looks()
    assert 2 <= len(seen) <= 6  # the first, and each stage's


def now(width: int) -> list[str]:
    rows = (
        Row("lambda_max", 3.5312, 3.5312, 3.551, "narrowing", 5.6e-3, 1e-3),
        Row("frobenius_squared", -1.23456e-7, -1.3e-7, -1.2e-7, "known"),
        Row("effective_rank", waits="trace, ‖H‖_F²"),
        Row("negative_mass", 0.05, 0.01, 0.9, "known"),
        Row("density", state="narrowing", reached=0.41, asked=0.35),
    )
    console = Console(width=width, record=True, file=io.StringIO())
    shown = arriving(SoFar(rows, 34, 78, 8), 41.3, width=width, title="2 of 5", hint=measuring.HINT)
    console.print(shown)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [40, 80])
def test_the_table_fits_the_terminal(width):
    lines = now(width)
    assert all(len(line.rstrip()) <= width for line in lines)
    assert len(lines) == 5 + 3 + (width == 80)  # no row is folded
    text = "\n".join(lines)
    for part in ("lambda_max", "[3.53", "3.55", "error 0.41", "34 of about 78 products", "Ctrl-C"):
        assert part in text
    if width == 80:
        assert "0.0056, asked 0.001" in text and "waits for trace, ‖H‖_F²" in text and "41 s" in text


def test_a_log_gets_a_line_now_and_then(monkeypatch, tmp_path):
    row = Row("lambda_max", 3.531, 3.531, 3.55, "narrowing", 5e-3, 1e-3)
    line = heartbeat(SoFar((row, Row("trace")), 34, 78), 41.2)
    assert line == (
        "34 of about 78 products, 41 s, about 53 s to go; now lambda_max; "
        "lambda_max 3.5310 [3.5310, 3.5500], trace not yet"
    )
    arguments = ("analyze", "hessdiag.sources.digits:problem", "--samples", "64", "--quantities", "lambda_max")
    _, _, err = call(*arguments)
    assert "products, 0 s" not in err
    monkeypatch.setattr(progress, "EVERY", 0.0)
    _, again, err = call(*arguments)
    assert "products, 0 s" not in again and "products, 0 s" in err and "; now " in err
    assert "products, 0 s" not in call(*arguments, "--quiet")[2]


def test_other_long_work_is_heard_of_too(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said: list[str] = []
    monkeypatch.setattr(progress, "message", said.append)
    with progress.display(quiet=False) as report:
        report("products", 3, 40)
    assert said == ["  products 3/40: 0 s"]


# ---------------------------------------------------------------------------------------------- Ctrl-C


SLOW = """
import os, pathlib, time
import torch
from torch import nn
import hessdiag

CALLS = pathlib.Path("calls")

class Slow(nn.Linear):
    def forward(self, x):
        with CALLS.open("a") as file:
            file.write(".")
        time.sleep(0.03)
        return super().forward(x).tanh()

def slow():
    torch.manual_seed(0)
    x = torch.randn(20, 60)
    return hessdiag.Problem(Slow(60, 5), {"train": (x, torch.randn(20, 5))}, criterion="mse")
"""


def interrupted(folder: Path, times: int, *, measuring: bool = True) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that gets so many signals, each after a pass through the model."""
    folder.mkdir()
    (folder / "slow.py").write_text(SLOW)
    command = [
        sys.executable,
        "-m",
        "hessdiag",
        "analyze",
        "slow.py:slow",
        "-o",
        "out",
        "--method",
        "double_backward",
    ]
    command += ["--batch-size", "20", "--no-second-opinion", "--accuracy", "lambda_min=1e-7"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    with (folder / "err").open("w") as err, (folder / "out.txt").open("w") as out:
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)
    calls, said = folder / "calls", folder / "err"

    def passed(number: int) -> None:
        begin = calls.stat().st_size if calls.exists() else 0
        while child.poll() is None and (not calls.exists() or calls.stat().st_size < begin + number):
            time.sleep(0.002)

    while measuring and child.poll() is None and "products, " not in said.read_text():
        time.sleep(0.002)
    passed(4)
    for _ in range(times):
        child.send_signal(signal.SIGINT)
        passed(1)
    code = child.wait(60)
    return code, (folder / "out.txt").read_text(), said.read_text()


def test_ctrl_c_once_gives_the_answer_so_far(tmp_path):
    code, out, err = interrupted(tmp_path / "a", 1)
    found = json.loads((tmp_path / "a" / "out" / "run.json").read_text())
    assert code == 0, err
    assert "lambda_max" in out and "Traceback" not in err
    assert "interrupted" in found["warnings"][0]
    assert f"interrupted: the numbers are those of {found['cost']['products']} products" in err
    assert "again Ctrl-C ends at once" in err
    assert found["cost"]["products"] < 60


def test_ctrl_c_twice_ends_at_once(tmp_path):
    code, out, err = interrupted(tmp_path / "a", 2)
    assert (code, out) == (130, "") and err.splitlines()[-1].startswith(
        "hessdiag: interrupted; nothing half-written"
    )
    assert not list((tmp_path / "a" / "out").glob("*"))


def test_ctrl_c_before_measuring_ends_at_once(tmp_path):
    code, out, err = interrupted(tmp_path / "a", 1, measuring=False)
    assert (code, out) == (130, "") and "Traceback" not in err


class Nobody:
    """A measurement that is only interrupted."""

    interrupts = 0

    def interrupt(self) -> None:
        self.interrupts += 1


def test_the_signal_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    nobody = Nobody()
    with pytest.raises(KeyboardInterrupt), measuring.CtrlC(nobody) as ctrl_c:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert ctrl_c.pressed and nobody.interrupts == 1
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is before
    with measuring.CtrlC(nobody):
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_that_are_not_ours_are_left_alone():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with measuring.CtrlC(Nobody()):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with measuring.CtrlC(Nobody()):
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failed and signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------------- what is asked


REFUSED = {
    "--budget soon": "60s",
    "--budget 0s": "60s",
    "--budget -5p": "60s",
    "--budget 60": "60s",
    "--budget nans": "60s",
    "--budget infs": "60s",
    "--budget 10d": "60s",
    "--accuracy trace": "trace=0.5%",
    "--accuracy trace=": "trace=0.5%",
    "--accuracy tracy=1%": "lambda_max",
    "--accuracy trace=0": "between 0 and 1",
    "--accuracy trace=100%": "between 0 and 1",
    "--accuracy trace=nan": "between 0 and 1",
    "--effort heroic": "thorough",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(text):
    code, out, err = call("analyze", "hessdiag.sources.digits:problem", *text.split(" ", 1))
    assert (code, out) == (2, "") and REFUSED[text] in err and len(err.splitlines()) == 1


def test_budgets_are_read():
    assert [budget(text) for text in ("90s", "1.5m", "2min", "1h", "200p", "500g", " 7p ")] == [
        Budget(90, "s"),
        Budget(90, "s"),
        Budget(120, "s"),
        Budget(3600, "s"),
        Budget(200, "p"),
        Budget(500, "g"),
        Budget(7, "p"),
    ]


def test_more_effort_takes_more_products_and_knows_more():
    products, widths = [], []
    for effort in EFFORTS:
        found = swept(0, effort=effort, accuracy=None, quantities=(*QUANTITIES, "density"))
        products.append(found[1])
        widths.append(found[0].metrics["lambda_min"].hi - found[0].metrics["lambda_min"].lo)
    # thorough is surer too, by a thousand times, which costs width where all are narrower than asked
    assert products[0] < products[1] < products[2] and widths[0] > max(widths[1:])


# ---------------------------------------------------------------------------------------------- breakages


def test_a_person_who_ends_it_when_it_is_narrow_would_be_noticed():
    assert watching("trained", 0, lambda _: 0.95) < band(SEEDS)[0]


def without_upper_certificates() -> float:
    rows = [
        ({**row, "lambda_max": (row["lambda_max"][0], row["lambda_max"][0] * 1.0001)}, n) for row, n in ended()
    ]
    return shares(rows)["lambda_max"][0]


def test_a_missing_certificate_would_be_noticed():
    assert without_upper_certificates() < 1


def finishes(self: SymmetricOperator, wanted: int, least: int = 1) -> int:
    return wanted if self.left >= 1 or least else 0


BROKEN: dict[str, tuple[object, str, object, Callable[..., None]]] = {
    "a block that was begun is finished": (
        SymmetricOperator,
        "granted",
        finishes,
        lambda: test_products_are_kept_to_the_last("a number of probes"),
    ),
    "the verification is on top": (
        sweep,
        "verified",
        lambda _: 0,
        lambda: test_products_are_kept_to_the_last("ends"),
    ),
    "further starts are always drawn": (
        run,
        "FEWEST_STEPS",
        0,
        lambda: test_products_are_kept_to_the_last("further starts"),
    ),
    "the run leaves what nobody takes": (
        sweep,
        "probes_for",
        lambda *_: 64,
        test_a_budget_is_spent_where_there_is_use_for_it,
    ),
    "gradients go on until the time is over": (
        sys.modules["hessdiag.engine.squares.gauss_newton"],
        "SLOWER",
        1e9,
        test_gradients_that_cannot_end_are_not_begun_in_vain,
    ),
    "who saw the numbers gets the usual intervals": (
        sweep,
        "watched",
        lambda confidence, _: confidence,
        lambda: test_intervals_are_wider_for_who_saw_them(pytest.MonkeyPatch()),
    ),
    "an answer so far is kept as finished": (
        Spending,
        "repeatable",
        True,
        test_what_was_ended_is_not_kept_as_finished,
    ),
    "an interrupt before it begins is lost": (
        Measurement,
        "interrupt",
        lambda _: None,
        test_asked_before_it_begins_it_ends_at_the_least,
    ),
    "the handler stays": (
        measuring.CtrlC,
        "_give_back",
        lambda _: signal.default_int_handler,
        test_the_signal_is_given_back,
    ),
    "the table is made for wide terminals": (
        sys.modules["hessdiag.present.arriving"],
        "WIDE",
        0,
        lambda: test_the_table_fits_the_terminal(40),
    ),
}


@pytest.mark.parametrize(("place", "name", "broken", "promise"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(place, name, broken, promise, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(place, name, broken)
    try:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            promise()
    finally:
        signal.signal(signal.SIGINT, before)
