"""Promise: averaged weights are measured when they are asked for, and only then. (5 s)

Files are written by torch's own AveragedModel, and in the layouts of timm, torchvision and Lightning.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hessdiag.errors import HessdiagError
from hessdiag.schemes import assemble, known
from hessdiag.schemes.assemble import build
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources import hyperparameters, weights
from hessdiag.sources.hyperparameters import averages, kept
from tests.command import call


def tiny(place, checkpoint=None):
    """The entry point of another package."""
    return nn.Sequential(nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Linear(3, 10))


def flat(place):
    return torch.randn(30, 64), torch.arange(30) % 10


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = {
        "hessdiag.models": [EntryPoint("tiny", f"{__name__}:tiny", "hessdiag.models")],
        "hessdiag.data": [EntryPoint("flat", f"{__name__}:flat", "hessdiag.data")],
        "hessdiag.losses": [],
    }
    monkeypatch.setattr(known, "entry_points", lambda group: mine[group])


def trained(updates=2, wrap=lambda model: model):
    """A model after some steps of Adam, its averages and its optimizer."""
    torch.manual_seed(0)
    model = tiny("")
    averaged = AveragedModel(wrap(model), use_buffers=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    inputs, targets = flat("")
    for _ in range(updates):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        averaged.update_parameters(wrap(model))
    return model, averaged, optimizer.state_dict()


def of_timm(model, averaged, optimizer):
    ema = averaged.module.state_dict()
    return {"epoch": 1, "state_dict": model.state_dict(), "state_dict_ema": ema, "optimizer": optimizer}


def of_torchvision(model, averaged, optimizer):
    return {"model": model.state_dict(), "model_ema": averaged.state_dict(), "optimizer": optimizer}


def of_lightning(model, averaged, optimizer):
    state = averaged.state_dict()
    of_count = {"n_averaged": state.pop("n_averaged")}
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    now = {"state_dict": state, "current_model_state": model.state_dict(), "averaging_state": of_count}
    return {**now, "optimizer_states": [optimizer]}


LAYOUTS = {
    "timm": (of_timm, "state_dict_ema"),
    "torchvision": (of_torchvision, "model_ema::module."),
    "Lightning": (of_lightning, "state_dict"),
    "torch, alone": (lambda model, averaged, optimizer: averaged.state_dict(), "module."),
    "torch, as an entry": (lambda model, averaged, optimizer: {"model": averaged.state_dict()}, "model::module."),
}


def built(file, **fields):
    return build(Recipe.of("tiny:", data="flat:", loss="cross_entropy", **fields), file)


def same(problem, module):
    return all(torch.equal(a, b) for a, b in zip(problem.model.state_dict().values(), module, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_are_taken_when_asked_for(layout):
    check_layout(layout)


def check_layout(layout):
    write, entry = LAYOUTS[layout]
    model, averaged, optimizer = trained()
    torch.save(write(model, averaged, optimizer), "a.pt")
    asked = built("a.pt", use_ema=True)
    assert same(asked.problem, averaged.module.state_dict().values())
    assert not same(asked.problem, model.state_dict().values())
    assert asked.weights.key == entry
    assert any("averaged weights" in note for note in asked.notes)
    assert asked.problem.optimizer is None
    if layout in ("timm", "torchvision"):
        plain = built("a.pt")
        assert same(plain.problem, model.state_dict().values())
        assert plain.problem.optimizer is not None
        name = entry.removesuffix("::module.")
        assert f"a.pt also holds averaged weights ({name}): `use_ema=True` takes them" in plain.notes


def test_averages_of_a_wrapped_model_lose_both_prefixes():
    _, averaged, _ = trained(wrap=nn.DataParallel)
    torch.save({"model_ema": averaged.state_dict()}, "a.pt")
    asked = built("a.pt", use_ema=True)
    assert same(asked.problem, averaged.module.module.state_dict().values())


def test_where_lightning_swapped_them_the_last_ones_are_named():
    model, averaged, optimizer = trained()
    torch.save(of_lightning(model, averaged, optimizer), "a.ckpt")
    plain = built("a.ckpt")
    assert same(plain.problem, averaged.module.state_dict().values())
    assert any("averaged weights" in note and "-c a.ckpt::current_model_state" in note for note in plain.notes)
    last = built("a.ckpt::current_model_state")
    assert same(last.problem, model.state_dict().values())
    assert last.problem.optimizer is not None


def test_hyperparameters_are_kept_by_entry():
    content = {"args": {"model": "m", "layers": [1, 2]}, "hyper_parameters": {"x": None}, "config": 3}
    assert kept(content) == {"args": {"model": "m", "layers": [1, 2]}, "hyper_parameters": {"x": None}}
    assert kept([1]) == {}
    assert averages([1]) == ()


BAD = {
    "no averages": ("plain.pt", "no averaged weights"),
    "never updated": ("start.pt", "never updated"),
    "an entry named too": ("ema.pt::state_dict", "drop one of the two"),
    "no checkpoint": (None, "-c FILE"),
    "no file": ("none.pt", "no such checkpoint none.pt"),
    "another model's": ("other.pt", "does not fit the model"),
    "safetensors": ("a.safetensors", "no averaged weights"),
    "a folder": (".", "is a folder without"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name):
    check_bad(name)


def check_bad(name):
    from safetensors.torch import save_file

    model, averaged, optimizer = trained()
    torch.save(model.state_dict(), "plain.pt")
    torch.save({"model_ema": trained(updates=0)[1].state_dict()}, "start.pt")
    torch.save(of_timm(model, averaged, optimizer), "ema.pt")
    torch.save({"state_dict_ema": nn.Linear(3, 3).state_dict()}, "other.pt")
    save_file(model.state_dict(), "a.safetensors")
    file, words = BAD[name]
    given = ["-c", file] if file else []
    code, out, err = call(
        *("doctor", "--model", "tiny:", "--data", "flat:", "--loss", "cross_entropy", "--use-ema", *given)
    )
    assert (code in (2, 4), out) == (True, ""), err
    assert words in err
    assert err.count("\n") == 1


# what these tests must notice


BREAKAGES = {
    "averages are not looked for": (
        lambda patch: patch.setattr(assemble, "averaged", lambda checkpoint, trust_pickle: checkpoint),
        lambda: check_layout("timm"),
    ),
    "averages are not named": (
        lambda patch: patch.setattr(weights, "averages", lambda content: ()),
        lambda: check_layout("torchvision"),
    ),
    "the optimizer's state goes with averages": (
        lambda patch: patch.setattr(assemble, "_are_averages", lambda weights: False),
        lambda: check_layout("timm"),
    ),
    "counts are not read": (
        lambda patch: patch.setattr(hyperparameters, "COUNT", "count"),
        lambda: check_bad("never updated"),
    ),
    "swapped averages are the weights": (
        lambda patch: patch.setattr(hyperparameters, "SWAPPED", ("none",)),
        test_where_lightning_swapped_them_the_last_ones_are_named,
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_this_promise_would_notice(name, monkeypatch):
    damage, check = BREAKAGES[name]
    check()
    damage(monkeypatch)
    with pytest.raises((AssertionError, HessdiagError)):
        check()
