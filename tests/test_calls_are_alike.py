"""Promise: a step is the same by a closure, in two calls, after backward, or the reference's way. (6 s)"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hessdiag.engine.training import training
from hessdiag.errors import NonFiniteError, UsageError
from hessdiag.regularizers import (
    ASAM,
    GSAM,
    HSR,
    NSO,
    SAM,
    USAM,
    FriendlySAM,
    LookSAM,
    SpectralRadius,
    TracePenalty,
    two_steps,
    wrapper,
)
from tests.models import same
from tests.training_runs import loss_of, net, sgd, state

TWO = {
    "SAM": lambda opt, **o: SAM(opt, rho=0.3, **o),
    "ASAM": lambda opt, **o: ASAM(opt, rho=0.3, **o),
    "USAM": lambda opt, **o: USAM(opt, rho=0.3, **o),
    "GSAM": lambda opt, **o: GSAM(opt, rho=0.3, **o),
    "FriendlySAM": lambda opt, **o: FriendlySAM(opt, rho=0.3, **o),
}
FIRST_ORDER = TWO | {
    "LookSAM": lambda opt, **o: LookSAM(opt, rho=0.3, every=2, **o),
    "NSO": lambda opt, **o: NSO(opt, sigma=0.2, mix=0.2, **o),
    "TracePenalty": lambda opt, **o: TracePenalty(opt, mu=0.1, third="difference", **o),
}
ALL = FIRST_ORDER | {
    "SpectralRadius": lambda opt, **o: SpectralRadius(opt, mu=0.1, **o),
    "HSR": lambda opt, **o: HSR(opt, mu=0.1, rule="alternating", **o),
}
ROWS = slice(0, 6), slice(6, 12)


def in_two(own, model, rows=(slice(None),)) -> None:
    """One step as other packages have it, with gradients accumulated over micro-batches."""
    for part in rows:
        (loss_of(model, part)() / len(rows)).backward()
    own.first_step(zero_grad=True)
    for part in rows:
        (loss_of(model, part)() / len(rows)).backward()
    own.second_step(zero_grad=True)


def weights(model: nn.Module, own) -> list[torch.Tensor]:
    """Weights, statistics and momentum, without gradients, which second_step has emptied."""
    own.zero_grad()
    return state(model, own.inner)


def test_two_calls_are_one(makers=TWO):
    """To the bit, with momentum, weight decay, clipping and BatchNorm, over three steps."""
    for make in makers.values():
        for options in ({}, {"clip_norm": 0.05}):
            one, two = net(nn.BatchNorm1d(6)), net(nn.BatchNorm1d(6))
            closed = make(sgd(one, weight_decay=0.1), model=one, **options)
            called = make(sgd(two, weight_decay=0.1), model=two, **options)
            for _ in range(3):
                closed.step(loss_of(one))
                in_two(called, two)
            assert same(weights(one, closed), weights(two, called))
            assert closed.steps == called.steps == 3
            assert same([p.grad for p in two.parameters() if p.grad is not None], [])


def test_two_calls_accumulate():
    for make in TWO.values():
        one, two = net(), net()
        closed, called = make(sgd(one)), make(sgd(two))
        for _ in range(2):
            closed.step([loss_of(one, rows) for rows in ROWS])
            in_two(called, two, ROWS)
        for a, b in zip(weights(one, closed), weights(two, called), strict=True):
            assert torch.allclose(a, b, rtol=1e-13, atol=1e-14)


def test_complex_weights_take_two_calls():
    start = torch.randn(3, 2, dtype=torch.cdouble, generator=torch.Generator().manual_seed(0))
    ends = []
    for two in (False, True):
        c = nn.Parameter(start.clone())
        own = SAM(torch.optim.SGD([c], lr=0.1), rho=0.3)
        loss = lambda c=c: (c.abs() ** 2).sum() + c.imag.sum() ** 2  # noqa: E731
        if two:
            loss().backward()
            own.first_step()
            loss().backward()
            own.second_step()
        else:
            own.step(loss)
        ends.append(c.detach().clone())
    assert torch.equal(*ends)


def test_backward_then_step_is_one_call(makers=ALL):
    """For every regularizer; between them the weights have not moved and .grad is there to be looked at."""
    for make in makers.values():
        one, two = net(), net()
        closed, called = make(sgd(one), clip_norm=0.5), make(sgd(two), clip_norm=0.5)
        for _ in range(3):
            before = [p.detach().clone() for p in two.parameters()]
            loss = closed.step([loss_of(one, rows) for rows in ROWS])
            other = called.backward([loss_of(two, rows) for rows in ROWS])
            assert same([p.detach() for p in two.parameters()], before)
            assert all(p.grad is not None for p in two.parameters())
            called.step()
            assert torch.equal(loss, other)
            assert closed.report == called.report
        assert same(state(one, closed.inner), state(two, called.inner))
        with pytest.raises(UsageError, match="needs a closure"):
            called.step()


def test_backward_inside_is_backward_outside(makers=FIRST_ORDER):
    """Closures as for torch.optim.LBFGS: gradients that were there stay there until the step ends."""
    for make in makers.values():
        one, two = net(nn.Dropout(0.3)), net(nn.Dropout(0.3))
        closed, called = make(sgd(one)), make(sgd(two), backward_inside=True)

        def full(two=two, called=called):
            called.zero_grad()
            loss = loss_of(two)()
            loss.backward()
            return loss

        for _ in range(3):
            torch.manual_seed(1)
            loss = closed.step(loss_of(one))
            torch.manual_seed(1)
            assert torch.equal(called.step(full), loss)
        assert same(state(one, closed.inner), state(two, called.inner))


def test_a_failing_backward_inside_leaves_gradients():
    """Weights, momentum and .grad of the last step are there after an error in the second pass."""
    model, calls = net(), []
    own = SAM(sgd(model), rho=0.3, backward_inside=True)

    def full():
        calls.append(1)
        model.zero_grad()
        loss_of(model)().backward()
        if len(calls) == 4:
            raise KeyboardInterrupt
        return torch.ones(())

    own.step(full)
    before = state(model, own.inner)
    with pytest.raises(KeyboardInterrupt):
        own.step(full)
    assert same(state(model, own.inner), before)


def test_backward_inside_refuses_what_it_cannot():
    model = net()

    def full():
        model.zero_grad()
        loss = loss_of(model)()
        loss.backward()
        return loss

    before = state(model)
    cases = {
        "need the loss's graph": lambda: SpectralRadius(sgd(model), mu=0.1, backward_inside=True).step(full),
        "scaler= needs the loss": lambda: SAM(
            sgd(model), backward_inside=True, scaler=torch.amp.GradScaler("cpu")
        ),
        "left no gradient": lambda: SAM(sgd(model), backward_inside=True).step(loss_of(model)),
        "returned NoneType": lambda: SAM(sgd(model), backward_inside=True).step(lambda: None),
        "not call backward": lambda: SAM(sgd(model)).step(full),
    }
    for words, call in cases.items():
        with pytest.raises(UsageError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
        model.zero_grad()
        assert same(state(model), before)


# -------------------------------------------------------------------------------------- the reference's signature


def test_parameters_and_a_class_are_understood():
    """SAM(params, SGD, rho=..., adaptive=..., lr=...) makes what SAM(SGD(params, lr=...), rho=...) makes."""
    sgd_ = {"lr": 0.5, "momentum": 0.9}
    calls = {
        "keywords": lambda p: SAM(p, torch.optim.SGD, rho=0.2, adaptive=True, lr=0.5, momentum=0.9),
        "positions": lambda p: SAM(p, torch.optim.SGD, 0.2, True, lr=0.5, momentum=0.9),
        "all by name": lambda p: SAM(params=p, base_optimizer=torch.optim.SGD, rho=0.2, adaptive=True, **sgd_),
        "base by name": lambda p: SAM(p, base_optimizer=torch.optim.SGD, rho=0.2, adaptive=True, **sgd_),
        "ours": lambda p: SAM(torch.optim.SGD(p, lr=0.5, momentum=0.9), 0.2, adaptive=True),
        "eta": lambda p: ASAM(p, torch.optim.SGD, rho=0.2, eta=0.0, lr=0.5, momentum=0.9),
    }  # fmt: skip
    ends = []
    for call in calls.values():
        model = net()
        own = call(model.parameters())
        for _ in range(2):
            in_two(own, model)
        ends.append(state(model, own.inner))
    assert all(same(end, ends[0]) for end in ends)


def test_its_groups_and_our_options_are_understood():
    model = net()
    layers = [{"params": model[0].parameters(), "rho": 0.0}, {"params": model[2].parameters(), "lr": 0.7}]
    own = SAM(layers, torch.optim.AdamW, rho=0.2, clip_norm=1.0, model=model, lr=0.1, weight_decay=0.3)
    assert isinstance(own.inner, torch.optim.AdamW)
    assert [g["lr"] for g in own.param_groups] == [0.1, 0.7]
    assert own.param_groups[0]["weight_decay"] == 0.3
    assert own.scheduled("rho", own.rho) == (0.0, 0.0, 0.2, 0.2)


REFUSED = {
    "a setting of neither": (lambda p: SAM(p, torch.optim.SGD, lr=0.1, speed=3), "SGD refuses its settings"),
    "no learning rate asked": (lambda p: SAM(p, torch.optim.SGD, lr=-1.0), "SGD refuses its settings"),
    "an optimizer and a class": (
        lambda p: SAM(torch.optim.SGD(p), torch.optim.SGD, lr=0.1),
        "parameters and a class",
    ),
    "LBFGS": (lambda p: SAM(p, torch.optim.LBFGS, lr=0.1), "not LBFGS"),
    "a regularizer": (lambda p: SAM(p, NSO, lr=0.1), "NSO"),
    "nothing": (lambda p: SAM(), "not NoneType"),
    "parameters alone": (lambda p: SAM(list(p), lr=0.1), "SAM has no option lr|not list"),
}


def test_other_calls_are_refused_in_one_line():
    for call, words in REFUSED.values():
        with pytest.raises(UsageError, match=words) as caught:
            call(net().parameters())
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- the order of calls


def moved():
    """A SAM between first_step and second_step, its model and the weights before."""
    model = net()
    own = SAM(sgd(model), rho=0.3)
    own.step(loss_of(model))
    own.zero_grad()
    before = state(model, own.inner)
    loss_of(model)().backward()
    own.first_step()
    return model, own, before


ORDER = {
    "first twice": (lambda m, own: own.first_step(), "first_step was called already"),
    "no second gradient": (lambda m, own: own.second_step(), "call loss.backward\\(\\) at the moved weights"),
    "a closure between": (lambda m, own: own.step(loss_of(m)), "step between first_step and second_step"),
    "backward between": (lambda m, own: own.backward(loss_of(m)), "backward between first_step and second_step"),
    "a checkpoint between": (lambda m, own: own.state_dict(), "state_dict between"),
    "a copy between": (lambda m, own: copy.deepcopy(own), "a copy between"),
    "a pickle between": (lambda m, own: pickle.dumps(own), "a copy between"),
}


def test_the_wrong_order_is_refused(order=ORDER):
    for call, words in order.values():
        model, own, before = moved()
        with pytest.raises(UsageError, match=words) as caught:
            call(model, own)
        assert "\n" not in str(caught.value)
        own.put_back()
        own.zero_grad()
        assert same(state(model, own.inner), before)
    model = net()
    own = SAM(sgd(model))
    for call, words in ((own.second_step, "without first_step"), (own.first_step, "call loss.backward")):
        with pytest.raises(UsageError, match=words):
            call()
    for options in ({"every": 2}, {"scaler": torch.amp.GradScaler("cpu")}):
        with pytest.raises(UsageError, match="steps in one call"):
            SAM(sgd(model), **options).first_step()
    with pytest.raises(UsageError, match="steps in one call"):
        SAM(sgd(model), scaler=torch.amp.GradScaler("cpu")).backward(loss_of(model))


def test_nan_leaves_the_weights():
    """In the first gradient and in the second; training goes on afterwards."""
    for bad in (1, 2):
        model = net()
        own = SAM(sgd(model), rho=0.3)
        before = state(model)
        (loss_of(model)() * (float("nan") if bad == 1 else 1.0)).backward()
        if bad == 1:
            with pytest.raises(NonFiniteError):
                own.first_step()
        else:
            own.first_step()
            (loss_of(model)() * float("inf")).backward()
            with pytest.raises(NonFiniteError):
                own.second_step()
        own.zero_grad()
        assert same(state(model), before)
        in_two(own, model)
        assert own.steps == 1


# ---------------------------------------------------------------------------------------------------- breakages


def no_statistics(self):
    return []


def added_back(self):
    """The weights put back by subtraction, as other packages do."""
    weights, _, statistics = self._begun
    self._begun = None
    with torch.no_grad():
        for param, origin in zip(weights.params, weights._origin, strict=True):
            param.sub_(param - origin).mul_(1 + 3e-16)
    for buffer, value in statistics:
        buffer.copy_(value)


def grads_kept(closure, params, share):
    loss = closure()
    return loss.detach(), tuple(p.grad for p in params)


BROKEN = {
    "statistics move twice": (test_two_calls_are_one, two_steps.TwoSteps, "_statistics", no_statistics),
    "put back by subtraction": (test_two_calls_are_one, two_steps.TwoSteps, "put_back", added_back),
    "any order": (test_the_wrong_order_is_refused, two_steps.TwoSteps, "_refuse_between", lambda self, what: None),
    "NaN is not looked for": (test_nan_leaves_the_weights, two_steps.math, "isfinite", lambda x: True),
    "a step without a gradient": (
        test_backward_then_step_is_one_call,
        wrapper.Regularizer,
        "_assign",
        lambda *a: None,
    ),
    "gradients are not put back": (
        test_a_failing_backward_inside_leaves_gradients,
        training,
        "left_in_grad",
        grads_kept,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch):
    promise, owner, attribute, broken = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        promise()
