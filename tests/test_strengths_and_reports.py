"""Promise: strengths follow schedules, `every` keeps the mean penalty, reports and costs are as stated. (6 s)"""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from hessdiag.errors import UsageError
from hessdiag.regularizers import (
    ASAM,
    GSAM,
    HSR,
    MSAM,
    NSO,
    SAM,
    USAM,
    FriendlySAM,
    LabelNoise,
    LookSAM,
    SpectralRadius,
    TracePenalty,
    schedules,
)
from tests.training_runs import Net, close, flat, slope

# ---------------------------------------------------------------------------------------------------- schedules

SCHEDULES = {
    "linear": (schedules.linear(0.2, 4, start=0.1), lambda t: 0.1 + 0.1 * min(t / 4, 1)),
    "linear, down": (schedules.linear(0.0, 4, start=0.1), lambda t: max(0.1 - 0.025 * t, 0)),
    "cosine": (schedules.cosine(0.2, 4, start=0.1), lambda t: 0.15 - 0.05 * math.cos(math.pi * min(t / 4, 1))),
    "exponential": (schedules.exponential(0.1, 4, start=1e-3), lambda t: 10 ** (-3 + 2 * min(t / 4, 1))),
    "by epoch": (schedules.by_epoch(schedules.linear(0.2, 2), 5), lambda t: 0.1 * min(t / 5, 2)),
}


def test_schedules_are_their_formulas(table=SCHEDULES):
    for schedule, formula in table.values():
        again = pickle.loads(pickle.dumps(schedule))
        for step in range(12):
            assert schedule(step) == pytest.approx(formula(step), abs=1e-15)
            assert again(step) == schedule(step)


def test_every_strength_takes_them(schedule=schedules.linear):
    """rho, sigma, mu and K move with the steps taken."""
    strengths = {
        "rho": lambda opt: SAM(opt, rho=schedule(0.3, 2)),
        "sigma": lambda opt: NSO(opt, sigma=schedule(0.3, 2)),
        "mu": lambda opt: TracePenalty(opt, mu=schedule(0.3, 2)),
        "K": lambda opt: SpectralRadius(opt, K=schedule(0.3, 2)),
    }
    for name, make in strengths.items():
        net = Net()
        own, seen = make(net.sgd()), []
        for _ in range(4):
            seen.append(own.scheduled(name, getattr(own, name))[0])
            own.step(net.closure)
        assert seen == pytest.approx([0.0, 0.15, 0.3, 0.3])


def test_rho_follows_the_learning_rate(tie=schedules.proportional_to_lr):
    """Zhuang et al. 2022: rho_min + (rho_max − rho_min)(lr − lr_min)/(lr_max − lr_min), in each group."""
    net = Net()
    groups = [{"params": net.params[:2]}, {"params": net.params[2:], "lr": 0.05}]
    inner = torch.optim.SGD(groups, lr=0.1)
    own = SAM(inner, rho=tie(0.4, 0.1, low=0.1, lr_min=0.02))
    held = CosineAnnealingLR(own, T_max=4, eta_min=0.01)
    for _ in range(5):
        lrs = [group["lr"] for group in inner.param_groups]
        rhos = [0.1 + 0.3 * min(max((lr - 0.02) / 0.08, 0), 1) for lr in lrs]
        assert own.scheduled("rho", own.rho) == pytest.approx([rhos[0], rhos[0], rhos[1], rhos[1]])
        gradient = torch.func.grad(net.loss)
        g = gradient(net.theta)
        pieces = [p.reshape(-1) * rho for p, rho in zip(net.split(g), [rhos[0]] * 2 + [rhos[1]] * 2, strict=True)]
        expected = gradient(net.theta + torch.cat(pieces) / g.norm())
        close(net.stepped(own), expected, 1e-12)
        held.step()


BAD = {
    "no steps": (lambda: schedules.linear(0.1, 0), "steps=0: allowed: positive numbers"),
    "from zero": (lambda: schedules.exponential(0.1, 4, start=0.0), "start=0.0"),
    "epochs": (lambda: schedules.by_epoch(schedules.linear(0.1, 4), 0), "steps_per_epoch=0"),
    "lr": (lambda: schedules.proportional_to_lr(0.1, lr_max=0.0), "lr_max=0.0: allowed: numbers above lr_min=0.0"),
    "negative": (lambda: SAM(Net().sgd(), rho=schedules.proportional_to_lr(-0.1, 0.1)), "rho=-0.1"),
    "every": (lambda: NSO(Net().sgd(), every=True), "every=True: allowed: whole numbers from 1 up"),
    "label noise": (lambda: LabelNoise(Net().sgd(), sigma=0.1, every=2), "LabelNoise costs one gradient"),
}


def test_bad_schedules_are_refused():
    for call, words in BAD.values():
        with pytest.raises(UsageError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- every


def spectrum(net: Net, theta: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigvalsh(torch.func.jacrev(torch.func.grad(net.loss))(theta))


def test_every_keeps_the_mean_penalty(kind=SpectralRadius):
    """At fixed weights: the mean of k steps is the gradient of L + mu rho, by differences of dense spectra."""
    net = Net()
    own = kind(torch.optim.SGD(net.params, lr=0.0), mu=0.3, iterations=50, tolerance=1e-10, every=3)
    steps = torch.stack([net.stepped(own) for _ in range(6)])
    claimed = slope(lambda t: net.loss(t) + 0.3 * spectrum(net, t).abs().max(), net.theta)
    close(steps.mean(0), claimed, 1e-6)
    plain = torch.func.grad(net.loss)(net.theta)
    for step in (1, 2, 4, 5):
        close(steps[step], plain, 1e-12)


def test_every_keeps_the_mean_of_nso(kind=NSO):
    """L = sum of w⁴/4: one step in three adds 3 · 3 σ² w to w³, exactly on the mean. 4 standard errors."""
    w = torch.linspace(0.5, 2, 400, dtype=torch.float64)
    param = nn.Parameter(w.clone())
    own, found = kind(torch.optim.SGD([param], lr=0.0), sigma=0.3, draws=40, every=3), []
    for _ in range(3):
        own.step(lambda: (param**4).sum() / 4)
        found.append(param.grad)
    excess = float(((torch.stack(found).mean(0) - w**3) / (3 * 0.09 * w)).mean())
    assert abs(excess - 1) < 4 * math.sqrt(2 / (40 * 400))


def test_a_radius_stays_with_every(kind=SAM):
    """SAM's rho is no strength: on its step the move is as long as ever."""
    net, one = Net(), Net()
    own, other = kind(net.sgd(), rho=0.3, every=2), kind(one.sgd(), rho=0.3)
    assert torch.equal(net.stepped(own), one.stepped(other))
    close(net.stepped(own), torch.func.grad(one.loss)(one.theta), 1e-12)


# ------------------------------------------------------------------------------------------------------- report


def test_sam_reports_the_rise(kind=SAM):
    """L(w + e) − L(w) by values, and its share of L(w + e); accumulation gives the mean."""
    for closures in (1, 2):
        net = Net()
        g, loss, theta = torch.func.grad(net.loss)(net.theta), net.loss, net.theta
        rise = float(loss(theta + 0.3 * g / g.norm()) - loss(theta))
        own = kind(net.sgd(), rho=0.3)
        own.step([net.closure] * closures)
        assert own.report["penalty"] == pytest.approx(rise, rel=1e-10)
        assert own.report["loss"] == pytest.approx(float(loss(theta)), rel=1e-12)
        assert own.report["share"] == pytest.approx(rise / float(loss(theta) + rise), rel=1e-10)


def test_nso_reports_its_pairs(kind=NSO):
    """u·Hu / 2 with the dense Hessian and the noise of the step; the trace is its mean over sigma²."""
    for options in ({}, {"draws": 3}, {"mix": 0.4}, {"every": 2}):
        net = Net()
        own = kind(net.sgd(), sigma=1e-3, **options)
        h, sigma = torch.func.jacrev(torch.func.grad(net.loss))(net.theta), 1e-3 * math.sqrt(own.every)
        draws = [flat(own.perturbation(tuple(net.params), (sigma,) * 4, j)) for j in range(own.draws)]
        forms = [float(u @ h @ u) / 2 for u in draws]
        mean = sum(forms) / len(forms)
        own.step(net.closure)
        assert own.report["penalty"] == pytest.approx((1 - own.mix) * mean / own.every, rel=1e-4)
        assert own.report["trace"] == pytest.approx(2 * mean / sigma**2, rel=1e-4)
    net = Net()
    one_point = kind(net.sgd(), sigma=0.1, two_point=False)
    one_point.step(net.closure)
    assert set(one_point.report) == {"steps", "loss"}


def test_nso_reports_the_trace_on_average(kind=NSO):
    """400 pairs against the dense trace, within 4 standard errors of their mean."""
    net = Net()
    own, traces = kind(torch.optim.SGD(net.params, lr=0.0), sigma=1e-3), []
    for _ in range(400):
        own.step(net.closure)
        traces.append(own.report["trace"])
    found = torch.tensor(traces)
    expected = float(torch.func.jacrev(torch.func.grad(net.loss))(net.theta).trace())
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / 20


def test_curvature_penalties_report_what_they_measure():
    for third in ("exact", "difference"):
        net = Net()
        own = TracePenalty(net.sgd(), mu=0.3, probes=2, third=third)
        h = torch.func.jacrev(torch.func.grad(net.loss))(net.theta)
        probes = [flat(own.signs(tuple(net.params), draw)) for draw in range(2)]
        expected = sum(float(v @ h @ v) for v in probes) / 2
        own.step(net.closure)
        assert own.report["trace"] == pytest.approx(expected, rel=1e-5 if third == "exact" else 1e-3)
        assert own.report["penalty"] == pytest.approx(0.3 * own.report["trace"])
    net = Net()
    eigenvalues = spectrum(net, net.theta)
    sharpest = float(eigenvalues[eigenvalues.abs().argmax()])
    own = SpectralRadius(net.sgd(), mu=0.3, K=0.1, iterations=50, tolerance=1e-10)
    own.step(net.closure)
    assert own.report["lambda"] == pytest.approx(sharpest, rel=1e-8)
    assert own.report["penalty"] == pytest.approx(0.3 * (abs(sharpest) - 0.1), rel=1e-8)
    net = Net()
    m, s = float(eigenvalues.mean()), float(eigenvalues.std(correction=0))
    own = HSR(net.sgd(), net.model, mu=0.3, traces="closed_form")
    own.step(net.closure)
    assert own.report["bound"] == pytest.approx(m + s * math.sqrt(len(eigenvalues) - 1), rel=1e-8)
    assert own.report["penalty"] == pytest.approx(0.3 * own.report["bound"])
    noisy = LabelNoise(net.sgd(), sigma=0.25)
    noisy.step(lambda: F.cross_entropy(net.model(net.x), noisy.targets(net.y, classes=3)))
    assert noisy.report["sigma"] == 0.25


ALL = {
    "SAM": (lambda opt, k: SAM(opt, every=k), 2),
    "ASAM": (lambda opt, k: ASAM(opt, every=k), 2),
    "USAM": (lambda opt, k: USAM(opt, every=k), 2),
    "MSAM": (lambda opt, k: MSAM(opt, every=k), 2),
    "GSAM": (lambda opt, k: GSAM(opt, every=k), 2),
    "LookSAM": (lambda opt, k: LookSAM(opt, every=k), 2),
    "FriendlySAM": (lambda opt, k: FriendlySAM(opt, every=k), 2),
    "NSO": (lambda opt, k: NSO(opt, sigma=0.1, every=k), 2),
    "NSO, 2 pairs": (lambda opt, k: NSO(opt, sigma=0.1, draws=2, every=k), 4),
    "TracePenalty, differences": (lambda opt, k: TracePenalty(opt, third="difference", every=k), 3),
    "TracePenalty": (lambda opt, k: TracePenalty(opt, every=k), 1 + 2),
    "SpectralRadius": (lambda opt, k: SpectralRadius(opt, iterations=3, every=k), 1 + 3 + 2),
    "HSR": (lambda opt, k: HSR(opt, probes=1, every=k), 1 + 1 + 2),
}


def test_reports_are_numbers_to_log(makers=ALL):
    for make, _ in makers.values():
        net = Net()
        own = make(net.sgd(), 1)
        own.step(net.closure)
        assert {"steps", "loss", "penalty", "share"} <= set(own.report)
        assert all(type(value) is float and math.isfinite(value) for value in own.report.values())
        assert json.loads(json.dumps(own.report)) == own.report
        assert own.report["steps"] == 1.0


def test_costs_are_as_stated(makers=ALL, steps=8):
    """Backward passes through torch.autograd.grad, the engine's only way: c a step, c/k + 1 − 1/k with every=k.

    A product is one backward pass and a third derivative two; what they cost in gradients is measured by
    ``python -m benchmarks steps``.
    """
    for name, (make, stated) in makers.items():
        for every in (1, 4):
            net, count = Net(), Counter()
            own = make(net.sgd(), every)
            with pytest.MonkeyPatch.context() as patch:
                grad = torch.autograd.grad
                patch.setattr(
                    torch.autograd, "grad", lambda *a, c=count, g=grad, **o: c.update(["grad"]) or g(*a, **o)
                )
                for _ in range(steps):
                    own.step(net.closure)
            expected = steps * (stated / every + 1 - 1 / every)
            assert count["grad"] == pytest.approx(expected, rel=0.15), (name, every)


# ---------------------------------------------------------------------------------------------------- breakages


def one_late(end, steps, start=0.0):
    return lambda step: schedules.Ramp("linear", start, end, steps)(max(step - 1, 0))


def whole_lr(high, lr_max, *, low=0.0, lr_min=0.0):
    return schedules.ByLearningRate(high, 0.0, lr_max, 0.0)


class Once(SpectralRadius):
    """The penalty once in k steps, at its own strength."""

    def penalised(self, gradient, pieces, factor=1.0):
        return super().penalised(gradient, pieces, factor / self.every)


class OnceNoisy(NSO):
    def regularized(self, batch):
        k, self.every = self.every, 1
        try:
            return super().regularized(batch)
        finally:
            self.every = k


class Longer(SAM):
    def ascent(self, params, gradient):
        return tuple(self.every * e for e in super().ascent(params, gradient))


class Doubled(NSO):
    def _note(self, forms, sigmas):
        super()._note([2 * form for form in forms], sigmas)


class Undone(SAM):
    """Reports the rise of the last step that it knew."""

    def regularized(self, batch):
        out = super().regularized(batch)
        self._measured = {"penalty": 0.0}
        return out


def always(every):
    return {"SAM": (lambda opt, k: SAM(opt, every=1 if every else k), 2 if every else 3)}


BROKEN = {
    "a schedule one step late": lambda: test_every_strength_takes_them(one_late),
    "a formula that is another": lambda: test_schedules_are_their_formulas(
        {"x": (schedules.cosine(0.2, 4, start=0.1), lambda t: 0.1 + 0.1 * min(t / 4, 1))}
    ),
    "no lower end of the learning rate": lambda: test_rho_follows_the_learning_rate(whole_lr),
    "every without its factor": lambda: test_every_keeps_the_mean_penalty(Once),
    "every without its variance": lambda: test_every_keeps_the_mean_of_nso(OnceNoisy),
    "a longer move": lambda: test_a_radius_stays_with_every(Longer),
    "twice the trace": lambda: test_nso_reports_its_pairs(Doubled),
    "twice the trace, on average": lambda: test_nso_reports_the_trace_on_average(Doubled),
    "no rise": lambda: test_sam_reports_the_rise(Undone),
    "every is ignored": lambda: test_costs_are_as_stated(always(every=True)),
    "a cost that is another": lambda: test_costs_are_as_stated(always(every=False)),
    "tensors in a report": lambda: test_reports_are_numbers_to_log(
        {"x": (lambda opt, k: type("X", (SAM,), {"report": {"loss": torch.ones(())}})(opt), 2)}
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    with pytest.raises(AssertionError):
        breakage()
