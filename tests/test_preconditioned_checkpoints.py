"""Promise: an optimizer's state is found in checkpoints and matched to the right parameters, or refused. (30 s)

Oracle: the live optimizer, whose parameters are the model's own tensors.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

import hessdiag
from hessdiag.errors import LoadError, ProblemError
from hessdiag.optimizers import matching, order, preconditioner_of
from hessdiag.sources.saved_optimizer import SavedOptimizer
from tests import models
from tests.command import call

PROBLEM = """
import torch
from torch import nn
from hessdiag import Problem

def problem(optimizer=False):
    torch.manual_seed(0)
    x, y = torch.randn(128, 6), torch.randint(3, (128,))
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    return Problem(model, {"train": (x, y)}, criterion="cross_entropy")
"""
QUANTITY = "preconditioned_lambda_max"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def plain(model):
    return list(model.parameters())


def decay_first(model):
    """Hugging Face's Trainer: what is decayed, then the rest, each in the model's order."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]


def decay_last(model):
    """timm: what is not decayed comes first."""
    return decay_first(model)[::-1]


def named(model):
    return [(f"net.{name}", one) for name, one in reversed(list(model.named_parameters()))]


def by_layer(model):
    """Two groups of layers of the same shapes: their order tells nothing."""
    return [{"params": list(model[3].parameters())}, {"params": [*model[0].parameters(), *model[1].parameters()]}]


ORDERS = {"plain": plain, "decay first": decay_first, "decay last": decay_last, "named": named}


def trained(groups, steps=5, kind=torch.optim.AdamW, model=None):
    """A model and its optimizer after real steps."""
    model = model or network()
    x, y = models.randn(64, 6, seed=1).float(), torch.arange(64) % 3
    optimizer = kind(groups(model), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def P(model, optimizer, counted=None):
    own = dict(model.named_parameters())
    return preconditioner_of(optimizer, own, counted or list(own))


def same(groups):
    """Whether what was saved gives what the live optimizer gives."""
    model, optimizer = trained(groups)
    live, saved = P(model, optimizer), P(model, optimizer.state_dict())
    return torch.equal(live.diagonal(), saved.diagonal()) and live.threshold == saved.threshold


@pytest.mark.parametrize("groups", ORDERS.values(), ids=ORDERS)
def test_states_find_their_parameters(groups):
    assert same(groups)


def test_names_leave_no_doubt_and_no_note():
    model, optimizer = trained(named)
    assert P(model, optimizer.state_dict()).notes == (
        "the optimizer's weight decay (0.01) is not in preconditioned_lambda_max: H is that of the loss",
    )
    assert matching.NO_NAMES in P(*_saved(plain)).notes


def _saved(groups):
    model, optimizer = trained(groups)
    return model, optimizer.state_dict()


def test_states_under_names_are_read_as_those_of_torch_distributed():
    model, saved = _saved(plain)
    names = [f"module.{name}" for name, _ in model.named_parameters()]
    keyed = {
        "state": {names[place]: state for place, state in saved["state"].items()},
        "param_groups": [{**saved["param_groups"][0], "params": names}],
    }
    assert torch.equal(P(model, keyed).diagonal(), P(model, saved).diagonal())


def test_frozen_parameters_may_be_in_the_optimizer_or_not():
    for groups in (plain, lambda m: [p for p in m.parameters() if p.requires_grad]):
        model = network()
        model[0].weight.requires_grad_(False)
        model, optimizer = trained(groups, model=model)
        counted = [name for name, one in model.named_parameters() if one.requires_grad]
        live, saved = P(model, optimizer, counted), P(model, optimizer.state_dict(), counted)
        assert torch.equal(live.diagonal(), saved.diagonal())


class LightningOptimizer:
    """As Lightning's: no optimizer of torch by class, with one in it."""

    def __init__(self, optimizer):
        self._optimizer = self.optimizer = optimizer

    def state_dict(self):
        return {}


def test_wrappers_are_looked_into():
    model, optimizer = trained(plain)
    assert torch.equal(P(model, LightningOptimizer(optimizer)).diagonal(), P(model, optimizer).diagonal())


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            lambda s: s["param_groups"][0]["params"].pop(),
            "is of 7 parameters, the model has 8, 8 of them trainable",
        ),
        (
            lambda s: s["param_groups"][0].update(trust_coeff=1),
            "has amsgrad, betas, eps, trust_coeff and keeps exp_avg, exp_avg_sq, which",
        ),
        (lambda s: s["state"][2].update(exp_avg_diff=torch.ones(8)), "keeps exp_avg, exp_avg_diff, exp_avg_sq"),
        (lambda s: s["param_groups"][0].pop("betas"), "understood are torch's Adam, AdamW"),
        (lambda s: s["param_groups"][0]["params"].reverse(), "entry 0 of the optimizer's state has shape"),
        (lambda s: s["state"].pop(4), "never stepped 3.weight"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize=True"),
        (lambda s: s.pop("param_groups"), "state dict holds state"),
        (
            lambda s: s["param_groups"][0].update(param_names=[f"x{i}" for i in range(8)]),
            "belongs to another model",
        ),
        (lambda s: s["param_groups"][0].update(param_names=["x"]), "names 1 of 8 parameters"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_one_line(spoil, text):
    model, saved = _saved(plain)
    spoil(saved)
    with pytest.raises(ProblemError, match=text) as refusal:
        P(model, saved)
    assert "\n" not in str(refusal.value)


def test_groups_that_fit_in_several_ways_are_refused_and_the_live_ones_are_not():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    halves = lambda m: [{"params": plain(m[:2])}, {"params": plain(m[2:]), "lr": 1e-2}]  # noqa: E731
    x = models.randn(8, 6).float()
    optimizer = torch.optim.Adam(halves(model))
    model(x).square().sum().backward()
    optimizer.step()
    assert P(model, optimizer).formula.startswith("38, with every group's lr")
    with pytest.raises(
        ProblemError, match="2 groups without names, whose shapes fit in more than one way: give the"
    ):
        P(model, optimizer.state_dict())
    many = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))
    shapes = [[(4, 4), (4,)] for _ in range(30)]
    with pytest.raises(ProblemError, match="30 groups without names"):
        order.by_order(shapes, dict(many.named_parameters()))
    with pytest.raises(ProblemError, match="fit in no way"):
        order.by_order([[(6, 6)] * 4, [(6,)] * 3 + [(5,)]], dict(model.named_parameters()))


def lightning(model, optimizer):
    weights = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"state_dict": weights, "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [], "epoch": 3}


FILES = {
    "lightning": lightning,
    "timm": lambda m, o: {"state_dict": m.state_dict(), "optimizer": o.state_dict(), "arch": "x"},
    "plain loop": lambda m, o: {"model": m.state_dict(), "optimizer": o.state_dict()},
    "long names": lambda m, o: {"model_state_dict": m.state_dict(), "optimizer_state_dict": o.state_dict()},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlp.py").write_text(PROBLEM)
    return tmp_path


def live_number(model, optimizer):
    torch.manual_seed(0)
    x, y = torch.randn(128, 6), torch.randint(3, (128,))
    found = hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y), quantities=[QUANTITY], optimizer=optimizer)
    return found[QUANTITY].value


@pytest.mark.parametrize("groups", [plain, decay_first])
@pytest.mark.parametrize("kind", FILES)
def test_the_command_finds_the_state_beside_the_weights(kind, groups, folder):
    model, optimizer = trained(groups)
    torch.save(FILES[kind](model, optimizer), folder / "run.ckpt")
    code, out, err = call("analyze", "mlp.py:problem", "-c", "run.ckpt", "--quantities", QUANTITY, "--json")
    assert code == 0, err
    metric = json.loads(out)["metrics"][QUANTITY]
    assert metric["value"] == pytest.approx(live_number(model, optimizer), rel=1e-6)
    assert metric["provenance"]["settings"]["formula"] == "38/lr"


def test_a_folder_of_the_trainer_holds_it_beside_the_weights(folder):
    model, optimizer = trained(decay_first)
    (folder / "checkpoint-5").mkdir()
    save_file(model.state_dict(), folder / "checkpoint-5" / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / "checkpoint-5" / "optimizer.pt")
    for spec in ("checkpoint-5", "checkpoint-5/model.safetensors"):
        code, out, err = call("analyze", "mlp.py:problem", "-c", spec, "--quantities", QUANTITY)
        assert code == 0, err
        assert "of the threshold 38/lr = 3,800" in " ".join(out.split())


def test_a_trajectory_has_the_share_of_the_threshold(folder):
    for epoch, steps in enumerate((2, 8)):
        model, optimizer = trained(plain, steps=steps)
        torch.save(FILES["plain loop"](model, optimizer), folder / f"epoch{epoch}.pt")
    asked = ("--quantities", f"lambda_max,{QUANTITY}", "-o", "out")
    code, out, err = call("analyze", "mlp.py:problem", "--track", "-c", "epoch*.pt", *asked)
    assert code == 0, err
    assert "λ_max(P⁻¹H)/threshold" in out
    rows = (folder / "out" / "trajectory.csv").read_text().splitlines()
    assert sum(f"{QUANTITY}_over_threshold" in row for row in rows) == 2
    assert "λ_max(P⁻¹H)" in (folder / "out" / "report.html").read_text()


def test_a_check_holds_it_against_a_budget(folder):
    model, optimizer = trained(plain)
    torch.save(FILES["plain loop"](model, optimizer), folder / "run.pt")
    value = live_number(model, optimizer)
    for limit, expected in ((2 * value, 0), (0.5 * value, 1)):
        (folder / "hessdiag.toml").write_text(
            'problem = "mlp.py:problem"\ncheckpoint = "run.pt"\n'
            f"[check.budgets]\n{QUANTITY} = {{ max = {limit} }}\n"
        )
        code, out, err = call("check")
        assert code == expected, (out, err)


def test_without_a_state_the_file_says_how_to_save_one(folder):
    model, optimizer = trained(plain)
    torch.save(model.state_dict(), folder / "weights.pt")
    save_file(model.state_dict(), folder / "weights.safetensors")
    torch.save({"model": model.state_dict(), "optimizer_states": [optimizer.state_dict()] * 2}, folder / "two.pt")
    for name, text in (
        ("weights.pt", "holds no optimizer's state (it holds 0.bias"),
        ("weights.safetensors", "holds no optimizer's state (it holds weights alone)"),
        ("two.pt", "the states of 2 optimizers"),
    ):
        code, out, err = call("analyze", "mlp.py:problem", "-c", name, "--quantities", QUANTITY, "-q")
        assert (code, out) == (LoadError.exit_code, "") and text in err and err.count("\n") == 1
        assert call("analyze", "mlp.py:problem", "-c", name, "--quantities", "lambda_max", "-q")[0] == 0
    code, _, err = call("analyze", "mlp.py:problem", "--quantities", QUANTITY, "-q")
    assert code == 2 and "needs the optimizer's state" in err


class Touch:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_no_code_of_a_state_runs(folder):
    model, _ = trained(plain)
    (folder / "run").mkdir()
    save_file(model.state_dict(), folder / "run" / "model.safetensors")
    torch.save({"state": Touch(), "param_groups": []}, folder / "run" / "optimizer.pt")
    code, _, err = call("analyze", "mlp.py:problem", "-c", "run", "--quantities", QUANTITY, "-q")
    assert code == LoadError.exit_code and "it can run code" in err
    assert not (folder / "ran").exists()


def test_the_state_is_read_when_it_is_asked_for_and_not_before(folder, monkeypatch):
    model, optimizer = trained(plain)
    torch.save(FILES["plain loop"](model, optimizer), folder / "run.pt")
    monkeypatch.setattr(SavedOptimizer, "state_dict", lambda self: pytest.fail("read"))
    assert call("analyze", "mlp.py:problem", "-c", "run.pt", "--quantities", "trace", "-q")[0] == 0


BROKEN = {
    "groups in the model's order": (
        "decay first",
        matching,
        "by_order",
        lambda shapes, named: _cut(list(named), [len(group) for group in shapes]),
    ),
    "names in the model's order": ("named", matching, "_names", lambda groups, places, named: [list(named)]),
}


def _cut(names, sizes):
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [names[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    groups, where, name, broken = breakage
    assert same(ORDERS[groups])
    monkeypatch.setattr(where, name, broken)
    try:
        right = same(ORDERS[groups])
    except ProblemError:  # shapes give it away
        right = False
    assert not right
