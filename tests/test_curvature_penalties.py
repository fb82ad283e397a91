"""Promise: curvature penalties step along the gradient of the dense quantity they name, at stated cost. (27 s)"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.errors import MeasurementError, NonFiniteError, UsageError
from hessdiag.regularizers import HSR, SpectralRadius, TracePenalty, bound_by_probes, hsr
from tests.models import labels, randn
from tests.training_runs import close, flat

STEP = 1e-5  # of central differences of dense Hessians in float64: error about 1e-9 relative
SHARP = {"iterations": 100, "tolerance": 1e-10}  # Lanczos to the end, so that v is the eigenvector to rounding


class Net:
    """A small float64 network, a batch of it, and the dense Hessian of its loss as a function of a flat θ."""

    def __init__(self, *middle: nn.Module, sign: float = 1.0, rows: int = 9, bias: bool = True) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(2, 4, bias=bias), *middle, nn.Tanh(), nn.Linear(4, 3, bias=bias)]
        self.model = nn.Sequential(*layers).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(2)
        self.x, self.y, self.sign = randn(rows, 2), labels(rows, 3), sign
        self.params = [p for p in self.model.parameters() if p.requires_grad]

    def closure(self) -> Tensor:
        return self.sign * F.cross_entropy(self.model(self.x), self.y)

    @property
    def theta(self) -> Tensor:
        return flat(self.params)

    def loss(self, theta: Tensor) -> Tensor:
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        tensors = {n: t.view_as(p) for n, t, p in zip(names, self.cut(theta), self.params, strict=True)}
        return self.sign * F.cross_entropy(torch.func.functional_call(self.model, tensors, (self.x,)), self.y)

    def cut(self, theta: Tensor) -> tuple[Tensor, ...]:
        return torch.split(theta, [p.numel() for p in self.params])

    def hessian(self, theta: Tensor) -> Tensor:
        """Rows by reverse over reverse, which is right for every layer here."""
        theta = theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(theta), theta, create_graph=True)
        (rows,) = torch.autograd.grad(g, theta, torch.eye(len(g), dtype=g.dtype), is_grads_batched=True)
        return rows

    def slope(self, function) -> Tensor:
        """The gradient of a function of the dense Hessian, by central differences."""
        theta = self.theta
        values = [
            function(self.hessian(theta + e)) - function(self.hessian(theta - e))
            for e in STEP * torch.eye(len(theta), dtype=theta.dtype)
        ]
        return torch.stack(values) / (2 * STEP)

    def sgd(self, **options: float) -> torch.optim.SGD:
        return torch.optim.SGD(self.params, lr=0.1, **options)

    def gradient(self) -> Tensor:
        return torch.func.grad(self.loss)(self.theta)

    def penalty(self, regularizer) -> Tensor:
        """What one step adds to the gradient."""
        plain = self.gradient()
        regularizer.step(self.closure)
        return flat([p.grad for p in self.params]) - plain


def radius(H: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(H).abs().max()


def upper(H: Tensor) -> Tensor:
    m, s = spread_of(H)
    return m + s * math.sqrt(len(H) - 1)


def spread(H: Tensor) -> Tensor:
    return spread_of(H)[1] * math.sqrt(2 * len(H))


def spread_of(H: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues = torch.linalg.eigvalsh(H)
    return eigenvalues.mean(), eigenvalues.std(correction=0)


# ----------------------------------------------------------------------------------------------- spectral radius


def test_radius_goes_down_whatever_its_sign(kind=SpectralRadius):
    """Against differences of max |eigvalsh|; the negated loss has a negative dominant eigenvalue."""
    for sign in (1.0, -1.0):
        for third, tolerance in (("exact", 1e-7), ("difference", 1e-5)):
            net = Net(sign=sign)
            own = kind(net.sgd(), mu=0.3, third=third, **SHARP)
            expected, values = 0.3 * net.slope(radius), torch.linalg.eigvalsh(net.hessian(net.theta))
            dominant = float(values[values.abs().argmax()])
            assert dominant * sign > 0
            close(net.penalty(own), expected, tolerance)
            assert own.eigenvalue == pytest.approx(dominant, rel=1e-10)
            assert own.converged


def test_below_K_is_free(kind=SpectralRadius):
    net = Net()
    rho = float(radius(net.hessian(net.theta)))
    assert float(net.penalty(kind(net.sgd(), mu=1.0, K=1.001 * rho, **SHARP)).norm()) == 0
    net = Net()
    close(net.penalty(kind(net.sgd(), mu=1.0, K=0.999 * rho, **SHARP)), Net().slope(radius), 1e-7)


def test_an_overtaking_eigenvalue_is_found(kind=SpectralRadius):
    """Σ aᵢwᵢ²/2 + w³ terms: v sits on the old largest eigenvector exactly; the other direction is now sharper."""
    a = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1], dtype=torch.float64)
    param = nn.Parameter(torch.ones(5, dtype=torch.float64))
    own = kind(torch.optim.SGD([param], lr=0.0), mu=0.1, iterations=3)
    own.vector = torch.eye(5, dtype=torch.float64)[0]
    a[1] = 1.5
    for _ in range(3):
        own.step(lambda: (a * param**2).sum() / 2)
    assert own.eigenvalue == pytest.approx(1.5, rel=1e-3)


def test_unconverged_vectors_do_as_said(kind=SpectralRadius):
    """After 3 products: "use" goes down v·Hv at constant v, "skip" takes the plain step; both keep v."""
    net = Net()
    own = kind(net.sgd(), mu=0.3, iterations=3, tolerance=1e-8)
    found = net.penalty(own)
    v = own.vector
    assert not own.converged and own.residual > 1e-3
    assert abs(own.eigenvalue) <= float(radius(Net().hessian(Net().theta)))
    close(found, 0.3 * Net().slope(lambda H: v @ H @ v) * math.copysign(1, own.eigenvalue), 1e-7)
    H = Net().hessian(Net().theta)
    assert own.residual == pytest.approx(
        float((H @ v - own.eigenvalue * v).norm()) / abs(own.eigenvalue), rel=1e-6
    )
    net = Net()
    own = kind(net.sgd(), mu=0.3, iterations=3, tolerance=1e-8, unconverged="skip")
    assert float(net.penalty(own).norm()) == 0
    assert own.vector is not None


def test_warm_starts_converge(kind=SpectralRadius):
    """Constant weights, 3 products a step: the vector converges over the steps all the same."""
    net = Net()
    own = kind(torch.optim.SGD(net.params, lr=0.0), mu=0.1, iterations=3)
    residuals = [own.residual for _ in range(8) if own.step(net.closure) is not None]
    assert residuals[0] > 0.05
    assert own.converged and residuals[-1] < 0.01


def test_training_lowers_the_radius(kind=SpectralRadius):
    """Minimising with a penalty ends flatter than without, on the same data: rho falls by a tenth or more."""
    found = {}
    for name, make in (
        ("plain", lambda opt, net: kind(opt, mu=0.0)),
        ("radius", lambda opt, net: kind(opt, mu=0.3)),
        ("trace", lambda opt, net: TracePenalty(opt, mu=0.3)),
        ("hsr", lambda opt, net: HSR(opt, net.model, mu=0.3)),
        ("hsr by probes", lambda opt, net: HSR(opt, mu=0.3, probes=2)),
    ):
        net = Net(rows=30)
        own = make(torch.optim.SGD(net.params, lr=0.3), net)
        for _ in range(50):
            own.step(net.closure)
        found[name] = float(radius(net.hessian(net.theta)))
    assert all(found[name] < 0.9 * found["plain"] for name in found if name != "plain"), found


# --------------------------------------------------------------------------------------------------------- trace


def test_the_trace_of_its_probes_goes_down(kind=TracePenalty):
    """Given its signs v, against differences of mean v·Hv of the dense Hessian."""
    for third, tolerance in (("exact", 1e-7), ("difference", 1e-4)):
        net = Net()
        own = kind(net.sgd(), mu=0.3, probes=3, third=third)
        signs = [flat(TracePenalty.signs(own, tuple(net.params), draw)) for draw in range(3)]
        expected = 0.3 * net.slope(lambda H, v=signs: sum(u @ H @ u for u in v) / 3)
        close(net.penalty(own), expected, tolerance)


def test_the_trace_goes_down(kind=TracePenalty):
    """L = Σ w⁴/4, H diagonal: signs give tr H exactly, gradient 6w. And on a network the mean of 600 probes."""
    w = torch.linspace(-1, 2, 7, dtype=torch.float64)
    param = nn.Parameter(w.clone())
    kind(torch.optim.SGD([param], lr=0.1), mu=0.5).step(lambda: (param**4).sum() / 4)
    close(param.grad, w**3 + 0.5 * 6 * w, 1e-13)
    net = Net()
    expected = net.slope(torch.trace)
    rows = torch.stack(
        [net.penalty(kind(net.sgd(), mu=1.0, seed=s, probes=60)) for s in range(10) for net in [Net()]]
    )
    error = (rows.mean(0) - expected).norm() / expected.norm()
    assert float(error) < 4 * float(rows.var(0).sum().sqrt() / math.sqrt(10) / expected.norm())
    assert float(error) < 0.15


# ----------------------------------------------------------------------------------------------------------- HSR


class Complete(HSR):
    """Probes √P eᵢ, which give both traces exactly."""

    def signs(self, params, draw):
        sizes = [p.numel() for p in params]
        unit = math.sqrt(sum(sizes)) * torch.eye(sum(sizes), dtype=params[0].dtype)[draw]
        return tuple(piece.view_as(p) for piece, p in zip(torch.split(unit, sizes), params, strict=True))


def test_the_bound_goes_down(kind=HSR, complete=Complete):
    """Closed form and complete probes, against differences of m + s√(P−1) and s√(2P) of dense eigenvalues."""
    for bound, dense in (("upper", upper), ("spread", spread)):
        for bias in (True, False):
            net = Net(bias=bias)
            expected, value = 0.3 * net.slope(dense), float(dense(net.hessian(net.theta)))
            own = kind(net.sgd(), net.model, mu=0.3, bound=bound, traces="closed_form")
            close(net.penalty(own), expected, 1e-7)
            assert own.value == pytest.approx(value, rel=1e-10)
        for third, tolerance in (("exact", 1e-7), ("difference", 1e-5)):
            net = Net(bias=False)
            probed = complete(net.sgd(), mu=0.3, bound=bound, probes=len(net.theta), third=third)
            close(net.penalty(probed), expected, tolerance)
            assert probed.value == pytest.approx(value, rel=1e-10)


def test_deeper_networks_too(kind=Complete):
    """Two hidden layers, and LayerNorm, whose exact third derivatives torch 2.13 gets wrong."""
    for middle in ([nn.Sigmoid(), nn.Linear(4, 4)], [nn.LayerNorm(4)]):
        net = Net(*middle)
        own = kind(net.sgd(), net.model, mu=0.3, probes=len(net.theta))
        expected, value = 0.3 * net.slope(upper), float(upper(net.hessian(net.theta)))
        close(net.penalty(own), expected, 1e-4)
        assert own.reason and own.value == pytest.approx(value, rel=1e-9)


def test_rules_do_as_said(kind=HSR):
    """penalty, direction and alternating from one gradient of the bound, by differences."""
    expected = Net().slope(upper)
    net = Net()
    close(
        net.penalty(kind(net.sgd(), net.model, mu=0.2, rule="direction")), 0.2 * expected / expected.norm(), 1e-7
    )
    net = Net()
    shifted = net.theta - 0.2 * expected / expected.norm()
    own = kind(net.sgd(), net.model, mu=0.2, rule="alternating")
    own.step(net.closure)
    close(net.theta, shifted - 0.1 * torch.func.grad(net.loss)(shifted), 1e-8)


def test_the_closed_form_knows_its_limits(kind=HSR):
    """Where loss or model are not what it is for, the reason is named and probes are taken."""
    net = Net()
    cases = {
        "mean cross-entropy": (
            net.model,
            lambda: F.cross_entropy(net.model(net.x), net.y) + net.params[0].square().sum(),
        ),
        "cross-entropy of": (net.model, lambda: F.cross_entropy(net.model(net.x), net.y, reduction="sum")),
        "is not the mean": (net.model, lambda: net.model(net.x).square().mean()),
        "linear layers": ((deep := Net(nn.Tanh(), nn.Linear(4, 4))).model, deep.closure),
        "does not call": (nn.Sequential(nn.Linear(2, 3)), net.closure),
        "dropout": ((drop := Net(nn.Dropout(0.5))).model, drop.closure),
        "outside of": (net.model, lambda: F.cross_entropy(net.model(net.x) * 1.0, net.y)),
    }
    for words, (model, closure) in cases.items():
        params = list(model.parameters()) if words not in ("does not call", "outside of") else list(net.params)
        extra = [nn.Parameter(torch.ones(2, dtype=torch.float64))] if words == "outside of" else []
        own = kind(torch.optim.SGD(params + extra, lr=0.0), model, mu=0.1)
        own.step(closure)
        assert words in own.reason, (words, own.reason)
        assert own.value > 0
        with pytest.raises(UsageError, match="does not apply"):
            kind(torch.optim.SGD(params + extra, lr=0.0), model, mu=0.1, traces="closed_form").step(closure)


def test_the_closed_form_reads_the_batch(kind=HSR):
    """Soft labels, frozen tensors, equal micro-batches, float32: the same bound as the dense Hessian's."""
    net = Net()
    net.y = F.one_hot(net.y, 3).double() * 0.8 + 0.2 / 3
    expected = 0.3 * net.slope(upper)
    close(net.penalty(kind(net.sgd(), net.model, mu=0.3, traces="closed_form")), expected, 1e-7)
    net = Net()
    net.model[0].weight.requires_grad_(False)
    net.params = [p for p in net.params if p.requires_grad]
    expected = 0.3 * net.slope(upper)
    close(net.penalty(kind(net.sgd(), net.model, mu=0.3, traces="closed_form")), expected, 1e-7)
    net, whole = Net(), Net()
    parts = [lambda s=slice(i, i + 3): F.cross_entropy(net.model(net.x[s]), net.y[s]) for i in (0, 3, 6)]
    kind(net.sgd(), net.model, mu=0.3, traces="closed_form").step(parts)
    close(flat([p.grad for p in net.params]), whole.gradient() + 0.3 * whole.slope(upper), 1e-7)
    single = Net()
    single.model.float()
    single.x = single.x.float()
    own = kind(single.sgd(), single.model, mu=0.3, traces="closed_form")
    own.step(single.closure)
    close(flat([p.grad for p in single.params]).double(), whole.gradient() + 0.3 * whole.slope(upper), 1e-5)


# ----------------------------------------------------------------------------------------------------------- all


def test_the_cheaper_way_is_chosen(worth=None):
    """By multiply-adds, the same on every machine: 600 rows of a wide layer are for probes, 40 for the formula."""
    with pytest.MonkeyPatch.context() as patch:
        if worth is not None:
            patch.setattr(hsr, "WORTH", worth)
        for rows, reason in ((40, ""), (600, "would cost about")):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3)).double()
            x, y = randn(rows, 8), labels(rows, 3)
            own = HSR(torch.optim.SGD(model.parameters(), lr=0.0), model, mu=0.1)
            own.step(lambda m=model, x=x, y=y: F.cross_entropy(m(x), y))
            assert own.reason == "" if not reason else reason in own.reason, own.reason
            assert own.value > 0


def test_wrong_third_derivatives_are_not_taken(kinds=(SpectralRadius, TracePenalty)):
    """LayerNorm: "auto" agrees with differences of the dense Hessian, "exact" is refused."""
    for kind in kinds:
        net = Net(nn.LayerNorm(4))
        own = kind(net.sgd(), mu=0.3, **(SHARP if issubclass(kind, SpectralRadius) else {"probes": 1}))
        if issubclass(kind, SpectralRadius):
            expected = 0.3 * net.slope(radius)
        else:
            v = flat(own.signs(tuple(net.params), 0))
            expected = 0.3 * net.slope(lambda H, v=v: v @ H @ v)
        close(net.penalty(own), expected, 1e-4)
        net = Net(nn.LayerNorm(4))
        before = net.theta
        with pytest.raises(MeasurementError, match="are wrong"):
            kind(net.sgd(), mu=0.3, third="exact").step(net.closure)
        assert torch.equal(before, net.theta)


COSTS = {  # (forward passes, backward passes), from the docstrings; a third derivative is two backward passes
    "mu = 0": (lambda net: SpectralRadius(net.sgd(), mu=0.0), (1, 1)),
    "radius": (lambda net: SpectralRadius(net.sgd(), iterations=3), (1, 1 + 3 + 2)),
    "radius, free": (lambda net: SpectralRadius(net.sgd(), K=1e9, iterations=3), (1, 1 + 3)),
    "radius by differences": (
        lambda net: SpectralRadius(net.sgd(), iterations=3, third="difference"),
        (3, 1 + 3 + 2),
    ),
    "trace": (lambda net: TracePenalty(net.sgd(), probes=2), (1, 1 + 2 * 2)),
    "trace by differences": (lambda net: TracePenalty(net.sgd(), probes=2, third="difference"), (5, 5)),
    "hsr": (lambda net: HSR(net.sgd(), net.model), (1, 1)),
    "hsr alternating": (lambda net: HSR(net.sgd(), net.model, rule="alternating"), (2, 2)),
    "hsr by probes": (lambda net: HSR(net.sgd(), probes=2), (1, 1 + 2 * (1 + 2))),
    "hsr by differences": (lambda net: HSR(net.sgd(), probes=2, third="difference"), (5, 1 + 2 * (1 + 4))),
}


def test_costs_are_as_stated(counts=COSTS):
    for name, (make, expected) in counts.items():
        net, count = Net(), Counter()
        own = make(net)
        own.step(net.closure)  # the first proves what the network is
        grad = torch.autograd.grad

        def counted(*args, count=count, grad=grad, **options):
            count["backward"] += 1
            return grad(*args, **options)

        def closure(net=net, count=count):
            count["forward"] += 1
            return net.closure()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd, "grad", counted)
            own.step(closure)
        assert (count["forward"], count["backward"]) == expected, (name, count)


def test_settings_are_followed(kinds=(SpectralRadius, TracePenalty, HSR)):
    """mu as a schedule, and per parameter group."""
    for kind in kinds:
        model = (lambda net: {"model": net.model}) if issubclass(kind, HSR) else (lambda net: {})
        net = Net()
        own = kind(torch.optim.SGD(net.params, lr=0.0), mu=lambda step: 0.1 * step, **model(net))
        assert float(net.penalty(own).norm()) == 0
        once, twice = net.penalty(own), net.penalty(own)
        if kind is HSR:  # deterministic
            close(twice, 2 * once, 1e-9)
        net = Net()
        groups = [{"params": net.params[:2], "mu": 0.0}, {"params": net.params[2:]}]
        found = net.penalty(kind(torch.optim.SGD(groups, lr=0.1), mu=0.3, **model(net)))
        size = sum(p.numel() for p in net.params[:2])
        assert float(found[:size].norm()) == 0 < float(found[size:].norm())


def test_limits_are_right(kinds=(SpectralRadius, TracePenalty, HSR)):
    """A constant Hessian, H = mI, H = 0, one parameter, one sample: the right limit."""
    a = randn(6, 6)
    matrices = {
        "constant": a + a.T,
        "mI": 2 * torch.eye(6).double(),
        "0": 0 * a,
        "1": torch.full((1, 1), 3.0).double(),
    }
    for kind in kinds:
        for rule in ("penalty", "direction", "alternating") if issubclass(kind, HSR) else (None,):
            for A in matrices.values():
                w = randn(len(A), seed=3)
                param = nn.Parameter(w.clone())
                own = kind(torch.optim.SGD([param], lr=0.1), mu=0.5, **({"rule": rule} if rule else {}))
                own.step(lambda A=A, param=param: param @ A @ param / 2 + param.sum())
                g = A @ w + 1
                close(param.grad, g, 1e-12)
                close(param.detach(), w - 0.1 * g, 1e-12)
    net = Net(rows=1)
    close(net.penalty(kinds[0](net.sgd(), mu=1.0, **SHARP)), Net(rows=1).slope(radius), 1e-6)
    net = Net(rows=1)
    close(net.penalty(HSR(net.sgd(), net.model, mu=1.0, traces="closed_form")), Net(rows=1).slope(upper), 1e-6)


def test_nan_leaves_the_weights(kinds=(SpectralRadius, TracePenalty, HSR)):
    """In the first pass and in a later one; the alternating rule too, which moves before it steps."""
    for kind in kinds:
        for first in (1, 2):
            options = {"rule": "alternating"} if issubclass(kind, HSR) else {"third": "difference"}
            net, calls = Net(), []
            own = kind(net.sgd(momentum=0.9), mu=0.1, **options)
            own.step(net.closure)
            before, state = net.theta, own.state_dict()["state"]

            def closure(net=net, calls=calls, first=first):
                calls.append(1)
                return net.closure() * (math.nan if len(calls) >= first else 1)

            with pytest.raises(NonFiniteError):
                own.step(closure)
            assert torch.equal(before, net.theta) and own.steps == 1
            assert all(
                torch.equal(state[k]["momentum_buffer"], v["momentum_buffer"])
                for k, v in own.inner.state_dict()["state"].items()
            )


def test_runs_resume(kinds=(SpectralRadius, TracePenalty, HSR)):
    """Five steps are three, saved and loaded into fresh objects, and two: bit for bit."""
    for kind in kinds:
        straight = Net()
        own = kind(straight.sgd(momentum=0.9), mu=0.1)
        for _ in range(5):
            own.step(straight.closure)
        net = Net()
        own = kind(net.sgd(momentum=0.9), mu=0.1)
        for _ in range(3):
            own.step(net.closure)
        again = Net()
        again.model.load_state_dict(net.model.state_dict())
        other = kind(again.sgd(momentum=0.9), mu=0.1, seed=7)
        other.load_state_dict(own.state_dict())
        for _ in range(2):
            other.step(again.closure)
        assert torch.equal(straight.theta, again.theta), kind.__name__


REFUSED = {
    "mu negative": (lambda o: SpectralRadius(o, mu=-0.1), "mu=-0.1"),
    "mu NaN": (lambda o: TracePenalty(o, mu=math.nan), "mu=nan"),
    "mu infinite": (lambda o: HSR(o, mu=math.inf), "mu=inf"),
    "mu of a schedule": (lambda o: TracePenalty(o, mu=lambda step: -1.0), "mu=-1.0"),
    "K negative": (lambda o: SpectralRadius(o, K=-1.0), "K=-1.0"),
    "K NaN": (lambda o: SpectralRadius(o, K=math.nan), "K=nan"),
    "no iteration": (lambda o: SpectralRadius(o, iterations=0), "iterations=0"),
    "tolerance": (lambda o: SpectralRadius(o, tolerance=0.0), "tolerance=0.0"),
    "unconverged": (lambda o: SpectralRadius(o, unconverged="reset"), "use, skip"),
    "third": (lambda o: TracePenalty(o, third="fd"), "auto, exact, difference"),
    "no probe": (lambda o: TracePenalty(o, probes=0), "probes=0"),
    "half a probe": (lambda o: HSR(o, probes=0.5), "probes=0.5"),
    "rule": (lambda o: HSR(o, rule="sgd"), "penalty, direction, alternating"),
    "bound": (lambda o: HSR(o, bound="lower"), "upper, spread"),
    "model": (lambda o: HSR(o, lambda x: x), "torch.nn.Module"),
    "no model": (lambda o: HSR(o, traces="closed_form").step(Net().closure), "no model was given"),
    "no closure": (lambda o: TracePenalty(o).step(), "closure"),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_refusals(refused):
    make, words = refused
    with pytest.raises(UsageError, match=words) as caught:
        make(Net().sgd())
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- breakages


class Signless(SpectralRadius):
    """The authors' code: the sign of λ is dropped."""

    def penalised(self, gradient, pieces, factor=1.0):
        return super().penalised(gradient, pieces, abs(factor))


class Largest(SpectralRadius):
    """The largest eigenvalue for the one of largest modulus."""

    def dominant(self, curved):
        H = torch.stack([flat(curved.product(piece)) for piece in self.rows(curved)])
        values, vectors = torch.linalg.eigh(H)
        return vectors[:, -1], float(values[-1]), 0.0

    def rows(self, curved):
        net = Net()
        return [
            [p.view_as(q) for p, q in zip(net.cut(e), net.params, strict=True)] for e in torch.eye(27).double()
        ]


class AlwaysOn(SpectralRadius):
    def scheduled(self, name, schedule):
        return super().scheduled(name, schedule if name != "K" else 0.0)


class Cold(SpectralRadius):
    def dominant(self, curved):
        self.vector = None
        return super().dominant(curved)


class Long(SpectralRadius):
    """v of length 2."""

    def dominant(self, curved):
        v, eigenvalue, residual = super().dominant(curved)
        return 2 * v, eigenvalue, residual


class Optimist(SpectralRadius):
    """No residual is looked at."""

    def dominant(self, curved):
        v, eigenvalue, _ = super().dominant(curved)
        return v, eigenvalue, 0.0


class Forgetful(SpectralRadius):
    def own_state(self):
        return super().own_state() | {"vector": None}


class Exactly(TracePenalty):
    """Exact third derivatives through every layer."""

    def form_gradient(self, batch, curved, v, y=None):
        return curved.third(v, y)


class Halved(TracePenalty):
    def penalised(self, gradient, pieces, factor=1.0):
        return super().penalised(gradient, pieces, factor / 2)


class Uncentred(TracePenalty):
    """Probes in [0, 1]."""

    def signs(self, params, draw):
        return tuple((sign + 1) / 2 for sign in super().signs(params, draw))


class Same(TracePenalty):
    """One probe, again and again."""

    def signs(self, params, draw):
        return super().signs(params, 0)


class TraceOnly(Complete):
    def form_gradient(self, batch, curved, v, y=None):
        return super().form_gradient(batch, curved, v, v)


class Backwards(HSR):
    def _move(self, params, *rest):
        self._shift = None if self._shift is None else tuple(-move for move in self._shift)
        super()._move(params, *rest)


class Unscaled(HSR):
    def penalised(self, gradient, pieces, factor=1.0):
        return super().penalised(gradient, pieces, 1.0)


class Trusting(HSR):
    """The closed form's reasons are not heeded."""

    def __setattr__(self, name, value):
        super().__setattr__(name, "" if name == "reason" else value)


class Eager(HSR):
    """The move comes before the last pass is known to be finite."""

    def regularized(self, batch):
        with torch.no_grad():
            batch.params[0].mul_(2)
        batch.weights._origin[0].mul_(2)
        return super().regularized(batch)


def half_the_slope_of_squares():
    right = bound_by_probes.ws_derivatives

    def half(*traces, **how):
        value, by_trace, by_square = right(*traces, **how)
        return value, by_trace, by_square / 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound_by_probes, "ws_derivatives", half)
        test_the_bound_goes_down()


BROKEN = {
    "the sign of λ dropped": lambda: test_radius_goes_down_whatever_its_sign(Signless),
    "λ_max for the radius": lambda: test_radius_goes_down_whatever_its_sign(Largest),
    "v not of unit length": lambda: test_radius_goes_down_whatever_its_sign(Long),
    "K ignored": lambda: test_below_K_is_free(AlwaysOn),
    "every vector passes": lambda: test_unconverged_vectors_do_as_said(Optimist),
    "no warm start": lambda: test_warm_starts_converge(Cold),
    "the vector is not saved": lambda: test_runs_resume((Forgetful,)),
    "third derivatives through LayerNorm": lambda: test_wrong_third_derivatives_are_not_taken((Exactly,)),
    "half the trace": lambda: test_the_trace_goes_down(Halved),
    "probes with a mean": lambda: test_the_trace_goes_down(Uncentred),
    "one probe for all": lambda: test_the_trace_of_its_probes_goes_down(Same),
    "T₂ forgotten": lambda: test_the_bound_goes_down(complete=TraceOnly),
    "half the slope of T₂": half_the_slope_of_squares,
    "the direction not normalised": lambda: test_rules_do_as_said(Unscaled),
    "up instead of down": lambda: test_rules_do_as_said(Backwards),
    "the closed form where it does not apply": lambda: test_the_closed_form_knows_its_limits(Trusting),
    "the formula at any cost": lambda: test_the_cheaper_way_is_chosen(worth=math.inf),
    "probes at any cost": lambda: test_the_cheaper_way_is_chosen(worth=0.0),
    "weights moved before NaN is seen": lambda: test_nan_leaves_the_weights((Eager,)),
    "a third derivative more": lambda: test_costs_are_as_stated(
        {"": (lambda net: HSR(net.sgd(), probes=2), (1, 6))}
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        breakage()
