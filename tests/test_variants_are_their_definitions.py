"""Promise: each variant of SAM steps along what its paper defines, by float64 differentiation of its own. (5 s)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.errors import NonFiniteError, UsageError
from hessdiag.regularizers import ASAM, GSAM, MSAM, SAM, USAM, FriendlySAM, LookSAM, sam_variants, two_steps
from tests.models import labels, randn
from tests.training_runs import Net, close, flat, slope

HALVES = (slice(0, 5), slice(5, 12))  # unequal micro-batches: each counts alike, as in gradient accumulation


def batch_loss(net: Net, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    names = [name for name, _ in net.model.named_parameters()]
    tensors = dict(zip(names, net.split(theta), strict=True))
    return F.cross_entropy(torch.func.functional_call(net.model, tensors, (x,)), y)


def stepped(net: Net, own, closure) -> Tensor:
    own.step(closure)
    return flat([p.grad for p in net.params])


# --------------------------------------------------------------------------------------------------------- USAM


def test_usam_on_a_quadratic(kind=USAM):
    """L = w·A w / 2, A indefinite: A (w + rho A w), by numpy."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(7, 7))
    a, w = a + a.T, rng.normal(size=7)
    param, matrix = nn.Parameter(torch.from_numpy(w.copy())), torch.from_numpy(a)
    kind(torch.optim.SGD([param], lr=0.1), rho=0.3).step(lambda: param @ matrix @ param / 2)
    close(param.grad, torch.from_numpy(a @ (w + 0.3 * (a @ w))), 1e-13)


def test_usam_is_half_the_squared_gradient(kind=USAM):
    """Off the gradient of L + (rho/2) |∇L|², by differences of values, by O(rho²): half of rho, a quarter."""
    errors = []
    for rho in (4e-2, 2e-2):
        net = Net()
        gradient = torch.func.grad(net.loss)
        claimed = slope(lambda t: net.loss(t) + rho / 2 * gradient(t).square().sum(), net.theta)  # noqa: B023
        errors.append(float((net.stepped(kind(net.sgd(), rho=rho)) - claimed).norm()))
    assert errors[0] < 1e-3
    assert 3.5 < errors[0] / errors[1] < 4.5


# -------------------------------------------------------------------------------------------------------- m-SAM


def of_halves(net: Net):
    return [lambda rows=rows: F.cross_entropy(net.model(net.x[rows]), net.y[rows]) for rows in HALVES]


def test_msam_moves_each_micro_batch(kind=MSAM):
    net, rho = Net(), 0.3
    expected = torch.zeros_like(net.theta)
    for rows in HALVES:
        gradient = torch.func.grad(lambda t, rows=rows: batch_loss(net, t, net.x[rows], net.y[rows]))
        g = gradient(net.theta)
        expected += gradient(net.theta + rho * g / g.norm()) / 2
    close(stepped(net, kind(net.sgd(), rho=rho), of_halves(net)), expected, 1e-12)


def test_msam_is_the_mean_of_gradient_norms(kind=MSAM):
    """To first order in rho: mean over micro-batches of L_B + rho |∇L_B|, by differences of values."""
    errors = []
    for rho in (2e-2, 1e-2):
        net = Net()

        def claimed(t, net=net, rho=rho):
            parts = []
            for rows in HALVES:
                value = lambda s, rows=rows: batch_loss(net, s, net.x[rows], net.y[rows])  # noqa: E731
                parts.append(value(t) + rho * torch.func.grad(value)(t).norm())
            return torch.stack(parts).mean()

        expected = slope(claimed, net.theta)
        errors.append(float((stepped(net, kind(net.sgd(), rho=rho), of_halves(net)) - expected).norm()))
    assert errors[0] < 1e-2
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_msam_of_one_micro_batch_is_sam(kind=MSAM):
    one, other = Net(), Net()
    assert torch.equal(one.stepped(kind(one.sgd(), rho=0.3)), other.stepped(SAM(other.sgd(), rho=0.3)))


def test_msam_moves_statistics_once(kind=MSAM):
    """BatchNorm layers end as after one forward pass over each micro-batch; a fault leaves them as they were."""
    net, plain = Net(nn.BatchNorm1d(6).double()), Net(nn.BatchNorm1d(6).double())
    kind(net.sgd(), rho=0.3).step(of_halves(net))
    for rows in HALVES:
        plain.model(plain.x[rows])
    for name, buffer in plain.model.named_buffers():
        assert torch.equal(dict(net.model.named_buffers())[name], buffer), name
    before = [b.clone() for b in net.model.buffers()]
    with pytest.raises(UsageError):
        kind(net.sgd(), rho=0.3).step([of_halves(net)[0], lambda: 3.0])
    assert all(torch.equal(a, b) for a, b in zip(before, net.model.buffers(), strict=True))


def test_msam_masks_agree_within_a_micro_batch(kind=MSAM):
    net, masks = Net(nn.Dropout(0.5)), []
    net.model[1].register_forward_hook(lambda m, i, o: masks.append(o == 0))
    kind(net.sgd(), rho=0.3).step([lambda: F.cross_entropy(net.model(net.x), net.y)] * 2)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


# --------------------------------------------------------------------------------------------------------- GSAM


def gradients_of(net: Net, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """∇L(w), ∇L(w + e) and e of SAM, by torch.func."""
    gradient = torch.func.grad(net.loss)
    g = gradient(net.theta)
    e = rho * g / g.norm()
    return g, gradient(net.theta + e), e


def test_gsam_is_its_decomposition(kind=GSAM):
    net = Net()
    g, there, _ = gradients_of(net, 0.3)
    upright = g - (g @ there) / (there @ there) * there
    close(net.stepped(kind(net.sgd(), rho=0.3, alpha=0.4)), there - 0.4 * upright, 1e-12)


def test_gsam_lowers_the_gap_and_not_the_perturbed_loss(kind=GSAM):
    """What it adds to SAM's step leaves L(w + e) to first order, and climbs L; by differences of values."""
    net = Net()
    _, there, e = gradients_of(net, 0.3)
    theta, loss = net.theta, net.loss
    added = net.stepped(kind(net.sgd(), rho=0.3, alpha=1.0)) - there  # SAM's step has been taken off
    assert float(added.norm()) > 1e-3 * float(there.norm())
    h = 1e-5

    def rate(around: Tensor) -> float:
        return float(loss(around - h * added) - loss(around + h * added)) / (2 * h)

    assert abs(rate(theta + e)) < 1e-6 * float(added.norm())
    assert rate(theta) == pytest.approx(float(added @ added), rel=1e-5)  # |g⊥|²: the steepest climb across


def test_the_gap_is_the_largest_eigenvalue_at_a_minimum(kind=GSAM):
    """Of a quadratic at its end: the reported penalty is rho² lambda / 2 along the gradient that is left."""
    param = nn.Parameter(torch.tensor([1e-6, 0.0], dtype=torch.float64))
    own = kind(torch.optim.SGD([param], lr=0.0), rho=0.1)
    own.step(lambda: 7 * param[0] ** 2 / 2 + param[1] ** 2 / 2)
    assert own.report["penalty"] == pytest.approx(0.1**2 * 7 / 2, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ LookSAM


def test_looksam_is_its_algorithm(kind=LookSAM):
    """Four steps of k = 3 by torch.func: SAM, two with the kept part across, SAM."""
    net, rho, alpha, lr = Net(), 0.3, 0.7, 0.1
    gradient, theta = torch.func.grad(net.loss), net.theta
    own, kept = kind(net.sgd(), rho=rho, alpha=alpha, every=3), torch.zeros_like(theta)
    for step in range(4):
        g = gradient(theta)
        if step % 3 == 0:
            expected = gradient(theta + rho * g / g.norm())
            kept = expected - (expected @ g) / (g @ g) * g
        else:
            expected = g + alpha * g.norm() / kept.norm() * kept
        close(net.stepped(own), expected, 1e-10)
        theta = theta - lr * expected
        close(net.theta, theta, 1e-12)


# -------------------------------------------------------------------------------------------------- Friendly-SAM


def test_friendly_sam_is_its_algorithm(kind=FriendlySAM):
    """Five batches by torch.func: m, d = g − sigma m, e = rho d / |d|."""
    for removed, decay in ((1.0, 0.9), (0.5, 0.6)):
        net, rho = Net(), 0.3
        own = kind(net.sgd(), rho=rho, removed=removed, decay=decay)
        theta, mean = net.theta, torch.zeros_like(net.theta)
        for seed in range(5):
            x, y = randn(12, 4, seed=seed), labels(12, 3)
            gradient = torch.func.grad(lambda t, x=x, y=y, net=net: batch_loss(net, t, x, y))
            g = gradient(theta)
            mean = decay * mean + (1 - decay) * g
            d = g - removed * mean
            expected = gradient(theta + rho * d / d.norm())
            found = stepped(net, own, lambda x=x, y=y, net=net: F.cross_entropy(net.model(x), y))
            close(found, expected, 1e-10)
            theta = theta - 0.1 * expected


def test_a_failed_step_leaves_the_running_mean(kind=FriendlySAM):
    net, calls = Net(), []
    own = kind(net.sgd(), rho=0.3)
    own.step(net.closure)
    before = flat(own.mean)

    def second_fails():
        calls.append(1)
        return net.closure() if len(calls) == 1 else net.closure() * float("nan")

    with pytest.raises(NonFiniteError):
        own.step(second_fails)
    assert torch.equal(flat(own.mean), before)


# ------------------------------------------------------------------------------------------ limits and adaptive

PLAIN_SAM = {
    "GSAM": lambda opt: GSAM(opt, rho=0.3, alpha=0.0),
    "LookSAM": lambda opt: LookSAM(opt, rho=0.3, every=1),
    "FriendlySAM": lambda opt: FriendlySAM(opt, rho=0.3, removed=0.0),
    "MSAM": lambda opt: MSAM(opt, rho=0.3),
}


def test_their_limits_are_sam():
    for make in PLAIN_SAM.values():
        net, sam = Net(), Net()
        own, other = make(net.sgd()), SAM(sam.sgd(), rho=0.3)
        for _ in range(3):
            close(net.stepped(own), sam.stepped(other), 1e-13)


def test_no_gradient_no_move():
    """At a critical point every variant leaves the weights where they are."""
    for kind in (SAM, ASAM, USAM, MSAM, GSAM, LookSAM, FriendlySAM):
        param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        own = kind(torch.optim.SGD([param], lr=0.1), rho=0.3)
        for _ in range(2):
            own.step(lambda param=param: (param**2).sum())
        assert not param.any()


def test_adaptive_is_the_radius_relative_to_each_weight(kind=SAM):
    """T = |w|: e = rho T² g / |T g|, for SAM and its variants, by torch.func; USAM: rho T² g."""
    for own_kind in (kind, USAM, MSAM, GSAM):
        net = Net()
        gradient, theta = torch.func.grad(net.loss), net.theta
        g = gradient(theta)
        move = theta**2 * g if own_kind is USAM else theta**2 * g / (theta.abs() * g).norm()
        options = {"alpha": 0.0} if own_kind is GSAM else {}
        own = own_kind(net.sgd(), rho=0.3, adaptive=True, **options)
        close(net.stepped(own), gradient(theta + 0.3 * move), 1e-12)


BAD = {
    "alpha of GSAM": (lambda opt: GSAM(opt, alpha=-1.0), "alpha=-1.0: allowed: finite numbers from 0 up"),
    "alpha of LookSAM": (lambda opt: LookSAM(opt, alpha=float("nan")), "alpha=nan"),
    "every": (lambda opt: LookSAM(opt, every=0), "every=0: allowed: whole numbers from 1 up"),
    "removed": (lambda opt: FriendlySAM(opt, removed=1.5), "removed=1.5: allowed: numbers from 0 to 1"),
    "decay": (lambda opt: FriendlySAM(opt, decay=-0.1), "decay=-0.1"),
    "rho": (lambda opt: USAM(opt, rho=-1), "rho=-1"),
    "two calls of m-SAM": (lambda opt: MSAM(opt).first_step(), "MSAM moves by micro-batch"),
}


def test_bad_settings_are_refused():
    for make, words in BAD.values():
        with pytest.raises(UsageError) as caught:
            make(Net().sgd())
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- breakages


class OwnNorm(GSAM):
    def combined(self, here, there):
        return sam_variants.added(there, sam_variants.across(there, here), -self.alpha)


class Descending(GSAM):
    def combined(self, here, there):
        return sam_variants.added(there, sam_variants.across(here, there), self.alpha)


class Unscaled(LookSAM):
    def between(self, batch):
        return sam_variants.added(batch.gradient(), self.part, self.alpha)


class WholePart(LookSAM):
    def combined(self, here, there):
        self.part = there
        return there


class LateMean(FriendlySAM):
    def ascent(self, params, gradient):
        moves = super().ascent(params, gradient)
        return moves if self.mean is None else SAM.ascent(self, params, gradient)


class EarlyMean(FriendlySAM):
    def ascent(self, params, gradient):
        moves = super().ascent(params, gradient)
        self.mean = self._next
        return moves


class WholeMove(MSAM):
    regularized = two_steps.TwoSteps.regularized


class Summed(MSAM):
    def regularized(self, batch):
        return tuple(2 * g for g in super().regularized(batch))


class Halved(USAM):
    def ascent(self, params, gradient):
        return tuple(0.5 * e for e in super().ascent(params, gradient))


class NotAdaptive(SAM):
    def metric(self, weight):
        return 1.0


class Separate(MSAM):
    """Every micro-batch keeps its own statistics."""

    def regularized(self, batch):
        own = batch.parts

        def parts():
            for part in own():
                part._statistics = type(part._statistics)(None)
                yield part

        batch.parts = parts
        return super().regularized(batch)


BROKEN = {
    "USAM: half of rho": (test_usam_on_a_quadratic, Halved),
    "USAM: half of rho, to first order": (test_usam_is_half_the_squared_gradient, Halved),
    "USAM: SAM": (test_usam_on_a_quadratic, SAM),
    "m-SAM: one move": (test_msam_moves_each_micro_batch, WholeMove),
    "m-SAM: a sum": (test_msam_is_the_mean_of_gradient_norms, Summed),
    "m-SAM: a sum, of one": (test_msam_of_one_micro_batch_is_sam, Summed),
    "m-SAM: statistics apart": (test_msam_moves_statistics_once, Separate),
    "m-SAM: other masks": (
        test_msam_masks_agree_within_a_micro_batch,
        lambda *a, **o: MSAM(*a, same_randomness=False, **o),
    ),
    "GSAM: the other part": (test_gsam_is_its_decomposition, OwnNorm),
    "GSAM: the other part, in the loss": (test_gsam_lowers_the_gap_and_not_the_perturbed_loss, OwnNorm),
    "GSAM: downhill": (test_gsam_lowers_the_gap_and_not_the_perturbed_loss, Descending),
    "LookSAM: not scaled": (test_looksam_is_its_algorithm, Unscaled),
    "LookSAM: all of the gradient kept": (test_looksam_is_its_algorithm, WholePart),
    "F-SAM: SAM after the first": (test_friendly_sam_is_its_algorithm, LateMean),
    "F-SAM: a mean that moves early": (test_a_failed_step_leaves_the_running_mean, EarlyMean),
    "not adaptive": (test_adaptive_is_the_radius_relative_to_each_weight, NotAdaptive),
    "the gap doubled": (
        test_the_gap_is_the_largest_eigenvalue_at_a_minimum,
        lambda opt, rho: GSAM(opt, rho=2 * rho),
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    promise, broken = breakage
    with pytest.raises(AssertionError):
        promise(broken)
