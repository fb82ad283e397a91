"""Promise: each regularizer steps along the gradient of what it minimises, at the cost it states. (10 s)"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag.regularizers import ASAM, NSO, SAM, LabelNoise
from hessdiag.regularizers import nso as nso_file
from hessdiag.regularizers.nso import exponential, linear
from tests.models import generator, labels, randn
from tests.training_runs import Net, close, flat, slope

# ---------------------------------------------------------------------------------------------------------- SAM


def test_sam_on_a_quadratic(kind=SAM):
    """L = w·A w / 2 with A indefinite: the step's gradient is A (w + rho A w / |A w|), by numpy."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(7, 7))
    a, w = a + a.T, rng.normal(size=7)
    param, matrix = nn.Parameter(torch.from_numpy(w.copy())), torch.from_numpy(a)
    kind(torch.optim.SGD([param], lr=0.1), rho=0.3).step(lambda: param @ matrix @ param / 2)
    g = a @ w
    close(param.grad, torch.from_numpy(a @ (w + 0.3 * g / np.linalg.norm(g))), 1e-13)


def test_sam_is_the_gradient_norm_penalty(kind=SAM):
    """Off the gradient of L + rho |∇L| by O(rho²): halving rho divides the error by 4."""
    errors = []
    for rho in (2e-2, 1e-2):
        net = Net()
        theta, loss = net.theta, net.loss
        gradient = torch.func.grad(loss)
        claimed = slope(lambda t: loss(t) + rho * gradient(t).norm(), theta)  # noqa: B023
        errors.append(float((net.stepped(kind(net.sgd(), rho=rho)) - claimed).norm() / claimed.norm()))
    assert errors[0] < 1e-3
    assert 3.7 < errors[0] / errors[1] < 4.3  # 4 up to the next order, itself of relative size rho


def test_the_move_is_the_steepest(kind=SAM, eta: float | None = None):
    """Among moves with |T⁻¹ e| = rho none raises the linearized loss more; T = 1, or |w| + eta."""
    net = Net()
    own = kind(net.sgd(), rho=0.3) if eta is None else kind(net.sgd(), rho=0.3, eta=eta)
    gradient = torch.autograd.grad(net.closure(), net.params)
    move, g = flat(own.ascent(tuple(net.params), gradient)), flat(gradient)
    metric = torch.ones_like(g) if eta is None else net.theta.abs() + eta
    assert float((move / metric).norm()) == pytest.approx(0.3, rel=1e-12)
    others = 0.3 * metric * F.normalize(torch.randn(2000, len(g), generator=generator(), dtype=g.dtype))
    near = move / metric / 0.3 + 0.05 * others
    others = torch.cat([others, 0.3 * metric * F.normalize(near)])
    assert float(move @ g) >= float((others @ g).max())
    expected = torch.func.grad(net.loss)(net.theta + move)
    close(net.stepped(own), expected, 1e-12)


def test_asam_ignores_rescaling(kind=ASAM):
    """A ReLU network with one layer multiplied by 8 and the next divided by 8 has the same loss at w + e."""
    found = []
    for factor in (1.0, 8.0):
        torch.manual_seed(0)
        first, second = nn.Linear(4, 6, bias=False).double(), nn.Linear(6, 3, bias=False).double()
        with torch.no_grad():
            first.weight.mul_(factor)
            second.weight.div_(factor)
        params, x, y = [first.weight, second.weight], randn(12, 4), labels(12, 3)

        def loss(first=first, second=second, x=x, y=y):
            return F.cross_entropy(second(torch.relu(first(x))), y)

        own = kind(torch.optim.SGD(params, lr=0.1), rho=0.5, **({"eta": 0.0} if issubclass(kind, ASAM) else {}))
        moves = own.ascent(tuple(params), torch.autograd.grad(loss(), params))
        with torch.no_grad():
            for param, move in zip(params, moves, strict=True):
                param.add_(move)
        found.append(float(loss().detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_rho_of_a_group_overrides(kind=SAM):
    net = Net()
    groups = [{"params": net.params[:2], "rho": 0.0}, {"params": net.params[2:]}]
    own = kind(torch.optim.SGD(groups, lr=0.1), rho=0.3)
    g = torch.func.grad(net.loss)(net.theta)
    move = 0.3 * g / g.norm()
    move[: sum(p.numel() for p in net.params[:2])] = 0
    expected = torch.func.grad(net.loss)(net.theta + move)
    close(net.stepped(own), expected, 1e-12)


# ---------------------------------------------------------------------------------------------------------- NSO

NSO_SETTINGS = {
    "k=1": {},
    "k=3": {"draws": 3},
    "uniform": {"noise": "uniform"},
    "laplace, mixed": {"noise": "laplace", "mix": 0.3},
    "one point": {"two_point": False, "draws": 2},
    "plain": {"mix": 1.0},
}


def nso_is_the_mean_over_its_noise(options=None, kind=NSO):
    """Given its draws u_j, the gradient of λ L + (1 − λ) mean of L(w ± u_j) by differences of values."""
    for settings in [options] if options is not None else NSO_SETTINGS.values():
        net = Net()
        own = kind(net.sgd(), sigma=0.3, **settings)
        theta, mix = net.theta, settings.get("mix", 0.0)
        sigmas = (0.3,) * len(net.params)
        noise = [
            flat(NSO.perturbation(own, tuple(net.params), sigmas, draw))
            for draw in range(settings.get("draws", 1))
        ]
        signs = (1, -1) if settings.get("two_point", True) else (1,)

        def claimed(t, net=net, noise=noise, signs=signs, mix=mix):
            around = torch.stack([net.loss(t + sign * u) for u in noise for sign in signs]).mean()
            return mix * net.loss(t) + (1 - mix) * around

        close(net.stepped(own), slope(claimed, theta), 1e-7)


def test_nso_penalises_the_trace(kind=NSO):
    """L = sum of w⁴/4: the mean gradient is w³ + 3σ² w, the gradient of L + σ²/2 tr ∇²L. 4 standard errors."""
    w = torch.linspace(0.5, 2, 400, dtype=torch.float64)
    param = nn.Parameter(w.clone())
    own = kind(torch.optim.SGD([param], lr=0.0), sigma=0.5, draws=40)
    own.step(lambda: (param**4).sum() / 4)
    excess = float(((param.grad - w**3) / (3 * 0.25 * w)).mean())
    # one pair gives w³ + 3w u²: relative spread √2, over 40 · 400 pairs
    assert abs(excess - 1) < 4 * math.sqrt(2 / (40 * 400))


def test_two_points_cancel_odd_noise(kind=NSO):
    """On a quadratic the pair's gradient is the plain one exactly, whatever the noise."""
    a, w = randn(6, 6), randn(6, seed=2)
    param, matrix = nn.Parameter(w.clone()), a + a.T
    kind(torch.optim.SGD([param], lr=0.1), sigma=0.7).step(lambda: param @ matrix @ param / 2)
    close(param.grad, matrix @ w, 1e-14)


MOMENTS = {"normal": 3.0, "uniform": 1.8, "laplace": 6.0}  # kurtosis; the variance is 1


def test_noise_has_its_law(file=nso_file):
    for law, kurtosis in MOMENTS.items():
        param = nn.Parameter(torch.zeros(400_000, dtype=torch.float64))
        own = NSO(torch.optim.SGD([param], lr=0.1), sigma=0.1, noise=law)
        (u,) = own.perturbation((param,), (0.1,), 0)
        assert abs(float(u.mean())) < 4 * 0.1 / math.sqrt(len(u))
        assert float(u.var()) == pytest.approx(0.01, rel=4 * math.sqrt((kurtosis - 1) / len(u)))
        assert float((u**4).mean() / u.var() ** 2) == pytest.approx(kurtosis, rel=0.06)  # laplace: sd of 1.3%
        assert torch.equal(u, own.perturbation((param,), (0.1,), 0)[0])
        (other,) = own.perturbation((param,), (0.1,), 1)
        own.steps = 1
        (later,) = own.perturbation((param,), (0.1,), 0)
        for fresh in (other, later):
            assert abs(float(u @ fresh) / 0.01) < 4 * math.sqrt(len(u))


def test_decay_is_of_the_unperturbed_weights(kind=NSO):
    """The inner optimizer's decay: w − lr (g + decay · w), with w where the step began, for SAM as well."""
    for make in (lambda opt: kind(opt, sigma=0.5), lambda opt: SAM(opt, rho=0.5)):
        net = Net()
        before = net.theta
        g = net.stepped(make(net.sgd(weight_decay=0.3)))
        close(net.theta, before - 0.1 * (g + 0.3 * before), 1e-14)


# -------------------------------------------------------------------------------------------------- label noise


def test_label_noise_has_the_hessian_as_covariance(kind=LabelNoise):
    """At zero mean squared error the gradient has mean 0 and covariance (2σ²/B) ∇²L. 1,500 draws."""
    x, w = randn(8, 3), randn(3, seed=5)
    param, y = nn.Parameter(w.clone()), x @ w
    own = kind(torch.optim.SGD([param], lr=0.0), sigma=0.5)
    rows = []
    for _ in range(1500):
        own.step(lambda: ((x @ param - own.targets(y)) ** 2).mean())
        rows.append(param.grad)
    g = torch.stack(rows)
    expected = (2 * 0.25 / 8) * (2 / 8) * (x.T @ x)
    spread = expected.diag().sqrt()
    assert bool((g.mean(0).abs() < 4 * spread / math.sqrt(1500)).all())
    error = (torch.cov(g.T) - expected) / torch.outer(spread, spread)
    assert float(error.abs().max()) < 4 * math.sqrt(2 / 1500)  # of a variance; covariances spread less


def test_label_noise_drifts_along_the_trace(kind=LabelNoise):
    """L = (uv − 1)²: u² − v² is kept by L's flow and decays at rate 8 lr λ under L + λ tr ∇²L, tr = 2(u² + v²)."""
    param = nn.Parameter(torch.tensor([2.0, 0.5], dtype=torch.float64))
    own = kind(torch.optim.SGD([param], lr=0.02), sigma=0.5)
    target = torch.ones((), dtype=torch.float64)
    steps = 1200
    assert own.penalty(1) == pytest.approx(0.02 * 0.5**2 / 2)
    for _ in range(steps):
        own.step(lambda: (param[0] * param[1] - own.targets(target)) ** 2)
    u, v = param.tolist()
    rate = -math.log((u * u - v * v) / 3.75) / steps
    assert rate == pytest.approx(8 * 0.02 * 0.0025, rel=0.15)  # spread √(2/1200) = 4%, and O(lr)


def test_labels_are_replaced_as_often_as_said(kind=LabelNoise):
    param = nn.Parameter(torch.ones(1))
    own = kind(torch.optim.SGD([param], lr=0.1), sigma=0.3)
    y = torch.randint(5, (40_000,), generator=generator())
    changed = float((own.targets(y, classes=5) != y).double().mean())
    assert abs(changed - 0.3 * 4 / 5) < 4 * math.sqrt(0.24 * 0.76 / 40_000)


# --------------------------------------------------------------------------------------------------------- cost

COSTS = {  # gradients per step, from the docstrings
    "SAM": (lambda opt: SAM(opt), 2),
    "ASAM": (lambda opt: ASAM(opt), 2),
    "NSO": (lambda opt: NSO(opt), 2),
    "NSO k=3": (lambda opt: NSO(opt, draws=3), 6),
    "NSO mixed": (lambda opt: NSO(opt, mix=0.5), 3),
    "NSO one point": (lambda opt: NSO(opt, draws=2, two_point=False), 2),
    "NSO plain": (lambda opt: NSO(opt, mix=1), 1),
    "NSO no noise": (lambda opt: NSO(opt, sigma=0), 1),
}


def test_costs_are_as_stated(counts=COSTS):
    for make, gradients in counts.values():
        net, calls, backwards = Net(), [], []

        class Marked(torch.autograd.Function):
            @staticmethod
            def forward(ctx, loss):
                return loss.clone()

            @staticmethod
            def backward(ctx, slope, backwards=backwards):
                backwards.append(1)
                return slope

        def closure(net=net, calls=calls, marked=Marked):
            calls.append(1)
            return marked.apply(net.closure())

        make(net.sgd()).step(closure)
        assert (len(calls), len(backwards)) == (gradients, gradients)


def test_schedules_are_followed(file=nso_file):
    assert [file.linear(0.1, 4)(step) for step in (0, 2, 4, 9)] == pytest.approx([0, 0.05, 0.1, 0.1])
    assert [file.exponential(0.1, 4)(step) for step in (0, 2, 4, 9)] == pytest.approx([1e-5, 1e-3, 0.1, 0.1])
    net, seen = Net(), []
    own = SAM(net.sgd(), rho=lambda step: seen.append(step) or 0.1 * step)
    theta = net.theta
    close(net.stepped(own), torch.func.grad(net.loss)(theta), 1e-14)  # rho is 0 at step 0
    assert net.stepped(own) is not None
    assert sorted(set(seen)) == [0, 1]


@pytest.mark.parametrize("options", NSO_SETTINGS.values(), ids=NSO_SETTINGS)
def test_nso_is_the_mean_over_its_noise(options):
    nso_is_the_mean_over_its_noise(options)


def test_asam_takes_the_steepest_move_in_its_own_metric():
    test_the_move_is_the_steepest(ASAM, eta=0.01)


# ---------------------------------------------------------------------------------------------------- breakages


class Unnormalised(SAM):
    def ascent(self, params, gradient):
        return tuple(0.3 * g for g in gradient)


class Descending(SAM):
    def ascent(self, params, gradient):
        return tuple(-move for move in super().ascent(params, gradient))


class PerTensor(SAM):
    def ascent(self, params, gradient):
        return tuple(g / g.norm() * rho for g, rho in zip(gradient, self.scheduled("rho", self.rho), strict=True))


class OwnRho(SAM):
    def scheduled(self, name, schedule):
        return tuple(self._valid(name, schedule) for _ in self._members())


class OnceStretched(ASAM):
    def ascent(self, params, gradient):
        stretched = super().ascent(params, gradient)
        return tuple(move / self.metric(w) for move, w in zip(stretched, params, strict=True))


class Variance(NSO):
    def perturbation(self, params, sigmas, draw):
        return super().perturbation(params, tuple(s**2 for s in sigmas), draw)


class OnePoint(NSO):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.two_point = False


class Undivided(NSO):
    def regularized(self, batch):
        return tuple(2 * g for g in super().regularized(batch))


class Decaying(NSO):
    def regularized(self, batch):
        moves = self.perturbation(batch.params, self.scheduled("sigma", self.sigma), 0)
        gradient = super().regularized(batch)
        for origin, move in zip(batch.weights._origin, moves, strict=True):
            origin.add_(move)
        return gradient


class Frozen(LabelNoise):
    def targets(self, y, classes=None):
        self.steps = 0
        return super().targets(y, classes)


class Quiet(LabelNoise):
    def targets(self, y, classes=None):
        self.sigma = 0.25
        return super().targets(y, classes)


class Doubled(SAM):
    def regularized(self, batch):
        batch.gradient()
        return super().regularized(batch)


class SameLaw:
    """A file of schedules that never start."""

    linear = staticmethod(lambda sigma, steps: lambda step: sigma)
    exponential = staticmethod(exponential)


BROKEN = {
    "SAM: rho g without the norm": (test_sam_on_a_quadratic, Unnormalised),
    "SAM: downhill": (test_sam_is_the_gradient_norm_penalty, Descending),
    "SAM: a norm per tensor": (test_the_move_is_the_steepest, PerTensor),
    "SAM: group's rho ignored": (test_rho_of_a_group_overrides, OwnRho),
    "ASAM: T instead of T²": (test_asam_ignores_rescaling, OnceStretched),
    "ASAM: plain SAM": (test_asam_ignores_rescaling, SAM),
    "NSO: σ² as standard deviation": (test_nso_penalises_the_trace, Variance),
    "NSO: σ² as standard deviation, given the noise": (nso_is_the_mean_over_its_noise, Variance),
    "NSO: one point": (test_two_points_cancel_odd_noise, OnePoint),
    "NSO: not divided by 2": (nso_is_the_mean_over_its_noise, Undivided),
    "NSO: weights left perturbed": (test_decay_is_of_the_unperturbed_weights, Decaying),
    "noise of another law": (test_noise_has_its_law, "laws"),
    "label noise drawn once": (test_label_noise_has_the_hessian_as_covariance, Frozen),
    "label noise too small": (test_label_noise_drifts_along_the_trace, Quiet),
    "labels replaced too rarely": (test_labels_are_replaced_as_often_as_said, Quiet),
    "a pass too many": (test_costs_are_as_stated, {"SAM": (lambda opt: Doubled(opt), 2)}),
    "a schedule that does not start": (test_schedules_are_followed, SameLaw),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    promise, broken = breakage
    if broken == "laws":
        monkeypatch.setitem(nso_file._LAWS, "laplace", nso_file._normal)
        broken = nso_file
    with pytest.raises(AssertionError):
        if promise is nso_is_the_mean_over_its_noise:
            promise(None, broken)
        else:
            promise(broken)


def test_schedules_are_public():
    assert linear(1.0, 2)(1) == 0.5
