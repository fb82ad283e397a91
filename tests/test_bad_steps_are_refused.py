"""Promise: settings and closures that make no sense are refused in one line, the weights untouched. (3 s)"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag.engine.training import batch_loss
from hessdiag.errors import UsageError
from hessdiag.regularizers import ASAM, HSR, NSO, SAM, LabelNoise, SpectralRadius, TracePenalty, wrapper
from tests.models import same
from tests.training_runs import KINDS, X, Y, loss_of, net, state

ALL = KINDS | {
    "LabelNoise": lambda optimizer: LabelNoise(optimizer, sigma=0.1),
    "SpectralRadius": lambda optimizer: SpectralRadius(optimizer, mu=0.1),
    "TracePenalty": lambda optimizer: TracePenalty(optimizer, mu=0.1),
    "TracePenalty, differences": lambda optimizer: TracePenalty(optimizer, mu=0.1, third="difference"),
    "HSR": lambda optimizer: HSR(optimizer, mu=0.1, probes=1),
}
SEVERAL = ("SAM", "ASAM", "NSO", "TracePenalty, differences")  # these pass over the batch more than once


def bad_closures() -> dict[str, tuple]:
    model = net()
    (fixed,) = [loss_of(model)()]
    linear = sum(p.sum() for p in model.parameters())
    hidden = model[1](model[0](X))
    table = nn.Embedding(5, 3, sparse=True).double()

    def backward_inside():
        loss = loss_of(model)()
        loss.backward()
        return loss

    def in_place():
        loss = loss_of(model)()
        with torch.no_grad():
            model[0].weight.mul_(0.5)
        return loss

    return {
        "none given": (model, None, "needs a closure"),
        "no function": (model, 3.0, "a function returning the loss"),
        "no micro-batches": (model, [], "a function returning the loss"),
        "a number": (model, lambda: 3.0, "returned float"),
        "nothing": (model, lambda: None, "returned NoneType"),
        "a vector": (model, lambda: F.cross_entropy(model(X), Y, reduction="none"), "return one number"),
        "integers": (model, lambda: (model(X) > 0).sum(), "return one number"),
        "detached": (model, lambda: loss_of(model)().detach(), "has no graph"),
        "no_grad": (model, torch.no_grad()(loss_of(model)), "has no graph"),
        "the same loss": (model, lambda: fixed, "anew"),
        "the same loss, linear": (model, lambda: linear, "anew"),
        "outputs from before": (model, lambda: F.cross_entropy(model[2](hidden), Y), "anew"),
        "backward inside": (model, backward_inside, "not call backward"),
        "changes weights": (model, in_place, "in place"),
        "another model": (model, loss_of(net()), "takes part"),
        "sparse": (table, lambda: table(Y).sum(), "sparse=False"),
    }


def test_bad_closures_are_refused():
    for name, make in ALL.items():
        for model, closure, words in bad_closures().values():
            if words == "anew" and name not in SEVERAL:
                continue  # one pass over a graph made elsewhere is right once, and refused at the next step
            own = make(torch.optim.SGD(model.parameters(), lr=0.1))
            before = [p.detach().clone() for p in model.parameters()]
            with pytest.raises(UsageError, match=words) as caught:
                own.step(closure)
            assert "\n" not in str(caught.value)
            assert same([p.detach() for p in model.parameters()], before)


def test_a_change_in_a_later_pass_is_refused():
    """Weights, momentum and the loss's graph: all as before, although the first pass was in order."""
    for name in SEVERAL:
        model, calls = net(), []
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        own = ALL[name](inner)
        own.step(loss_of(model))
        before = state(model, inner)

        def closure(model=model, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                with torch.no_grad():
                    model[0].weight.mul_(0.5)
            return loss_of(model)()

        with pytest.raises(UsageError, match="in place"):
            own.step(closure)
        assert same(state(model, inner), before)
        assert own.steps == 1


PARAMS = [nn.Parameter(torch.ones(2))]
SGD = torch.optim.SGD(PARAMS, lr=0.1)
BAD_SETTINGS = {
    "rho negative": (lambda: SAM(SGD, rho=-0.1), "rho=-0.1"),
    "rho NaN": (lambda: ASAM(SGD, rho=math.nan), "rho=nan"),
    "rho infinite": (lambda: SAM(SGD, rho=math.inf), "rho=inf"),
    "rho a word": (lambda: SAM(SGD, rho="0.1"), "rho='0.1'"),
    "rho true": (lambda: SAM(SGD, rho=True), "rho=True"),
    "rho scheduled negative": (lambda: SAM(SGD, rho=lambda step: -1.0), "rho=-1.0"),
    "rho of a group": (lambda: SAM(torch.optim.SGD([{"params": PARAMS, "rho": -1}], lr=0.1)), "rho=-1"),
    "eta": (lambda: ASAM(SGD, eta=-1.0), "eta=-1.0"),
    "sigma negative": (lambda: NSO(SGD, sigma=-0.1), "sigma=-0.1"),
    "sigma of NSO NaN": (lambda: NSO(SGD, sigma=math.nan), "sigma=nan"),
    "sigma scheduled NaN": (lambda: NSO(SGD, sigma=lambda step: math.nan), "sigma=nan"),
    "mu negative": (lambda: HSR(SGD, mu=-0.1), "mu=-0.1"),
    "mu NaN": (lambda: SpectralRadius(SGD, mu=math.nan), "mu=nan"),
    "mu infinite": (lambda: TracePenalty(SGD, mu=math.inf), "mu=inf"),
    "sigma NaN": (lambda: LabelNoise(SGD, sigma=math.nan), "sigma=nan"),
    "draws": (lambda: NSO(SGD, draws=0), "draws=0"),
    "noise": (lambda: NSO(SGD, noise="cauchy"), "normal, uniform, laplace"),
    "mix": (lambda: NSO(SGD, mix=1.5), "mix=1.5"),
    "clip_norm": (lambda: SAM(SGD, clip_norm=0.0), "clip_norm=0.0"),
    "no optimizer": (lambda: SAM(PARAMS), "not list"),
    "LBFGS": (lambda: SAM(torch.optim.LBFGS(PARAMS)), "not LBFGS"),
    "wrapped twice": (lambda: SAM(NSO(SGD)), "not NSO"),
    "all frozen": (lambda: SAM(torch.optim.SGD([torch.ones(2)], lr=0.1)).step(lambda: 0), "frozen"),
    "another's state": (lambda: SAM(SGD).load_state_dict(NSO(SGD).state_dict()), "of NSO, not of SAM"),
    "a bare state": (lambda: SAM(SGD).load_state_dict(SGD.state_dict()), "a bare optimizer"),
    "targets not called": (
        lambda: LabelNoise(SGD, sigma=0.1).step(lambda: (PARAMS[0] ** 2).sum()),
        "did not call LabelNoise.targets",
    ),
    "labels without classes": (lambda: LabelNoise(SGD, sigma=0.1).targets(Y), "classes=10"),
    "labels above 1": (lambda: LabelNoise(SGD, sigma=1.5).targets(Y, classes=3), "up to 1"),
}


def test_bad_settings_are_refused():
    for call, words in BAD_SETTINGS.values():
        with pytest.raises(UsageError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert torch.equal(PARAMS[0], torch.ones(2))


def trusting(params):
    return torch.zeros(()), tuple(torch.zeros_like(p) for p in params)


def unwatched(closure, params):
    loss = closure()
    return loss.detach(), torch.autograd.grad(loss, params)


BROKEN = {
    "any number goes": (
        test_bad_settings_are_refused,
        wrapper.Regularizer,
        "_valid",
        staticmethod(lambda name, value: float(value)),
    ),
    "a later pass is not watched": (
        test_a_change_in_a_later_pass_is_refused,
        batch_loss,
        "loss_and_gradient",
        lambda c, p, **o: unwatched(c, p),
    ),
    "any closure goes": (
        test_bad_closures_are_refused,
        batch_loss,
        "loss_and_gradient",
        lambda c, p, **o: trusting(p),
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    promise, where, name, broken = breakage
    monkeypatch.setattr(where, name, broken)
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # the latter from pytest.raises in a promise
        promise()
