"""Promise: under the Trainers of Lightning and transformers a callback tracks, and no rank waits in vain. (30 s)

What runs under two ranks trains to the same weights as without the callback, and measures on rank 0 alone.
"""

from __future__ import annotations

import copy
import csv
import importlib
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader

import hessdiag
from hessdiag.errors import ProblemError
from hessdiag.integrations import one_rank, own_loss
from hessdiag.integrations.one_rank import OneRank
from tests import tracked_trainers as trainers
from tests.models import same

# the libraries' own: no loader workers, torch's pytree has moved on, a device that is not there
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:(pytorch_)?lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
HOMES = ("pytorch_lightning", "lightning.pytorch")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    names = ("pytorch_lightning", "lightning.pytorch", "transformers")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def library(name):
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


def lightning_run(home, folder, *, tracked=True, resume=None, callbacks=(), **options):
    from hessdiag.integrations.lightning import SharpnessCallback

    callback = SharpnessCallback(every=trainers.EVERY, budget=None)
    trainer = trainers.lightning_trainer(home, folder, [callback] * tracked + [*callbacks], **options)
    module = trainers.lightning_module(home)
    loader = DataLoader(trainers.data(), batch_size=8)
    torch.manual_seed(1)
    trainer.fit(module, loader, ckpt_path=resume, **({"weights_only": True} if resume else {}))
    return callback, trainer, module


@pytest.mark.parametrize("name", HOMES)
def test_lightning_measures_its_own_loss(name, tmp_path):
    home, copies = library(name), {}

    class Keep(home.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            copies[trainer.global_step] = copy.deepcopy(module.net)

    callback, _, _ = lightning_run(home, tmp_path, callbacks=[Keep()])
    history = callback.tracker.history
    assert history[history.quantity == "trace"].step.tolist() == [0, 3, 6]
    assert set(history.lr) == {0.1}
    point = callback.tracker.trajectory.points[0]
    assert point.rate.limit == pytest.approx((2 + 2 * 0.5) / 0.1)
    for step in (3, 6):
        data = trainers.data().tensors
        alone = hessdiag.analyze(copies[step], nn.CrossEntropyLoss(), data, quantities=["lambda_max"])
        row = history[(history.step == step) & (history.quantity == "lambda_max")].iloc[0]
        assert row.lo <= alone["lambda_max"].hi and alone["lambda_max"].lo <= row.hi
        assert row.value == pytest.approx(alone["lambda_max"].value, rel=1e-2)


def test_lightning_trains_to_the_same_weights(tmp_path):
    home = library(HOMES[0])
    _, _, tracked = lightning_run(home, tmp_path)
    _, _, alone = lightning_run(home, tmp_path, tracked=False)
    assert same(trainers.weights(tracked), trainers.weights(alone))


def test_lightning_logs_where_its_users_look(tmp_path):
    home = library(HOMES[0])
    logger = importlib.import_module(f"{HOMES[0]}.loggers").CSVLogger(tmp_path)
    callback, trainer, _ = lightning_run(home, tmp_path, logger=logger)
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["hessdiag/lambda_max"]]
    history = callback.tracker.history
    ours = history[history.quantity == "lambda_max"]
    assert [int(row["step"]) for row in rows] == ours.step.tolist()
    assert [float(row["hessdiag/lambda_max"]) for row in rows] == ours.value.tolist()
    assert float(trainer.callback_metrics["hessdiag/lambda_max"]) == pytest.approx(ours.value.iloc[-1], rel=1e-6)
    assert "loss" in trainer.callback_metrics and trainer.logged_metrics["loss"] > 0


def test_lightning_resumes_from_its_checkpoint(tmp_path):
    home = library(HOMES[0])
    begun, first, _ = lightning_run(home, tmp_path, max_steps=4, enable_checkpointing=True)
    callback, _, _ = lightning_run(home, tmp_path, resume=first.checkpoint_callback.best_model_path)
    before, after = begun.tracker.history, callback.tracker.history
    assert sorted(set(after.step)) == [0, 3, 6]
    assert after[after.step < 4].equals(before)


def test_a_module_that_optimizes_by_itself_is_refused_before_training(tmp_path):
    home = library(HOMES[0])

    class Manual(type(trainers.lightning_module(home))):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ProblemError, match="hessdiag_loss"):
        own_loss.loss_in_training(Manual(), Meeting(0))

    class Told(Manual):
        def hessdiag_loss(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    assert own_loss.loss_in_training(Told(), Meeting(0))(Told(), trainers.data()[:4]).item() > 0


def silenced(_=None):
    seen = []

    class Talking(type(trainers.lightning_module(library(HOMES[0])))):
        def training_step(self, batch, batch_idx):
            assert self.trainer.global_step == 7  # the rest of the trainer is there
            self.logger.experiment.add_scalar("x", 1)
            return super().training_step(batch, batch_idx)

    module, trainer = Talking(), Meeting(0)
    trainer.global_step, trainer.logger = 7, SimpleNamespace(experiment=SimpleNamespace(add_scalar=seen.append))
    module.log = lambda *given: seen.append(given)
    module._trainer = trainer
    before = dict(vars(module))
    assert own_loss.loss_in_training(module, trainer)(module, trainers.data()[:4]).item() > 0
    assert seen == [] and vars(module) == before


def test_a_training_step_logs_nothing_while_it_is_measured():
    silenced()


def hf_run(folder, *, report=True, **options):
    from hessdiag.integrations.transformers import SharpnessCallback

    trainer = trainers.hf_trainer(folder, **options)
    asked = {"every": trainers.EVERY, "budget": None, "quantities": ["lambda_max"]}
    callback = SharpnessCallback(trainer=trainer if report else None, **asked)
    trainer.add_callback(callback)
    return trainer, callback


def test_transformers_reports_where_the_trainer_does(tmp_path):
    library("transformers")
    trainer, callback = hf_run(tmp_path)
    model = copy.deepcopy(trainer.model)
    trainer.train()
    history = callback.tracker.history
    assert history.step.tolist() == [0, 3, 6]
    ours = [row for row in trainer.state.log_history if "hessdiag/lambda_max" in row]
    assert [(r["step"], r["hessdiag/lambda_max"]) for r in ours] == [
        *zip(history.step, history.value, strict=True)
    ]
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [3, 6]  # its own are all there
    _, rows = trainers.causal_lm()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    asked = {"quantities": ["lambda_max"], "effort": "quick"}
    alone = hessdiag.analyze(model.eval(), lambda model, batch: model(**batch).loss, [batch], **asked)
    assert history.value.iloc[0] == pytest.approx(alone["lambda_max"].value, rel=1e-2)


def test_transformers_trains_to_the_same_weights_and_resumes(tmp_path):
    library("transformers")
    alone = trainers.hf_trainer(tmp_path / "alone")
    alone.train()
    first, _ = hf_run(tmp_path / "run", report=False, save_strategy="steps", save_steps=4, max_steps=STEPS)
    first.train()
    assert same(trainers.weights(first.model), trainers.weights(alone.model))
    second, callback = hf_run(tmp_path / "run", report=False, max_steps=STEPS)
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert callback.tracker.history.step.tolist() == [0, 3, 6]
    assert [row["step"] for row in second.state.log_history if "hessdiag/lambda_max" in row] == [0, 3, 6]


STEPS = trainers.STEPS


@pytest.mark.parametrize(
    ("library_", "rank"),
    [("pytorch_lightning", trainers.lightning_rank), ("transformers", trainers.transformers_rank)],
)
def test_two_ranks_train_as_without_it_and_rank_0_measures(library_, rank, tmp_path):
    library(library_)
    mp.spawn(rank, (trainers.free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    assert first["tracked"] and not second["tracked"]
    assert [one["step"] for one in first["tracker"]["measured"]] == [0, 3, 6]
    assert not any(one["error"] for one in first["tracker"]["measured"])
    for one in (first, second):
        assert one["steps"] == (STEPS, STEPS)
        assert same(one["weights"], first["alone"]) and same(one["alone"], first["alone"])


class Meeting:
    """A trainer of one of two ranks, as the callback sees it; counts the barriers and when they come."""

    def __init__(self, rank):
        self.met, self.global_step, self.is_global_zero = [], 0, rank == 0
        self.strategy = SimpleNamespace(barrier=lambda: self.met.append(self.global_step))
        self.loggers, self.callback_metrics, self.optimizers, self.datamodule = [], {}, [], None
        self.train_dataloader = DataLoader(trainers.data(), batch_size=8)


def meetings(rank, module, *, budget, until=20):
    library(HOMES[0])
    from hessdiag.integrations.lightning import SharpnessCallback

    trainer, callback = Meeting(rank), SharpnessCallback(every=3, budget=budget)
    callback.on_train_start(trainer, module)
    for step in range(1, until):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, None, 0)
    return trainer.met


def ranks_meet(monkeypatch):
    home = library(HOMES[0])
    for budget in (None, "0.001%"):
        module = trainers.lightning_module(home)
        assert meetings(0, module, budget=budget) == meetings(1, module, budget=budget) == [0, *range(3, 20, 3)]


def test_ranks_meet_at_the_same_steps_whatever_the_budget(monkeypatch):
    ranks_meet(monkeypatch)


def meets_after_an_interrupt(monkeypatch):
    module = trainers.lightning_module(library(HOMES[0]))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(one_rank.Tracker, "step", stop)
    from hessdiag.integrations.lightning import SharpnessCallback

    trainer = Meeting(0)
    with pytest.raises(KeyboardInterrupt):
        SharpnessCallback(every=3).on_train_start(trainer, module)
    assert trainer.met == [0]


def test_a_rank_that_is_stopped_still_comes_to_the_barrier(monkeypatch):
    meets_after_an_interrupt(monkeypatch)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_callbacks_are_short_and_import_their_library_when_used(name):
    module = importlib.import_module(f"hessdiag.integrations.{name}")
    assert len(Path(module.__file__).read_text().splitlines()) <= 60
    with pytest.raises(AttributeError, match="no attribute 'Sharpnes'"):
        module.Sharpnes  # noqa: B018


@one_rank.contextmanager
def without_barrier(self, barrier):
    yield
    barrier()


BROKEN = {
    "ranks meet where rank 0 measures": (
        ranks_meet,
        OneRank,
        "due",
        lambda self, step: step % 3 == 0 and (self.tracker is None or self.tracker._pace.allows()),
    ),
    "an interrupt passes the barrier by": (meets_after_an_interrupt, OneRank, "waiting", without_barrier),
    "the training step logs": (silenced, own_loss, "attach", lambda module, trainer: None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch):
    promise, where, what, broken = BROKEN[name]
    monkeypatch.setattr(where, what, broken)
    with pytest.raises((AssertionError, TypeError)):
        promise(monkeypatch)


PAGE = Path(hessdiag.__file__).parent / "docs" / "tracker.md"
RECIPES = {"lightning": "pytorch_lightning", "transformers": "transformers", "tensorboard": "tensorboard"}


def recipe(name):
    """The block of the page that is a file of this name."""
    (found,) = re.findall(rf"```python\n# with_{name}\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_of_the_page_run(name, tmp_path, monkeypatch):
    library(RECIPES[name])
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "recipe"}
    exec(compile(recipe(name), PAGE.name, "exec"), names)
    if name == "transformers":
        assert [row["step"] for row in names["trainer"].state.log_history if "hessdiag/trace" in row] == [0]


def test_the_recipe_of_wandb_runs(monkeypatch):
    from tests.test_tracker_logs import WandbRun

    run = WandbRun()
    run.finish = lambda: None
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda project: run, Image=lambda figure: figure)
    )
    exec(compile(recipe("wandb"), PAGE.name, "exec"), {"__name__": "recipe"})
    assert run.rows[0]["hessdiag/step"] == 0 and run.rows[0]["hessdiag/trace"] > 0
