"""Promise: a Tracker leaves model, optimizer, loader and random states as found, also where it fails. (12 s)"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hessdiag
from tests.models import cnn, same
from tests.test_model_is_left_as_found import state


def training():
    """A model in the middle of training, BatchNorm and dropout in it, its optimizer and its shuffled loader."""
    problem = cnn()
    model = nn.Sequential(problem.model, nn.Dropout(0.5), nn.Linear(3, 3).double(), nn.BatchNorm1d(3).double())
    model[2].weight.requires_grad_(False)
    model.train()
    model[0].again.eval()
    loader = DataLoader(
        TensorDataset(*problem.data["train"]), 5, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, loader, optimizer


def whole(model, loader, optimizer):
    """Everything that a measurement could change."""
    return {
        **state(model),
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "loader": loader.generator.get_state(),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }


def tracker_of(model, loader, optimizer, **options):
    quantities = ["lambda_max", "trace", "preconditioned_lambda_max"]
    asked = {"budget": None, "every": 1, "quantities": quantities, "optimizer": optimizer, **options}
    return hessdiag.Tracker(model, nn.CrossEntropyLoss(), loader, **asked)


def stopped_by(error, after):
    """A measurement in whose passes something is raised."""

    def run(tracker, model):
        calls = iter(range(100_000))

        def count(module, arguments):
            if next(calls) >= after:
                raise error

        handle = model[2].register_forward_pre_hook(count)
        try:
            if isinstance(error, KeyboardInterrupt):
                with pytest.raises(KeyboardInterrupt):
                    tracker.step(0)
            else:
                tracker.step(0)
                assert not tracker.trajectory.measured, "it was not stopped"
        finally:
            handle.remove()

    return run


def measured(tracker, model):
    tracker.step(0)
    assert len(tracker.trajectory.measured) == 1


def without_gradients(tracker, model):
    with torch.no_grad():
        measured(tracker, model)


def with_not_a_number(tracker, model):
    weight = model[0].conv.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] = float("nan")
    tracker.step(0)
    assert not tracker.trajectory.measured
    with torch.no_grad():
        weight.copy_(before)


def drawn_and_kept(tracker, model):
    measured(tracker, model)
    tracker.plot()
    tracker.state_dict()


RUNS = {
    "after a measurement": measured,
    "inside no_grad": without_gradients,
    "after a refusal": with_not_a_number,
    "after an exception at once": stopped_by(ValueError("of the model"), 0),
    "after an exception in the middle": stopped_by(ValueError("of the model"), 60),
    "after Ctrl-C": stopped_by(KeyboardInterrupt(), 60),
    "after running out of memory": stopped_by(MemoryError(), 10),
    "after a plot and a state": drawn_and_kept,
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_everything_is_as_it_was(run):
    model, loader, optimizer = training()
    before = whole(model, loader, optimizer)
    tracker = tracker_of(model, loader, optimizer)
    run(tracker, model)
    assert differs(whole(model, loader, optimizer), before) == []


def differs(now, before):
    return [name for name in before if not same(now[name], before[name])]


def test_training_goes_on_to_the_same_weights():
    def trained(track):
        torch.manual_seed(0)
        model, loader, optimizer = training()
        tracker = tracker_of(model, loader, optimizer)
        for step, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if track:
                tracker.step(step)
        return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    assert same(trained(track=True), trained(track=False))


def test_interrupted_it_measures_again():
    model, loader, optimizer = training()
    tracker = tracker_of(model, loader, optimizer)
    stopped_by(KeyboardInterrupt(), 60)(tracker, model)
    assert tracker.history.empty
    tracker.step(1)
    assert len(tracker.trajectory.measured) == 1


BROKEN = {
    "weights": lambda m, _loader, _opt: m[0].conv.weight.data.view(-1)[0].add_(1e-9),
    "gradients": lambda m, _loader, _opt: m[0].conv.weight.grad.add_(1e-9),
    "modes": lambda m, _loader, _opt: m[0].again.train(),
    "buffers": lambda m, _loader, _opt: m[3].running_mean.add_(1e-9),
    "random": lambda _m, _loader, _opt: torch.rand(1),
    "numpy": lambda _m, _loader, _opt: np.random.rand(),
    "python": lambda _m, _loader, _opt: random.random(),
    "loader": lambda _m, loader, _opt: next(iter(loader)),
    "optimizer": lambda _m, _loader, opt: opt.state[opt.param_groups[0]["params"][0]]["exp_avg"].add_(1e-9),
    "hooks": lambda m, _loader, _opt: m.register_forward_hook(lambda *_: None),
    "attributes": lambda m, _loader, _opt: setattr(m, "kept", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name):
    subject = training()
    before = whole(*subject)
    BROKEN[name](*subject)
    assert name in differs(whole(*subject), before)


def test_requires_grad_is_noticed():
    subject = training()
    before = whole(*subject)
    subject[0][2].weight.requires_grad_(True)
    assert differs(whole(*subject), before) == ["weights"]
