"""Promise: a Tracker's numbers are those of the weights at that step, within its time, and resume. (40 s)

Oracles: a dense Hessian by torch.func, the same measurement of a frozen copy, a clock that counts products.
"""

from __future__ import annotations

import copy
import io
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import HessdiagError, UsageError
from hessdiag.problem import Problem
from hessdiag.spectral import warm as warming
from hessdiag.track import pacing
from hessdiag.track.measured import COLUMNS
from hessdiag.track.saved import load
from hessdiag.track.watch import Watch
from tests.command import call
from tests.models import dense_hessian, labels, randn

X, Y = randn(48, 6), labels(48, 3)
ASKED = ("lambda_max", "lambda_min", "trace")


class Run:
    """Full-batch gradient descent on a small network, with a tracker."""

    def __init__(self, lr=0.3, seed=0, **options):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        asked = {"every": 2, "budget": None, "quantities": ASKED, "optimizer": self.optimizer, **options}
        self.tracker = hessdiag.Tracker(self.model, nn.CrossEntropyLoss(), (X, Y), **asked)
        self.copies = {}

    def train(self, begin, end):
        for step in range(begin, end):
            if self.tracker.step(step) is not None:
                self.copies[step] = copy.deepcopy(self.model)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(X), Y).backward()
            self.optimizer.step()
        return self


@pytest.fixture(scope="module")
def run():
    return Run().train(0, 9)


def faults(history, copies):
    """What rows get wrong, against the dense Hessian of each step's weights."""
    found = []
    for step, model in copies.items():
        H = dense_hessian(Problem(model, {"train": (X, Y)}, criterion="cross_entropy"))
        eigenvalues = torch.linalg.eigvalsh(H)
        truth = {"lambda_max": eigenvalues[-1], "lambda_min": eigenvalues[0], "trace": H.trace()}
        for name, true in truth.items():
            (row,) = history[(history.step == step) & (history.quantity == name)].itertuples()
            room = 1e-9 * float(eigenvalues.abs().max())
            if not row.lo - room <= float(true) <= row.hi + room:
                found.append((step, name))
    return found


def test_values_are_those_of_the_weights_at_that_step(run):
    assert list(run.copies) == [0, 2, 4, 6, 8]
    assert list(run.tracker.history.columns) == list(COLUMNS)
    assert len(run.tracker.history) == 5 * len(ASKED)
    assert faults(run.tracker.history, run.copies) == []
    moved = run.tracker.history[run.tracker.history.quantity == "trace"].value
    assert moved.nunique() == 5


def test_values_equal_analyze_on_a_frozen_copy():
    first = Run().train(0, 1)
    found = hessdiag.analyze(first.copies[0], nn.CrossEntropyLoss(), (X, Y), quantities=ASKED, effort="quick")
    for row in first.tracker.history.itertuples():
        metric = found[row.quantity]
        assert (row.value, row.lo, row.hi, row.how) == (metric.value, metric.lo, metric.hi, metric.kind)


def test_lr_and_its_limit():
    run = Run(lr=0.25).train(0, 1)
    assert set(run.tracker.history.lr) == {0.25}
    (point,) = run.tracker.trajectory.points
    assert point.rate.limit == 2 / 0.25
    told = Run(optimizer=None)
    told.tracker.step(0, lr=0.5)
    told.tracker.step(2)
    rates = [point.rate for point in told.tracker.trajectory.points]
    assert rates[0].limit == 4.0 and rates[1] is None
    assert told.tracker.history.lr.isna().tolist() == [False] * 3 + [True] * 3


def test_adam_has_no_such_limit():
    run = Run()
    adam = torch.optim.Adam(run.model.parameters(), lr=0.01)
    tracker = hessdiag.Tracker(
        run.model, nn.CrossEntropyLoss(), (X, Y), quantities=["trace"], optimizer=adam, budget=None
    )
    tracker.step(0, lr=0.02)
    assert tracker.trajectory.points[0].rate is None and set(tracker.history.lr) == {0.02}
    assert "scales each direction" in tracker.trajectory.notes[0]


def test_preconditioned_lambda_max_waits_for_the_first_step():
    run = Run()
    adam = torch.optim.Adam(run.model.parameters(), lr=0.01)
    quantities = ["trace", "preconditioned_lambda_max"]
    tracker = hessdiag.Tracker(
        run.model, nn.CrossEntropyLoss(), (X, Y), quantities=quantities, optimizer=adam, budget=None, every=1
    )
    tracker.step(0)
    nn.functional.cross_entropy(run.model(X), Y).backward()
    adam.step()
    tracker.step(1)
    rows = tracker.history.set_index(["step", "quantity"])
    assert rows.loc[(0, "trace"), "reason"] == "" and "never stepped" in rows.loc[(0, quantities[1]), "reason"]
    asked = {"quantities": quantities[1], "optimizer": adam, "effort": "quick"}
    alone = hessdiag.analyze(run.model, nn.CrossEntropyLoss(), (X, Y), **asked)
    assert rows.loc[(1, quantities[1]), "value"] == pytest.approx(alone[quantities[1]].value, rel=1e-6)


class Counting:
    """A clock that knows products and training steps only: 1 second each."""

    def __init__(self, monkeypatch):
        self.products = self.steps = 0
        multiply = Curvature.multiply

        def counted(operator, rows):
            self.products += len(rows)
            return multiply(operator, rows)

        monkeypatch.setattr(Curvature, "multiply", counted)
        monkeypatch.setattr(pacing, "clock", lambda: float(self.products + self.steps))


def budget_is_held(monkeypatch, caplog):
    clock = Counting(monkeypatch)
    run = Run(budget="20%", quantities=["lambda_max"], every=5)
    shares, measured, first = [], [], None
    for step in range(1000):
        clock.steps = step
        if run.tracker.step(step) is not None:
            measured.append(step)
            first = first or clock.products
        if step >= 10 * first:
            shares.append(clock.products / (clock.products + step))
            # the next one's cost is not known before: it may take a product more than the last
            assert shares[-1] <= 0.202
    assert shares[-1] > 0.15, "it could have measured more"
    assert all(step % 5 == 0 for step in measured) and 5 < len(measured) < 200
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "budget='20%'" in said[0] and "rather than every 5" in said[0]
    return measured


def test_the_budget_is_held_by_measuring_less_often(monkeypatch, caplog):
    budget_is_held(monkeypatch, caplog)


def test_without_a_budget_every_due_step_is_measured(monkeypatch):
    Counting(monkeypatch)
    run = Run(quantities=["trace"]).train(0, 20)
    assert run.tracker.history.step.tolist() == list(range(0, 20, 2))


def test_steps_that_are_skipped_over_are_due():
    assert [
        step for last, step in ((None, 3), (3, 9), (9, 12), (12, 12), (12, 18)) if pacing.due(step, last, 5)
    ] == [
        9,
        12,
        18,
    ]


def products_to_settle(analysis, true):
    ritz = np.array(analysis.convergence.ritz_max)
    return int(np.argmax(np.abs(ritz - true) <= 1e-3 * abs(true))) + 1


def warm_start_saves():
    """Products until λ_max is within 1e-3 of the dense one, warm against cold, over a training."""
    torch.manual_seed(0)
    x, y = randn(200, 20) * torch.linspace(0.2, 3, 20, dtype=torch.float64), labels(200, 4)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    asked = {"quantities": ["lambda_max"], "effort": "normal"}
    tracker = hessdiag.Tracker(model, nn.CrossEntropyLoss(), (x, y), every=5, budget=None, **asked)
    spent = {"warm": 0, "cold": 0}
    for step in range(31):
        found = tracker.step(step)
        if found is not None and step > 0:
            cold = hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y), **asked)
            H = dense_hessian(Problem(copy.deepcopy(model), {"train": (x, y)}, criterion="cross_entropy"))
            true = float(torch.linalg.eigvalsh(H)[-1])
            assert found["lambda_max"].lo <= true * (1 + 1e-9) and true <= found["lambda_max"].hi * (1 + 1e-9)
            spent["warm"] += products_to_settle(found, true)
            spent["cold"] += products_to_settle(cold, true)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert spent["warm"] <= 0.75 * spent["cold"], spent


def test_a_warm_start_settles_sooner():
    warm_start_saves()


def kept(state):
    """Through a file, as checkpoints go."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def resumes():
    whole = Run().train(0, 12)
    first = Run().train(0, 5)
    second = Run(seed=7)  # the user loads weights and optimizer
    second.model.load_state_dict(first.model.state_dict())
    second.tracker.load_state_dict(kept(first.tracker.state_dict()))
    second.train(5, 12)
    columns = [name for name in COLUMNS if name != "seconds"]
    ours, theirs = second.tracker.history[columns], whole.tracker.history[columns]
    assert ours.to_csv() == theirs.to_csv()
    assert [p.warm for p in second.tracker.trajectory.points] == [p.warm for p in whole.tracker.trajectory.points]
    return second


def test_resumed_equals_uninterrupted():
    second = resumes()
    assert faults(second.tracker.history, second.copies) == []


def test_time_between_two_parts_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pacing, "clock", lambda: now[0])
    first = Run(budget="50%")
    first.tracker.step(0)
    now[0] = 100.0
    first.tracker.step(1)
    state = kept(first.tracker.state_dict())
    now[0] = 1e6
    second = Run(budget="50%")
    second.tracker.load_state_dict(state)
    second.tracker.step(3)
    assert second.tracker._pace.elapsed == 100.0


def test_a_state_of_other_samples_is_refused():
    state = Run().tracker.state_dict()
    other = hessdiag.Tracker(Run().model, nn.CrossEntropyLoss(), (X[:20], Y[:20]))
    with pytest.raises(UsageError, match="other samples"):
        other.load_state_dict(state)
    with pytest.raises(UsageError, match="update hessdiag"):
        other.load_state_dict({**state, "version": 99})


def diverge(model):
    with torch.no_grad():
        model[0].weight.fill_(math.nan)


def freeze(model):
    model[0].weight.requires_grad_(False)


def forbid(model):
    model[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no such thing")))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(diverge, "NaN"), (freeze, "27 at first|parameters count now"), (forbid, "no such thing")],
)
def test_what_cannot_be_measured_is_a_row_with_the_reason(spoil, reason, caplog):
    run = Run().train(0, 1)
    spoil(run.model)
    assert run.tracker.step(2) is None and run.tracker.step(4) is None
    rows = run.tracker.history[run.tracker.history.step > 0]
    assert len(rows) == 2 * len(ASKED) and rows.value.isna().all()
    assert rows.reason.str.contains(reason).all() and not rows.reason.str.contains("\n").any()
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1, "said once"
    assert run.tracker.trajectory.failed and run.tracker.plot().axes


def test_after_a_failure_it_goes_on():
    run = Run().train(0, 1)
    good = copy.deepcopy(run.model.state_dict())
    diverge(run.model)
    run.tracker.step(2)
    run.model.load_state_dict(good)
    run.tracker.step(4)
    assert [p.error == "" for p in run.tracker.trajectory.points] == [True, False, True]


def test_what_it_saves_is_read_by_track_and_compare(run, tmp_path):
    folder = run.tracker.save(tmp_path / "run")
    back = load(folder)
    assert [p.at for p in back.points] == [0, 2, 4, 6, 8]
    assert back.to_json() == load(run.tracker.save(tmp_path / "run")).to_json()
    for ours, theirs in zip(run.tracker.trajectory.points, back.points, strict=True):
        assert ours.analysis.to_json() == theirs.analysis.to_json() and ours.rate == theirs.rate
    code, out, err = call("track", str(folder), "-o", str(tmp_path / "page"))
    assert code == 0 and "step 8" in out, err
    assert (tmp_path / "page" / "report.html").is_file() and (tmp_path / "page" / "evolution.svg").is_file()
    code, out, err = call("compare", str(folder / "step-0000000"), str(folder / "step-0000008"))
    assert code == 0 and "trace" in out, err
    assert call("track", str(tmp_path))[::2][0] == 2
    assert call("track", str(folder), "-o", str(folder))[0] == 2


def test_no_run_of_an_earlier_training_stays(run, tmp_path):
    run.tracker.save(tmp_path)
    Run().train(0, 3).tracker.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step-0000000", "step-0000002"]


def test_the_picture_shows_the_rows(run):
    figure = run.tracker.plot()
    ax = figure.axes[0]
    (line,) = [one for one in ax.get_lines() if one.get_gid() == "lambda_max"]
    rows = run.tracker.history[run.tracker.history.quantity == "lambda_max"]
    assert line.get_xydata().tolist() == rows[["step", "value"]].to_numpy().tolist()
    (band,) = [one for one in ax.collections if one.get_gid() == "band"]
    heights = {tuple(v) for v in band.get_paths()[0].vertices.tolist()}
    assert {(float(r.step), end) for r in rows.itertuples() for end in (r.lo, r.hi)} <= heights
    (limit,) = [one for one in ax.patches if one.get_gid() == "limit"]
    assert set(limit.get_data().values.tolist()) == {2 / 0.3}
    assert figure.axes[-1].get_xlabel() == "training step"


class Display:
    def __init__(self):
        self.shown = []

    def display(self, obj, raw, display_id):
        self.shown.append(obj)
        return self

    def update(self, obj, raw):
        self.shown.append(obj)


def test_in_a_notebook_one_display_is_updated(monkeypatch):
    import sys
    from types import SimpleNamespace

    page = Display()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))
    monkeypatch.setitem(sys.modules, "IPython.display", page)
    monkeypatch.setattr("hessdiag.track.tracker.DRAWING", 1e9)
    run = Run()
    run.tracker.plot(live=True)
    run.train(0, 5)
    pictures = [one["image/svg+xml"] for one in page.shown[1:]]
    assert len(page.shown) == 4 and all(text.startswith("<svg") for text in pictures)
    assert len(set(pictures)) == 3


def test_outside_of_a_notebook_nothing_is_shown(run):
    assert run.tracker.plot(live=True).axes and not run.tracker._live.shown
    with pytest.raises(UsageError, match="no picture"):
        Run().tracker.plot()


WRONG = {
    "every=0": {"every": 0},
    "budget='7'": {"budget": "7"},
    "budget='fast'": {"budget": "fast"},
    "lambda_mox": {"quantities": ["lambda_mox"]},
    "no_such": {"no_such": 1},
}


@pytest.mark.parametrize("text", WRONG)
def test_bad_options_are_refused_before_training(text):
    with pytest.raises(HessdiagError, match=text.split("=")[0]) as refused:
        Run(**WRONG[text])
    assert "\n" not in str(refused.value)


def test_a_model_loss_and_data_in_a_tuple_are_the_same():
    run = Run()
    tracker = hessdiag.Tracker((run.model, nn.CrossEntropyLoss(), (X, Y)), quantities=ASKED, budget=None)
    problem = hessdiag.Tracker(Problem.of(run.model, nn.CrossEntropyLoss(), (X, Y)), quantities=ASKED, budget=None)
    for one in (tracker, problem, run.tracker):
        one.step(0)
    columns = ["quantity", "value", "lo", "hi", "how"]
    assert tracker.history[columns].equals(problem.history[columns])
    assert tracker.history[columns].equals(run.tracker.history[columns])


def test_samples_are_drawn_once():
    reads = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self):
            return 48

        def __getitem__(self, index):
            reads.append(index)
            return X[index] + torch.rand((), dtype=torch.float64), Y[index]

    run = Run()
    tracker = hessdiag.Tracker(
        run.model, nn.CrossEntropyLoss(), Counted(), every=1, quantities=["trace"], budget=None
    )
    before = len(reads)
    for step in range(3):
        tracker.step(step)
    assert len(reads) == before
    assert tracker.history.value.nunique() == 1


def stale_weights(self, step, lr, own=Watch.measure):
    held = self.__dict__.setdefault("held", copy.deepcopy(self.problem.model))
    live, self.problem.model = self.problem.model, held
    try:
        return own(self, step, lr)
    finally:
        self.problem.model = live


def forget_direction(self, state, points, own=Watch.resume):
    own(self, {**state, "warm": None}, points)


BROKEN = {
    "the first weights are measured again": (
        lambda *_: test_values_are_those_of_the_weights_at_that_step(Run().train(0, 9)),
        (Watch, "measure", stale_weights),
    ),
    "nothing holds the budget": (budget_is_held, (pacing.Pace, "allows", lambda self: True)),
    "the budget forbids all but one": (
        budget_is_held,
        (pacing.Pace, "allows", lambda self: self.cost == 0),
    ),
    "a warm start that is none": (lambda *_: warm_start_saves(), (warming, "SHARE", 0.0)),
    "the vector is lost with the state": (lambda *_: resumes(), (Watch, "resume", forget_direction)),
    "narrower intervals than are true": (
        lambda *_: test_values_are_those_of_the_weights_at_that_step(Run().train(0, 9)),
        (hessdiag.track.measured.Measured, "rows", None),
    ),
}


def too_narrow(self, quantities, own=hessdiag.track.measured.Measured.rows):
    for row in own(self, quantities):
        yield {**row, "lo": row["value"] * 1.001, "hi": row["value"] * 1.001}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch, caplog):
    promise, (where, what, broken) = BROKEN[name]
    monkeypatch.setattr(where, what, too_narrow if broken is None else broken)
    with pytest.raises(AssertionError):
        promise(monkeypatch, caplog)
