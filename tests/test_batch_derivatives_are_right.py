"""Promise: products and third derivatives of a batch's loss are those of the dense Hessian. (5 s)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag.engine.training import training
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.training import Curved
from tests.models import Attention, generator, randn
from tests.training_runs import DIFFERENCE, Net, close, flat


def test_products_are_the_dense_hessian(kind=Curved):
    net = Net()
    dense = torch.func.hessian(net.loss)(net.theta)
    curved = kind(net.closure, net.params)
    for seed in (1, 2, 3):
        v = randn(len(dense), seed=seed)
        close(flat(curved.product(net.split(v))), dense @ v, 1e-13)
    close(flat(curved.gradient), torch.func.grad(net.loss)(net.theta), 1e-14)


def test_products_go_through_attention(kind=Curved):
    """Fused attention has no second derivatives: products against differences of gradients."""
    torch.manual_seed(0)
    model, tokens = Attention().double(), torch.randint(7, (3, 5), generator=generator())
    params = list(model.parameters())

    def closure():
        return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    v = tuple(randn(*p.shape, seed=index) for index, p in enumerate(params))
    with BatchLoss(closure, params) as batch:
        product = kind(closure, params).product(v)
        with batch.moved(v, DIFFERENCE):
            up = flat(batch.gradient())
        with batch.moved(v, -DIFFERENCE):
            down = flat(batch.gradient())
    close(flat(product), (up - down) / (2 * DIFFERENCE), 1e-7)


def along(directions, function, theta):
    """Slopes of a function of θ along each direction, by central differences: 1e-9 relative."""
    return torch.stack([function(theta + 1e-6 * d) - function(theta - 1e-6 * d) for d in directions]) / 2e-6


def test_third_derivatives_are_right(kind=BatchLoss, net=Net):
    """Exact and by differences, against differences of the dense Hessian's form v·H y."""
    net = net()
    theta = net.theta
    v, y = randn(len(theta), seed=1), randn(len(theta), seed=2)
    hessian, directions = torch.func.hessian(net.loss), randn(8, len(theta), seed=3)
    dense = hessian(theta)
    for second in (None, y):
        w = v if second is None else second
        claimed = along(directions, lambda t, w=w: v @ hessian(t) @ w, theta)
        pair = (net.split(v), None if second is None else net.split(w))
        for method, tolerance in (("auto", 1e-5), ("exact", 1e-8), ("difference", 1e-5)):
            with kind(net.closure, net.params) as batch:
                curved = batch.curved()
                close(directions @ flat(batch.third(curved, *pair, method=method)), claimed, tolerance)
                close(flat(curved.product(net.split(v))), dense @ v, 1e-12)  # the graph still serves
        assert torch.equal(net.theta, theta)


class WrittenOut(nn.LayerNorm):
    """The same function from elementary operations: torch.func.hessian is 4% off through the layer itself."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight + self.bias


def test_layers_with_wrong_third_derivatives_are_known(module=training):
    """Where torch is silently wrong "auto" takes differences; where it is right, it does not."""
    net, twin = Net(nn.LayerNorm(6)), Net(WrittenOut(6))
    assert torch.allclose(net.closure(), twin.closure(), rtol=1e-14)
    v, hessian = randn(len(net.theta), seed=1), torch.func.hessian(twin.loss)
    directions = randn(8, len(v), seed=3)
    claimed = along(directions, lambda theta: v @ hessian(theta) @ v, net.theta)
    with BatchLoss(net.closure, net.params) as batch:
        close(directions @ flat(batch.third(batch.curved(), net.split(v))), claimed, 1e-5)
    for middle, exact in (
        (nn.LayerNorm(6), False),
        (nn.BatchNorm1d(6), False),
        (nn.BatchNorm1d(6).eval(), True),
        (nn.GroupNorm(2, 6), True),
    ):
        net = Net(middle)
        assert module.Curved(net.closure, net.params).third_order_is_exact == exact


class HalfProducts(Curved):
    def product(self, v):
        return tuple(piece / 2 for piece in super().product(v))


class FirstOnly(BatchLoss):
    def third(self, curved, v, y=None, *, method="auto"):
        return super().third(curved, v, v, method=method)


BROKEN = {
    "products halved": (test_products_are_the_dense_hessian, HalfProducts),
    "attention products halved": (test_products_go_through_attention, HalfProducts),
    "third derivative ignores y": (test_third_derivatives_are_right, FirstOnly),
    "layers not recognised": (test_layers_with_wrong_third_derivatives_are_known, None),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    promise, broken = breakage
    if broken is None:
        monkeypatch.setattr(training, "_wrong_third_order", lambda loss: False)
        broken = training
    with pytest.raises(AssertionError):
        promise(broken)
