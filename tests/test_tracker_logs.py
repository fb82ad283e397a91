"""Promise: a Tracker hands numbers and figures to the loggers people have; none of them ends a training. (17 s)

Oracles: TensorBoard's own reader of event files; recorded W&B runs and MLflow clients with their signatures.
"""

from __future__ import annotations

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.errors import UsageError
from hessdiag.track import loggers
from hessdiag.track import tracker as tracking
from hessdiag.track.loggers import Logger
from tests.models import labels, randn

X, Y = randn(32, 4), labels(32, 3)


def tracked(log, steps=4, quantities=("lambda_max", "trace")):
    """A tracker after so many measurements with no training between."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    tracker = hessdiag.Tracker(
        model, nn.CrossEntropyLoss(), (X, Y), every=10, quantities=quantities, budget=None, log=log
    )
    for step in range(0, 10 * steps, 10):
        tracker.step(step, lr=0.5)
        with torch.no_grad():
            model.weight.mul_(1.5)
    return tracker


def expected(tracker):
    """What a logger must have been given: (step, name) and value, from the history."""
    found = {}
    for row in tracker.history.itertuples():
        for name, value in (("", row.value), ("_lo", row.lo), ("_hi", row.hi)):
            found[row.step, f"hessdiag/{row.quantity}{name}"] = value
        found[row.step, "hessdiag/stability_limit"] = 2 / row.lr
    return found


class WandbRun:
    """As `wandb.Run` of 0.2x: one step at a time, never backwards."""

    def __init__(self, step=0):
        self.step, self.rows, self.defined, self.dropped = step, [], [], 0

    def log(self, data: dict, step: int | None = None, commit: bool | None = None) -> None:
        if step is not None and step < self.step:
            self.dropped += 1
            return
        self.step = self.step if step is None else step
        self.rows.append(dict(data))

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, goal=None):
        self.defined.append((name, step_metric))


class Mlflow:
    """As the module ``mlflow``."""

    def __init__(self):
        self.rows, self.figures = {}, []

    def log_metric(self, key: str, value: float, step: int | None = None, synchronous: bool | None = None):
        self.rows[step, key] = value

    def log_metrics(self, metrics: dict, step: int | None = None, synchronous: bool | None = None):
        for key, value in metrics.items():
            self.log_metric(key, value, step)

    def log_figure(self, figure, artifact_file: str, *, save_kwargs: dict | None = None):
        self.figures.append((type(figure).__name__, artifact_file))


class MlflowClient:
    """As `mlflow.MlflowClient`."""

    def __init__(self):
        self.rows, self.figures = {}, []

    def log_metric(
        self, run_id: str, key: str, value, timestamp: int | None = None, step: int | None = None, synchronous=None
    ):
        assert run_id == "abc"
        self.rows[step, key] = value

    def log_figure(self, run_id: str, figure, artifact_file: str):
        self.figures.append((run_id, artifact_file))


def of_rows(rows):
    return {(row["hessdiag/step"], name): value for row in rows for name, value in row.items()}


def same_as_history(got, tracker):
    want = expected(tracker)
    assert {key: value for key, value in got.items() if key in want} == want


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        tracker = tracked(writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    got = {(e.step, tag): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    want = expected(tracker)
    assert {key: got[key] for key in want} == pytest.approx(want, rel=1e-6)
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {"hessdiag"}
    assert events.Tags()["images"] == ["hessdiag/trajectory"]
    picture = events.Images("hessdiag/trajectory")[0]
    assert picture.width > 300 and picture.encoded_image_string.startswith(b"\x89PNG")


def wandb_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda figure: f"image of {figure.axes[0]}"))
    run = WandbRun()
    tracker = tracked(run)
    same_as_history(of_rows(run.rows), tracker)
    assert run.defined == [("hessdiag/*", "hessdiag/step")]
    assert any("hessdiag/trajectory" in row for row in run.rows)


def test_a_run_of_wandb(monkeypatch):
    wandb_run(monkeypatch)


def wandb_ahead(_=None):
    run = WandbRun(step=25)  # the training logs more often, without saying steps
    tracker = tracked(run)
    assert run.dropped == 0
    same_as_history(of_rows(run.rows), tracker)


def test_nothing_is_dropped_where_the_run_is_ahead():
    wandb_ahead()


def mlflow_module(_=None):
    mlflow = Mlflow()
    same_as_history(mlflow.rows, tracked(mlflow))
    assert ("Figure", "hessdiag/trajectory.png") in mlflow.figures


def test_mlflow():
    mlflow_module()


def mlflow_client(_=None):
    client = MlflowClient()
    same_as_history(client.rows, tracked((client, "abc")))
    assert ("abc", "hessdiag/trajectory.png") in client.figures
    with pytest.raises(UsageError, match=r"log=\(client, run.info.run_id\)"):
        tracked(client)


def test_a_client_of_mlflow():
    mlflow_client()


def any_function(_=None):
    rows = []
    tracker = tracked(lambda values, step: rows.append({"hessdiag/step": step, **values}))
    same_as_history(of_rows(rows), tracker)


def test_any_function():
    any_function()


def csv_file(tmp_path):
    file = tmp_path / "sharpness.csv"
    tracker = tracked(str(file))
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(int(r["step"]), r["quantity"], float(r["value"])) for r in rows] == [
        (r.step, r.quantity, r.value) for r in tracker.history.itertuples()
    ]


def test_a_csv_file(tmp_path):
    csv_file(tmp_path)
    tracked(tmp_path / "again.csv", steps=1)
    assert (tmp_path / "again.csv").is_file()


def test_a_resumed_table_has_each_row_once(tmp_path):
    file = tmp_path / "sharpness.csv"
    first = tracked(file)
    state = first.state_dict()
    first.step(70)  # lost with the process
    second = hessdiag.Tracker(
        nn.Linear(4, 3).double(), nn.CrossEntropyLoss(), (X, Y), every=10, budget=None, log=file
    )
    second.load_state_dict(state)
    second.step(40)
    steps = [line.split(",")[0] for line in file.read_text().splitlines()[1:]]
    assert steps == [str(s) for s in (0, 10, 20, 30, 40) for _ in range(2)]


def test_several_at_once(tmp_path):
    rows, run = [], WandbRun()
    tracked([tmp_path / "x.csv", run, lambda values, step: rows.append(step)])
    assert rows == [0, 10, 20, 30] and len(run.rows) >= 4 and (tmp_path / "x.csv").is_file()


def raising(caplog):
    def refuse(values, step):
        raise OSError("disk\nfull")

    rows = []
    tracker = tracked([refuse, lambda values, step: rows.append(step)])
    assert len(tracker.trajectory.measured) == len(rows) == 4
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "refuse raised OSError: disk full" in said[0]


def test_a_logger_that_raises_ends_nothing_and_is_said_once(caplog):
    raising(caplog)


def test_a_table_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    tracker = tracked(tmp_path / "file" / "x.csv", steps=2)
    assert len(tracker.trajectory.measured) == 2 and len(caplog.records) == 1


def test_what_was_not_measured_is_in_the_table_only(tmp_path):
    rows, file = [], tmp_path / "x.csv"
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    log = [file, lambda values, step: rows.append(step)]
    tracker = hessdiag.Tracker(model, nn.CrossEntropyLoss(), (X, Y), every=1, budget=None, log=log)
    tracker.step(0)
    with torch.no_grad():
        model.weight.fill_(float("inf"))
    tracker.step(1)
    assert rows == [0] and "NaN or infinite" in file.read_text().splitlines()[-1]


UNKNOWN = {
    "a number": 3,
    "a Python logger": __import__("logging").getLogger("x"),
    "a function of one argument": lambda values: None,
    "a file object": sys.stdout,
    "a LightningModule's log": SimpleNamespace(log=lambda name, value: None),
}


@pytest.mark.parametrize("log", UNKNOWN.values(), ids=UNKNOWN)
def test_an_object_of_no_known_kind_is_refused_in_one_line(log):
    with pytest.raises(UsageError, match="allowed: a TensorBoard SummaryWriter, a W&B run, mlflow") as refused:
        tracked(log)
    assert "\n" not in str(refused.value)


def test_nothing_is_imported_for_it():
    import subprocess

    code = (
        "import sys, hessdiag, torch; from torch import nn; x = torch.randn(32, 4), torch.randint(3, (32,));"
        "t = hessdiag.Tracker(nn.Linear(4, 3), nn.CrossEntropyLoss(), x, log=lambda d, s: None); t.step(0);"
        "print({'tensorboard', 'wandb', 'mlflow', 'IPython', 'lightning', 'pytorch_lightning', 'matplotlib'}"
        " & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def figures_are_few(monkeypatch):
    """Of the time of measuring, drawing keeps its part: the clock goes on for products and figures alone."""
    from hessdiag.engine.products.curvature import Curvature
    from hessdiag.track import pacing, plots

    now, drawn = [0.0], []
    multiply, evolution = Curvature.multiply, plots.evolution

    def slow_product(self, rows):
        now[0] += len(rows)
        return multiply(self, rows)

    def slow_figure(trajectory):
        now[0] += 30
        drawn.append(len(trajectory.points))
        return evolution(trajectory)

    monkeypatch.setattr(Curvature, "multiply", slow_product)
    monkeypatch.setattr(plots, "evolution", slow_figure)
    monkeypatch.setattr(pacing, "clock", lambda: now[0])
    tracked(Mlflow(), steps=30, quantities=["lambda_max"])
    assert 30 * (len(drawn) - 1) <= 0.3 * now[0] and len(drawn) > 1


def test_figures_keep_to_their_part_of_the_time(monkeypatch):
    figures_are_few(monkeypatch)


def off_by_one(self, scalars, step, own=Logger.take):
    own(self, scalars, step + 1)


def unguarded(self, call, *given):
    call(*given)


BROKEN = {
    "W&B gets another step": (wandb_run, Logger, "take", off_by_one),
    "W&B drops what comes late": (wandb_ahead, loggers, "max", lambda step, _: step),
    "MLflow gets another step": (mlflow_module, Logger, "take", off_by_one),
    "the client gets another step": (mlflow_client, Logger, "take", off_by_one),
    "a function gets another step": (any_function, Logger, "take", off_by_one),
    "what a logger raises comes through": (raising, Logger, "_guarded", unguarded),
    "a figure after each measurement": (figures_are_few, tracking, "DRAWING", 1e9),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch, caplog):
    promise, where, what, broken = BROKEN[name]
    monkeypatch.setattr(where, what, broken, raising=what != "max")
    with pytest.raises((AssertionError, OSError)):
        promise(caplog if promise is raising else monkeypatch)
