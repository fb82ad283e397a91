"""Promise: convolutions and BatchNorm formed for products have the derivatives that torch's own have.

The truth is torch's double backward of the user's model, row by row, without hessdiag.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag import Problem
from hessdiag.engine.products import convolution, folding
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.graphs import GradientGraph
from hessdiag.errors import MeasurementError
from tests import models

EXACT = (
    1e-10  # relative, float64: the same sums in another order; a derivative that is lost is off by 1e-3 and more
)


class Net(nn.Module):
    """Some layers, and a forward pass that uses them; images (n, 2, 6, 6), signals (n, 2, 7) or rows (n, 4)."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.pass_ = forward

    def forward(self, x):
        columns = self.pass_(self, x).flatten(1)
        return torch.stack([columns[:, begin::5].sum(1) for begin in range(5)], dim=1)


def _conv(
    *, norm=None, shape=(2, 6, 6), batch_norm=nn.BatchNorm2d, conv=nn.Conv2d, width=3, act=torch.tanh, **options
):
    layers = {"conv": conv(2, width, 3, **options), "norm": norm or batch_norm(width)}
    return Net(lambda m, x: act(m.norm(m.conv(x))), **layers), shape


def _linear():
    return Net(lambda m, x: torch.tanh(m.norm(m.line(x))), line=nn.Linear(4, 5), norm=nn.BatchNorm1d(5)), (4,)


def _chain(forward, shape=(2, 6, 6), **more):
    """Two convolutions and two norms, put together by hand."""
    layers = {"a": nn.Conv2d(2, 3, 3, padding=1), "b": nn.Conv2d(3, 3, 3, padding=1, bias=False)}
    layers |= {"n": nn.BatchNorm2d(3), "o": nn.BatchNorm2d(3)} | more
    return Net(forward, **layers), shape


def _written_between(m, x):
    y = m.a(x)
    y.mul_(2)
    return torch.tanh(m.n(y))


def _hooked():
    net, shape = _conv()
    net.conv.register_forward_hook(lambda module, inputs, output: net.__dict__.__setitem__("seen", output))
    net.pass_ = lambda m, x: torch.tanh(m.norm(m.conv(x))) + m.seen.square()
    return net, shape


def _replaced():
    net, shape = _conv()
    net.conv.register_forward_hook(lambda module, inputs, output: output.sin())
    return net, shape


def _gradient_hook():
    def forward(m, x):
        y = m.a(x)
        y.register_hook(lambda slope: slope * 3)
        return torch.tanh(m.n(y))

    return _chain(forward)


def _native(m, x):
    y = torch.batch_norm(m.a(x), m.n.weight, m.n.bias, m.n.running_mean, m.n.running_var, False, 0.1, 1e-5, True)
    return torch.tanh(y)


def _unbatched(m, x):
    mean, var = (torch.full((6,), entry, dtype=x.dtype) for entry in (0.3, 0.7))
    return torch.stack([torch.tanh(F.batch_norm(m.a(one), mean, var, m.t, m.t)) for one in x])


def _vmapped(m, x):
    y = torch.func.vmap(lambda one: F.conv2d(one[None], m.a.weight)[0])(x)
    return torch.tanh(m.n(y))


def _many_derivatives_at_once(m, x):
    x = x.detach().requires_grad_()
    y = torch.tanh(m.n(m.a(x))).mean((2, 3))
    ones = torch.eye(3, dtype=x.dtype)[:, None].expand(3, len(x), 3)
    (slopes,) = torch.autograd.grad(y, x, ones, create_graph=True, is_grads_batched=True)
    return torch.cat([y, y.sin()], dim=1) * slopes.square().mean()


def _one_derivative(m, x):
    x = x.detach().requires_grad_()
    y = torch.tanh(m.n(m.a(x)))
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.tanh(slope) + y.mean()


NETWORKS = {  # what builds one, and how many BatchNorms go into a convolution
    "a convolution with a bias": (lambda: _conv(padding=1), 1),
    "a convolution without": (lambda: _conv(bias=False), 1),
    "no weight and bias in BatchNorm": (lambda: _conv(norm=nn.BatchNorm2d(3, affine=False)), 1),
    "strided, dilated": (lambda: _conv(stride=2, dilation=2, padding=2), 1),
    "in groups": (lambda: _conv(groups=2, width=4), 1),
    "one dimension": (lambda: _conv(conv=nn.Conv1d, batch_norm=nn.BatchNorm1d, shape=(2, 7)), 1),
    "three dimensions": (lambda: _conv(conv=nn.Conv3d, batch_norm=nn.BatchNorm3d, shape=(2, 3, 3, 4)), 1),
    "in-place ReLU": (lambda: _conv(act=F.relu_), 1),
    "circular padding": (lambda: _conv(padding=1, padding_mode="circular"), 1),
    "padding by a word": (lambda: _conv(padding="same"), 0),
    "a transposed convolution": (lambda: _conv(conv=nn.ConvTranspose2d), 0),
    "a linear layer": (_linear, 0),
    "statistics of the batch": (lambda: _conv(norm=nn.BatchNorm2d(3, track_running_stats=False)), 0),
    "GroupNorm": (lambda: _conv(norm=nn.GroupNorm(1, 3)), 0),
    "in training mode": (
        lambda: _chain(lambda m, x: F.batch_norm(m.a(x), torch.ones(3).to(x), torch.ones(3).to(x), training=True)),
        0,
    ),
    "by its name in torch": (lambda: _chain(_native), 1),
    "used twice": (lambda: _chain(lambda m, x: (y := m.a(x)).sin() + torch.tanh(m.n(y))), 1),
    "two norms of one output": (lambda: _chain(lambda m, x: m.n(y := m.a(x)).sin() + torch.tanh(m.o(y))), 2),
    "one convolution twice": (
        lambda: _chain(lambda m, x: torch.tanh(m.o(m.b(torch.tanh(m.n(m.b(m.a(x)))))))),
        2,
    ),
    "one norm twice": (lambda: _chain(lambda m, x: torch.tanh(m.n(m.b(torch.tanh(m.n(m.a(x))))))), 2),
    "a residual connection": (
        lambda: _chain(lambda m, x: F.relu((y := F.relu(m.n(m.a(x)))) + m.o(m.b(y)))),
        2,
    ),
    "before the convolution": (lambda: _chain(lambda m, x: m.b(torch.tanh(m.n(m.a(x).sin())))), 0),
    "written in place between": (lambda: _chain(_written_between), 0),
    "a hook that keeps the output": (_hooked, 1),
    "a hook that gives another": (_replaced, 0),
    "a hook on the gradient": (_gradient_hook, 0),
    "images one by one": (lambda: _chain(_unbatched, t=nn.Parameter(torch.ones(6))), 0),
    "vmap in the model": (lambda: _chain(_vmapped), 0),
    "a derivative in the model": (lambda: _chain(_one_derivative), 1),
    "many derivatives at once in it": (lambda: _chain(_many_derivatives_at_once), 1),
}
FROZEN = ("conv.weight", "conv.bias", "norm.weight", "norm.bias")


def built(name):
    torch.manual_seed(0)
    model, shape = NETWORKS[name][0]()
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_().add_(0.5)
            if module.running_var is not None:
                module.running_var.uniform_(0.1, 2)
    data = {"train": (models.randn(8, *shape), models.labels(8, 5))}
    return Problem(model, data, criterion="cross_entropy")


def truth(problem, names=None):
    """H of the parameters that count: torch's, through the user's own module."""
    inputs, labels = problem.data["train"]
    chosen = [p for name, p in problem.model.named_parameters() if names is None or name in names]
    loss = F.cross_entropy(problem.model(inputs), labels)
    slopes = torch.autograd.grad(loss, chosen, create_graph=True, materialize_grads=True)
    flat = torch.cat([slope.reshape(-1) for slope in slopes])
    rows = [torch.autograd.grad(s, chosen, retain_graph=True, materialize_grads=True) for s in flat]
    return torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])


def misses(operator, H):
    found = operator @ torch.eye(operator.size, dtype=torch.float64)
    return float((found - H).abs().max() / H.abs().max())


def folds(monkeypatch):
    """Every time from here on that a BatchNorm goes into a convolution."""
    found = []
    original = folding.convolution

    def counted(x, weight, bias, geometry, value=None):
        found.extend([1] if value else [])
        return original(x, weight, bias, geometry, value)

    monkeypatch.setattr(folding, "convolution", counted)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_torchs(name, monkeypatch):
    problem = built(name)
    operator = Curvature(problem, models.sample(problem, 8), dtype=torch.float64)
    found = folds(monkeypatch)
    assert misses(operator, truth(problem)) < EXACT
    assert len(found) == NETWORKS[name][1]


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("only", [False, True])
def test_products_with_parameters_left_out_are_torchs(name, only, monkeypatch):
    whole = built("a convolution with a bias")
    names = [name] if only else [other for other in FROZEN if other != name]
    problem = Problem(whole.model, whole.data, criterion="cross_entropy", params=tuple(names))
    operator = Curvature(problem, models.sample(problem, 8), dtype=torch.float64)
    found = folds(monkeypatch)
    assert misses(operator, truth(whole, names)) < EXACT
    assert len(found) == (0 if only and name.startswith("norm") else 1)  # of a constant there is nothing to fold


def test_both_parts_of_the_hessian_add_up():
    problem = built("a residual connection")
    parts = [
        Curvature(problem, models.sample(problem, 8), kind=k, dtype=torch.float64) for k in ("ggn", "residual")
    ]
    eye = torch.eye(parts[0].size, dtype=torch.float64)
    H = truth(problem)
    assert float((sum(part @ eye for part in parts) - H).abs().max() / H.abs().max()) < EXACT


def test_what_torch_refuses_stays_refused():
    def forward(m, x):
        return torch.tanh(F.batch_norm(m.a(x), m.o.weight, m.o.weight.square() + 1))

    torch.manual_seed(0)
    data = {"train": (models.randn(8, 2, 6, 6), models.labels(8, 5))}
    problem = Problem(_chain(forward)[0].double(), data, criterion="cross_entropy")
    operator = Curvature(problem, models.sample(problem, 8), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="running_mean"):
        operator @ torch.ones(operator.size, dtype=torch.float64)


def test_losses_and_gradients_are_torchs_own(monkeypatch):
    """What the self-test and the second opinion compare products with must not be formed as products are."""
    problem = built("a residual connection")
    operator = Curvature(problem, models.sample(problem, 8), dtype=torch.float64)
    found = folds(monkeypatch)
    operator.loss(), operator.gradient()
    assert "NativeBatchNormBackward0" in operator.function.operations(operator.batches[0])
    assert not found


def test_the_activation_before_is_not_held():
    """A graph with BatchNorm holds no more than one without: of the six layers' activations, not nine."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Tanh()]
    layers += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Tanh(), nn.Flatten()]
    held = []
    for model in (
        nn.Sequential(*layers),
        nn.Sequential(*(one for one in layers if not isinstance(one, nn.BatchNorm2d))),
    ):
        data = {"train": (torch.randn(8, 2, 16, 16), torch.randint(4, (8,)))}
        problem = Problem(model.eval(), data, criterion="cross_entropy")
        operator = Curvature(problem, models.sample(problem, 8))
        held.append(GradientGraph(operator.function, "hessian", operator.batches[0]).held)
    assert held[0] <= 1.05 * held[1]


def _eps(monkeypatch):
    form = folding._batch_norm
    monkeypatch.setitem(folding.FORMS, F.batch_norm, lambda *a, **k: form(*a, **{**k, "eps": 0.1}))


def _constant_weight(monkeypatch):
    form = folding.convolution
    monkeypatch.setattr(
        folding, "convolution", lambda x, w, b, g, v=None: form(x, w if v is None else w.detach(), b, g, v)
    )


def _no_second_slope(monkeypatch):
    form = convolution._gradients

    def spoilt(slope, x, weight, geometry, wanted):
        found = form(slope, x, weight, geometry, wanted)
        return (found[0] * 0, None, None) if wanted == (True, False, False) else found

    monkeypatch.setattr(convolution, "_gradients", spoilt)


def _never(monkeypatch):
    monkeypatch.setattr(
        folding.Folded, "__torch_function__", lambda self, f, types, a=(), k=None: f(*a, **(k or {}))
    )


def _training(monkeypatch):
    form = folding._batch_norm
    monkeypatch.setitem(folding.FORMS, F.batch_norm, lambda *a, **k: form(*a, **{**k, "training": False}))


BROKEN = {
    "another epsilon": (_eps, "a convolution without"),
    "γ and w are held constant": (_constant_weight, "a residual connection"),
    "a convolution's mixed derivative is lost": (_no_second_slope, "a residual connection"),
    "nothing is folded": (_never, "a convolution without"),
    "training mode is overlooked": (_training, "in training mode"),
    "what is written in place is overlooked": (
        lambda m: m.setattr(folding, "_untouched", lambda *a, **k: True),
        "written in place between",
    ),
    "a hook on the gradient is passed by": (
        lambda m: m.setattr(folding, "_untouched", lambda *a, **k: True),
        "a hook on the gradient",
    ),
    "the older vmap is overlooked": (
        lambda m: m.setattr(convolution, "transformed", lambda *a: False),
        "many derivatives at once in it",
    ),
    "vmap is overlooked": (lambda m: m.setattr(folding, "_plain", lambda *a: True), "vmap in the model"),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    spoil, name = breakage
    spoil(monkeypatch)
    with pytest.raises((AssertionError, MeasurementError)):
        test_products_are_torchs(name, monkeypatch)
