"""Promise: preconditioned_lambda_max is that of torch's own steps, and its threshold is where they diverge. (30 s)

Oracles: torch's optimizers themselves, asked for their step along a gradient too small to move their averages,
and run on quadratics; torch.autograd.functional.hessian for the dense matrix. No formula of the package's is used.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hessdiag
from hessdiag.analysis import Measurement, preconditioned
from hessdiag.errors import ProblemError
from hessdiag.operator import Scaled, as_operator
from hessdiag.optimizers import preconditioner_of, recognized
from hessdiag.present.words import reading
from hessdiag.settings import Settings
from tests import models

TINY = 1e-13  # of a probe gradient: its square is nothing beside averages of real ones
MOMENTUM = ("exp_avg", "momentum_buffer")
OPTIM = torch.optim
CASES = {
    "Adam": (OPTIM.Adam, {"lr": 1e-2}, 0.1),
    "Adam, beta1 0.5": (OPTIM.Adam, {"lr": 1e-2, "betas": (0.5, 0.99), "eps": 1e-3}, 0.5),
    "Adam, beta1 0": (OPTIM.Adam, {"lr": 1e-2, "betas": (0.0, 0.9)}, 1.0),
    "AMSGrad": (OPTIM.Adam, {"lr": 1e-2, "betas": (0.9, 0.5), "amsgrad": True}, 0.1),
    "Adam, rate as a tensor": (OPTIM.Adam, {"lr": torch.tensor(1e-2, dtype=torch.float64), "foreach": False}, 0.1),
    "Adam, fused": (OPTIM.Adam, {"lr": 1e-2, "fused": True}, 0.1),
    "Adam, foreach": (OPTIM.Adam, {"lr": 1e-2, "foreach": True}, 0.1),
    "AdamW": (OPTIM.AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.0}, 0.2),
    "Adamax": (OPTIM.Adamax, {"lr": 1e-2}, 0.1),
    "RAdam": (OPTIM.RAdam, {"lr": 1e-2, "betas": (0.9, 0.9)}, 0.1),
    "RAdam at first": (OPTIM.RAdam, {"lr": 1e-2}, 0.1),
    "NAdam": (OPTIM.NAdam, {"lr": 1e-2}, None),
    "RMSprop": (OPTIM.RMSprop, {"lr": 1e-2, "eps": 1e-4}, 1.0),
    "RMSprop, centered": (OPTIM.RMSprop, {"lr": 1e-2, "centered": True}, 1.0),
    "RMSprop, momentum": (OPTIM.RMSprop, {"lr": 1e-2, "momentum": 0.8}, 1.0),
    "Adagrad": (OPTIM.Adagrad, {"lr": 1e-1, "lr_decay": 0.01}, 1.0),
    "Adadelta": (OPTIM.Adadelta, {"lr": 1.0}, 1.0),
    "SGD": (OPTIM.SGD, {"lr": 1e-1}, 1.0),
    "SGD, momentum": (OPTIM.SGD, {"lr": 1e-1, "momentum": 0.9}, 1.0),
    "SGD, dampening": (OPTIM.SGD, {"lr": 1e-1, "momentum": 0.9, "dampening": 0.5}, 0.5),
    "SGD, Nesterov": (OPTIM.SGD, {"lr": 1e-1, "momentum": 0.9, "nesterov": True}, 1.9),
}
"""Class, options, and what a step takes of a gradient at once, in units of lr / P; None: see the simulation."""


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data():
    return models.randn(64, 5, seed=3), torch.arange(64) % 3


def trained(case, steps=4):
    """A network after real steps, its optimizer and its data."""
    kind, options, _ = CASES[case]
    model, (x, y) = network(), data()
    optimizer = kind(model.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer, (x, y)


def with_numerators(optimizer, before):
    """Adadelta's numerator as the last step had it: the state holds that of the next one."""
    for one, state in zip(optimizer.state.values(), before.values(), strict=False):
        if "acc_delta" in state:
            one["acc_delta"].copy_(state["acc_delta"])


def probed(model, optimizer, case):
    """P as the optimizer's own step shows it, and the optimizer after that step; the model stays."""
    (kind, options, share), twin, saved = CASES[case], copy.deepcopy(model), optimizer.state_dict()
    other = kind(twin.parameters(), **options)
    other.load_state_dict(copy.deepcopy(saved))
    for state in other.state.values():
        for name in MOMENTUM:
            if torch.is_tensor(state.get(name)):
                state[name].zero_()
    with torch.no_grad():
        for one in twin.parameters():
            one.zero_()  # so that a step far below rounding shows
    for one in twin.parameters():
        one.grad = torch.full_like(one, TINY)
    other.step()
    with_numerators(other, saved["state"])
    lr = float(other.param_groups[0]["lr"])
    return torch.cat([(-share * lr * TINY / one.detach()).reshape(-1) for one in twin.parameters()]), other


def dense(model, x, y):
    names, values = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)
    sizes = [value.numel() for value in values]

    def loss(flat):
        parts = [part.view_as(value) for part, value in zip(flat.split(sizes), values, strict=True)]
        return cross_entropy(functional_call(model, dict(zip(names, parts, strict=True)), (x,)), y)

    return torch.autograd.functional.hessian(loss, torch.cat([value.reshape(-1) for value in values]))


def ours(model, optimizer):
    named = dict(model.named_parameters())
    return preconditioner_of(optimizer, named, list(named))


def off(case):
    """How far P is from the one that torch's own step shows, relative."""
    model, optimizer, _ = trained(case)
    P, after = probed(model, optimizer, case)
    own = preconditioner_of(
        after.state_dict(), dict(model.named_parameters()), [n for n, _ in model.named_parameters()]
    )
    return float((own.diagonal() ** -2 / P - 1).abs().max())


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2] is not None])
def test_the_preconditioner_is_that_of_torchs_own_step(case):
    assert off(case) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict_says_what_the_optimizer_says(case):
    model, optimizer, _ = trained(case)
    live, saved = ours(model, optimizer), ours(model, optimizer.state_dict())
    assert torch.equal(live.diagonal(), saved.diagonal()) and live.threshold == saved.threshold
    assert live.formula == saved.formula and live.optimizer == saved.optimizer


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2] is not None])
def test_the_number_is_that_of_the_dense_matrix(case):
    model, optimizer, (x, y) = trained(case)
    P, after = probed(model, optimizer, case)
    H = dense(model, x, y) / P.sqrt() / P.sqrt()[:, None]
    truth = float(torch.linalg.eigvalsh(H)[-1])
    asked = {"quantities": ["preconditioned_lambda_max"], "optimizer": after.state_dict()}
    found = hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y), **asked)
    metric = found.preconditioned_lambda_max
    assert (
        metric.lo <= truth * (1 + 1e-12) and truth <= metric.hi and metric.value == pytest.approx(truth, rel=1e-3)
    )
    assert list(found.metrics) == ["preconditioned_lambda_max"]
    threshold = metric.provenance.settings["threshold"]
    assert metric.over_threshold == (metric.value / threshold, metric.lo / threshold, metric.hi / threshold)
    operator = hessdiag.hessian(model, nn.CrossEntropyLoss(), (x, y)).preconditioned(after.state_dict())
    assert torch.allclose(operator.dense(), H, rtol=1e-8, atol=1e-10 * truth)
    assert operator.threshold == threshold and operator.layout == operator.base.layout


def quadratic(seed=5, size=6):
    Q = torch.linalg.qr(models.randn(size, size, seed=seed)).Q
    return (Q * torch.linspace(0.5, 3.0, size).double()) @ Q.T


def growth(kind, options, seed=5, rates=(1.0, 1.0), more=({}, {}), steps=6000):
    """How a quadratic's iterates grow at 0.99 and 1.01 of the threshold, P held by torch's own optimizer.

    Args:
        rates: of two groups, as shares of one that is chosen so.
        more: options of the two groups.
    """
    H, grown = quadratic(seed), []
    for share in (0.99, 1.01):
        pair = [nn.Parameter(models.randn(3, seed=11).double()), nn.Parameter(models.randn(3, seed=12).double())]
        named = {"a": pair[0], "b": pair[1]}

        def groups(lr, pair=pair):
            return [{"params": [one], "lr": r * lr, **m} for one, r, m in zip(pair, rates, more, strict=True)]

        optimizer = kind(groups(1e-4), **options)
        for step in range(30):
            for one, part in zip(pair, models.randn(6, seed=20 + step).split(3), strict=True):
                one.grad = part.double()
            optimizer.step()
        kept = copy.deepcopy(optimizer.state_dict()["state"])

        def step(pair=pair, optimizer=optimizer, kept=kept):
            x = torch.cat([one.detach() for one in pair])
            for index, (one, part) in enumerate(zip(pair, (H @ x).split(3), strict=True)):
                one.grad = part
                for name, value in kept.get(index, {}).items():
                    if name not in MOMENTUM and torch.is_tensor(value):
                        optimizer.state[one][name].copy_(value)
            optimizer.step()

        with torch.no_grad():
            for one in pair:
                one.mul_(TINY)
        for one in pair:
            for name in MOMENTUM:
                if torch.is_tensor(optimizer.state[one].get(name)):
                    optimizer.state[one][name].zero_()
        step()
        with_numerators(optimizer, kept)
        found = preconditioner_of(optimizer, named, ["a", "b"])
        D = found.diagonal()
        sharpest = float(torch.linalg.eigvalsh(D[:, None] * H * D)[-1])
        for group, r in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = r * 1e-4 * share * found.threshold / sharpest
        begun = max(float(one.detach().abs().max()) for one in pair)
        for _ in range(steps):
            step()
            largest = max(float(one.detach().abs().max()) for one in pair)
            if largest > 1e5 * begun:
                break
        grown.append(largest / begun)
    return grown


SIMULATED = {
    **{f"Adam, beta1 {b}": (OPTIM.Adam, {"betas": (b, 0.99)}) for b in (0.0, 0.3, 0.5, 0.8, 0.9, 0.95)},
    "AdamW": (OPTIM.AdamW, {"weight_decay": 0.0}),
    "AMSGrad": (OPTIM.Adam, {"amsgrad": True}),
    "Adamax": (OPTIM.Adamax, {"betas": (0.7, 0.99)}),
    "RAdam": (OPTIM.RAdam, {"betas": (0.6, 0.9)}),
    "NAdam": (OPTIM.NAdam, {}),
    "NAdam, beta1 0.5": (OPTIM.NAdam, {"betas": (0.5, 0.99), "momentum_decay": 0.1}),
    "RMSprop": (OPTIM.RMSprop, {}),
    "RMSprop, momentum": (OPTIM.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (OPTIM.Adagrad, {}),
    "Adadelta": (OPTIM.Adadelta, {}),
    "SGD": (OPTIM.SGD, {}),
    "SGD, momentum": (OPTIM.SGD, {"momentum": 0.9}),
    "SGD, dampening": (OPTIM.SGD, {"momentum": 0.5, "dampening": 0.3}),
    "SGD, Nesterov": (OPTIM.SGD, {"momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("case", SIMULATED)
def test_steps_are_stable_below_the_threshold_and_diverge_above(case):
    below, above = growth(*SIMULATED[case])
    assert below < 10 and above > 1e5


def test_groups_with_rates_of_their_own_have_one_threshold():
    for kind, options in (SIMULATED["Adam, beta1 0.9"], SIMULATED["SGD, Nesterov"]):
        below, above = growth(kind, options, rates=(1.0, 0.2))
        assert below < 10 and above > 1e5


def test_groups_with_momenta_of_their_own_have_one_threshold():
    different = ({"betas": (0.95, 0.99)}, {"betas": (0.3, 0.9)})
    below, above = growth(OPTIM.Adam, {}, rates=(1.0, 0.5), more=different)
    assert below < 10 and above > 1e5


@pytest.mark.parametrize(("beta", "factor"), [(0.9, 38), (0.5, 6), (0.0, 2)])
def test_the_threshold_of_adam_is_the_published_one(beta, factor):
    model, optimizer, _ = trained("Adam")
    optimizer.param_groups[0]["betas"] = (beta, 0.999)
    found = ours(model, optimizer)
    assert found.threshold == pytest.approx(factor / 1e-2) and found.formula == f"{factor}/lr"


def test_a_rate_of_zero_has_no_threshold_and_says_so():
    model, optimizer, (x, y) = trained("Adam")
    optimizer.param_groups[0]["lr"] = 0.0
    asked = {"quantities": ["preconditioned_lambda_max"], "optimizer": optimizer}
    found = hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y), **asked)
    assert found.preconditioned_lambda_max.over_threshold is None
    text = " ".join(reading(found))
    assert "no threshold while the learning rate is 0" in text


def test_the_reading_says_share_and_threshold_and_the_note_weight_decay():
    model, optimizer, (x, y) = trained("Adam")
    optimizer.param_groups[0]["weight_decay"] = 0.25
    problem = hessdiag.Problem.of(model, nn.CrossEntropyLoss(), (x, y), optimizer=optimizer)
    found = hessdiag.analyze(problem, ["lambda_max", "preconditioned_lambda_max"])
    text = " ".join(reading(found))
    assert "of the threshold 38/lr = 3,800" in text
    assert any("weight decay (0.25) is not in" in note for note in found.notes)
    assert found.lambda_max.value == pytest.approx(hessdiag.analyze(problem, "lambda_max").lambda_max.value)


def test_it_is_measured_only_when_asked_for():
    model, optimizer, (x, y) = trained("Adam")
    found = hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y), optimizer=optimizer)
    assert "preconditioned_lambda_max" not in found and "optimizer_sha256" not in found.fingerprint
    assert "preconditioned_lambda_max" not in Settings().quantities


def test_a_result_is_read_back(tmp_path):
    model, optimizer, (x, y) = trained("Adam")
    asked = {"quantities": ["trace", "preconditioned_lambda_max"], "optimizer": optimizer}
    found = hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y), **asked)
    found.save(tmp_path)
    again = hessdiag.load_run(tmp_path)
    assert again.preconditioned_lambda_max == found.preconditioned_lambda_max
    assert again.fingerprint.optimizer_sha256 == found.fingerprint.optimizer_sha256 is not None


def test_another_state_of_the_optimizer_is_another_measurement():
    model, optimizer, (x, y) = trained("Adam")
    keys = set()
    for lr in (1e-2, 1e-3):
        optimizer.param_groups[0]["lr"] = lr
        problem = hessdiag.Problem.of(model, nn.CrossEntropyLoss(), (x, y), optimizer=optimizer)
        keys.add(Measurement(problem, Settings(quantities=("preconditioned_lambda_max",))).key)
    assert len(keys) == 2


def wide_spread():
    """A network in float32, some of whose averages are nothing: D spans four orders of magnitude."""
    model, optimizer, (x, y) = trained("Adam", steps=30)
    for state in optimizer.state.values():
        state["exp_avg_sq"][..., ::3] *= 1e-10
    return model, optimizer, (x, y)


def test_float32_holds_the_float64_truth():
    model, optimizer, (x, y) = wide_spread()
    P = ours(model, optimizer).diagonal() ** -2
    truth = float(torch.linalg.eigvalsh(dense(model, x, y) / P.sqrt() / P.sqrt()[:, None])[-1])
    saved = optimizer.state_dict()
    single = (x.float(), y)
    asked = {"quantities": ["preconditioned_lambda_max"], "optimizer": saved}
    found = hessdiag.analyze(model.float(), nn.CrossEntropyLoss(), single, **asked).preconditioned_lambda_max
    assert found.lo <= truth <= found.hi and found.value == pytest.approx(truth, rel=2e-3)


class Sure(nn.Module):
    """Two heads, of which the second is so sure that float32 leaves next to no digit of its curvature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.usual, self.sure = nn.Linear(5, 3), nn.Linear(5, 3)
        with torch.no_grad():
            self.sure.bias.copy_(torch.tensor([17.0, 0.0, 0.0]))

    def forward(self, x):
        return self.usual(x), self.sure(x)


def two_losses(outputs, targets):
    return cross_entropy(outputs[0], targets) + cross_entropy(outputs[1], 0 * targets)


def sure_measurement(dtype):
    """With P of eps alone for the second head: its curvature of 1e-7 becomes the largest."""
    model, (x, y) = Sure().to(dtype), data()
    state = {
        place: {
            "step": 10_000,
            "exp_avg": torch.zeros_like(one),
            "exp_avg_sq": torch.full_like(one, float(name.startswith("usual"))),
        }
        for place, (name, one) in enumerate(model.named_parameters())
    }
    saved = {"state": state, "param_groups": OPTIM.Adam(model.parameters()).state_dict()["param_groups"]}
    problem = hessdiag.Problem.of(model, two_losses, (x.to(dtype), y), optimizer=saved)
    return Measurement(problem, Settings(quantities=("preconditioned_lambda_max",)))


def sure_interval_holds():
    truth = sure_measurement(torch.float64).run().preconditioned_lambda_max.value
    found = sure_measurement(torch.float32).run().preconditioned_lambda_max
    assert truth > 1
    return found.lo <= truth <= found.hi


def test_rounding_that_the_preconditioner_brings_forward_is_in_the_interval(monkeypatch):
    assert sure_interval_holds()
    monkeypatch.setattr(preconditioned, "preconditioned_floor", lambda scaled, operator: operator.floor)
    assert not sure_interval_holds()


def test_a_budget_and_the_other_quantities_go_together():
    model, optimizer, (x, y) = trained("Adam")
    asked = {"quantities": ["lambda_max", "trace", "preconditioned_lambda_max"], "optimizer": optimizer}
    found = hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y), budget="30p", **asked)
    assert {"lambda_max", "preconditioned_lambda_max"} <= {*found.metrics} and found.cost.products <= 34


def test_scaled_operators_are_their_matrices():
    A = quadratic()
    D = models.randn(6, seed=2).double()
    scaled = Scaled(as_operator(A), D)
    assert torch.allclose(scaled.dense(), D[:, None] * A * D)
    with pytest.raises(hessdiag.HessdiagError, match=r"of shape \(5,\)"):
        Scaled(as_operator(A), D[:5])
    with pytest.raises(hessdiag.HessdiagError, match="not finite"):
        Scaled(as_operator(A), D / 0)


class Own(OPTIM.Adam):
    def step(self, closure=None):
        return super().step(closure)


class Named(OPTIM.Adam):
    """A class of one's own whose step is Adam's."""


def test_classes_that_step_as_torchs_do_are_known():
    model, _, _ = trained("Adam")
    optimizer = Named(model.parameters())
    model(data()[0]).square().sum().backward()
    optimizer.step()
    assert ours(model, optimizer).optimizer == "Adam"


def never(model, optimizer):
    del optimizer.state[model[2].weight]


def zero(model, optimizer):
    optimizer.param_groups[0]["eps"] = 0.0
    optimizer.state[model[0].bias]["exp_avg_sq"][1] = 0.0


def spoiled(model, optimizer):
    optimizer.state[model[0].bias]["exp_avg_sq"][1] = float("nan")


WRONG = {
    "never stepped": ("Adam", never, "never stepped 2.weight, so"),
    "maximize": ("Adam", lambda m, o: o.param_groups[0].update(maximize=True), "maximize=True"),
    "eps 0": ("Adam", zero, "divides 1 of 6 numbers of 0.bias by zero"),
    "NaN": ("Adam", spoiled, "divides 1 of 6 numbers of 0.bias by zero, NaN"),
    "negative rate": ("Adam", lambda m, o: o.param_groups[0].update(lr=-1.0), "lr=-1"),
    "three betas": ("Adam", lambda m, o: o.param_groups[0].update(betas=(1, 2, 3)), "cannot be read as Adam's"),
    "step 0": ("Adam", lambda m, o: o.state[m[0].bias]["step"].zero_(), "never stepped 0.bias"),
    "momentum 1": ("SGD, momentum", lambda m, o: o.param_groups[0].update(momentum=1.0), "momentum=1.0"),
    "dampening 1": (
        "SGD, momentum",
        lambda m, o: o.param_groups[0].update(dampening=1.0),
        "no threshold is known",
    ),
    "not all parameters": ("Adam", lambda m, o: o.param_groups[0]["params"].pop(), "does not hold 2.bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_states_that_say_nothing_are_refused_in_one_line(case):
    kind, spoil, text = WRONG[case]
    model, optimizer, _ = trained(kind)
    spoil(model, optimizer)
    with pytest.raises(ProblemError, match=text) as refusal:
        ours(model, optimizer)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda m: OPTIM.LBFGS(m.parameters()),
            "the optimizer is LBFGS, whose steps are not known here: understood",
        ),
        (lambda m: OPTIM.Rprop(m.parameters()), "Rprop"),
        (lambda m: OPTIM.ASGD(m.parameters()), "ASGD"),
        (lambda m: Own(m.parameters()), "Own"),
        (lambda _: 3, "the optimizer is int: give an optimizer of torch"),
        (lambda _: {"exp_avg": 1}, "state dict holds exp_avg"),
        (lambda _: OPTIM.Adam(network().parameters()), "none of the model's parameters, perhaps those of a copy"),
        (lambda m: OPTIM.Adam(m.parameters()), "never stepped 0.weight, 0.bias, 2.weight and 1 more"),
    ],
)
def test_optimizers_that_are_not_understood_are_refused_by_name(make, text):
    model = network()
    with pytest.raises(ProblemError, match=text):
        ours(model, make(model))


def test_without_an_optimizer_it_is_refused_before_anything_is_measured():
    x, y = data()
    with pytest.raises(ProblemError, match=r"Problem\(optimizer=optimizer\), analyze"):
        hessdiag.analyze(network(), nn.CrossEntropyLoss(), (x, y), quantities=["preconditioned_lambda_max"])


def rule(name, **changed):
    return tuple(dataclasses.replace(r, **changed) if r.name == name else r for r in recognized.RULES)


def _adam(group, state):
    return state["exp_avg_sq"].double().sqrt() + group["eps"]


ADAM = recognized.RULES[0]
BROKEN = {
    "no bias correction": ("Adam", rule("Adam", diagonal=_adam)),
    "amsgrad forgotten": (
        "AMSGrad",
        rule("Adam", diagonal=lambda g, s, of=ADAM.diagonal: of({**g, "amsgrad": False}, s)),
    ),
    "eps before the correction": ("RMSprop", rule("RMSprop", diagonal=lambda g, s: s["square_avg"].sqrt())),
    "centre forgotten": (
        "RMSprop, centered",
        rule("RMSprop", diagonal=lambda g, s: s["square_avg"].sqrt() + g["eps"]),
    ),
    "no rectification": ("RAdam", rule("RAdam", diagonal=ADAM.diagonal)),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    case, rules = breakage
    assert off(case) < 1e-9
    monkeypatch.setattr(recognized, "RULES", rules)
    assert off(case) > 1e-6


def test_this_promise_would_notice_another_threshold(monkeypatch):
    wrong = rule("Adam", factor=lambda group: 2 * (1 + group["betas"][0]))
    monkeypatch.setattr(recognized, "RULES", wrong)
    below, above = growth(*SIMULATED["Adam, beta1 0.9"])
    assert not (below < 10 and above > 1e5)
