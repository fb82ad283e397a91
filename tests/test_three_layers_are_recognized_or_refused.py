"""Promise: the closed form is used on what it covers, by value and not by looks, and refuses the rest. (10 s)"""

from __future__ import annotations

from sys import modules

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.closed_form import closed_ws, recognize, three_layer
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import Refused
from hessdiag.problem import Problem
from hessdiag.samples import draw
from tests.models import attention, cnn, dense_hessian, labels, randn, regression


class Attributes(nn.Module):
    """Layers as attributes, registered in the wrong order, the activation a function in forward."""

    def __init__(self, function=torch.tanh) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(6, 4, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x)))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Wrapped(nn.Module):
    """Two linear layers around an activation, and something the structure does not show."""

    def __init__(self, before=lambda x: x, between=torch.tanh, after=lambda z: z) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3)
        self.before, self.between, self.after = before, between, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.two(self.between(self.one(self.before(x)))))


class Detached(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.one(x)), self.two.weight.detach(), self.two.bias)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Scaled(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return model


def problem(model: nn.Module, x: Tensor | None = None, y: Tensor | None = None, **options) -> Problem:
    x = randn(20, 6) if x is None else x
    y = labels(len(x), 3) if y is None else y
    options = {"criterion": "cross_entropy"} | options
    return Problem(model, {"train": (x, y)}, **options)


def found(given: Problem, kind: str = "hessian"):
    samples = draw(given.data["train"], samples=100, batch_size=7)
    return recognize(given, samples, kind=kind)


def plain(*middle: nn.Module, **options) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4, **options), *middle, nn.Linear(4, 3, **options))


ACCEPTED = {
    "Sequential": lambda: problem(plain(nn.Tanh()).double()),
    "single precision": lambda: problem(plain(nn.Tanh())),
    "half precision": lambda: problem(plain(nn.SiLU()).bfloat16()),
    "no biases": lambda: problem(plain(nn.GELU(), bias=False)),
    "GELU by tanh": lambda: problem(plain(nn.GELU(approximate="tanh"))),
    "Softplus with its own beta": lambda: problem(plain(nn.Softplus(beta=3.0, threshold=5.0))),
    "Mish, by the engine": lambda: problem(plain(nn.Mish())),
    "ReLU": lambda: problem(plain(nn.ReLU())),
    "an activation of the user's": lambda: problem(plain(Sine())),
    "Flatten, Dropout, Identity": lambda: problem(
        nn.Sequential(nn.Flatten(), nn.Dropout(0.5), plain(nn.Tanh(), nn.Identity(), nn.Dropout(0.9))),
        randn(20, 2, 3),
    ),
    "attributes": lambda: problem(Attributes()),
    "attributes, a function": lambda: problem(Attributes(F.softplus)),
    "training mode with dropout": lambda: problem(plain(nn.Dropout(0.5), nn.Sigmoid()).train()),
    "some parameters": lambda: problem(plain(nn.Tanh()), params=("0.*", "!*.bias")),
    "frozen layer": lambda: problem(frozen(plain(nn.Tanh()), "0.weight", "0.bias")),
    "soft targets": lambda: problem(plain(nn.Tanh()), y=torch.softmax(randn(20, 3), 1).float()),
    "ignored targets": lambda: problem(
        plain(nn.Tanh()), y=torch.where(torch.arange(20) % 4 > 0, labels(20, 3), -100)
    ),
    "a loss module as attribute": lambda: problem(with_loss(plain(nn.Tanh()))),
    "a forward of the user's": lambda: problem(plain(nn.Tanh()), forward=lambda model, batch: model(batch[0])),
    "tokens side by side": lambda: problem(plain(nn.Tanh()), randn(10, 4, 6), labels(40, 3).view(10, 4)),
}


def with_loss(model: nn.Module) -> nn.Module:
    holder = Wrapped()
    holder.loss = nn.CrossEntropyLoss()
    return holder


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_and_equal_to_products(make, kind: str):
    torch.manual_seed(0)
    given = make()
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    operator = Curvature(
        given, draw(given.data["train"], samples=100, batch_size=7), kind=kind, dtype=torch.float64
    )
    closed = closed_ws(operator)
    assert not isinstance(closed, Refused), closed
    H = operator.dense()
    assert closed.trace.value == pytest.approx(float(H.trace()), rel=1e-10)
    assert closed.frobenius_squared.value == pytest.approx(float(H.square().sum()), rel=1e-10)
    assert closed.trace.lo <= closed.trace.value <= closed.trace.hi and closed.trace.kind == "exact"
    parts = torch.split(H.diagonal(), [size for _, size in operator.layout])
    for layer, part, (name, size) in zip(closed.layers, parts, operator.layout, strict=True):
        assert (layer.name, layer.size) == (name, size)
        assert layer.trace == pytest.approx(float(part.sum()), abs=1e-10 * float(H.norm()))
    values = torch.linalg.eigvalsh(H)
    upper, lower = closed.blockwise()
    assert upper.exact_inputs and lower.value <= values[0] + 1e-12 and values[-1] <= upper.value
    weights = operator.weights / operator.weights.sum()
    assert float(weights @ closed.per_batch) == pytest.approx(closed.trace.value, rel=1e-12)
    assert float(closed.per_sample.sum() / operator.weights.sum()) == pytest.approx(closed.trace.value, rel=1e-12)
    assert operator.products == len(H)  # the dense matrix's own
    assert all(torch.equal(before[name], tensor) for name, tensor in given.model.state_dict().items())


def test_against_the_dense_hessian_and_gradient_names():
    given = problem(plain(nn.Tanh()).double())
    H = dense_hessian(given)
    samples = draw(given.data["train"], samples=100, batch_size=6)
    closed = closed_ws(Curvature(given, samples))
    assert closed.trace.value == pytest.approx(float(H.trace()), rel=1e-12)
    seen = recognize(given, samples)
    slopes = seen.named(three_layer(seen.net, seen.batches, gradient=True).gradient("trace"))
    named = dict(given.model.named_parameters())
    assert {name: slope.shape for name, slope in slopes.items()} == {name: p.shape for name, p in named.items()}


REFUSED = {
    "mean squared error": (regression, "criterion 'cross_entropy'"),
    "a convolution": (cnn, "Conv2d has parameters"),
    "attention": (attention, "has parameters of its own"),
    "a loss of one's own": (
        lambda: problem(plain(nn.Tanh()), criterion=lambda z, b: F.cross_entropy(z, b[1])),
        "criterion 'cross_entropy'",
    ),
    "one layer": (lambda: problem(nn.Linear(6, 3)), "1 linear layers"),
    "three layers of weights": (
        lambda: problem(nn.Sequential(plain(nn.Tanh()), nn.Tanh(), nn.Linear(3, 3))),
        "3 linear layers",
    ),
    "LayerNorm": (lambda: problem(plain(nn.LayerNorm(4), nn.Tanh())), "LayerNorm has parameters"),
    "PReLU": (lambda: problem(plain(nn.PReLU())), "PReLU has parameters"),
    "tied weights": (lambda: problem(Tied(), y=labels(20, 6)), "share a tensor"),
    "weight norm": (
        lambda: problem(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3))),
        "parameters of its own",
    ),
    "a scale of its own": (lambda: problem(Scaled()), "Scaled has parameters"),
    "inputs rescaled": (lambda: problem(Wrapped(before=lambda x: x / 255)), "outputs are not those"),
    "logits rescaled": (lambda: problem(Wrapped(after=lambda z: 2 * z)), "outputs are not those"),
    "softmax twice": (lambda: problem(Wrapped(after=lambda z: torch.softmax(z, 1))), "outputs are not those"),
    "a shortcut": (lambda: problem(Wrapped(between=lambda a: a + torch.tanh(a) * 0.5)), "activations, tanh first"),
    "softmax as activation": (lambda: problem(plain(nn.Softmax(1))), "elementwise"),
    "an unused activation": (lambda: problem(with_unused()), "not those of two linear layers"),
    "detached weights": (lambda: problem(Detached()), "gradient by two.weight"),
    "a branch by size": (
        lambda: problem(Wrapped(between=lambda a: torch.where(a.abs() > 30, a, torch.tanh(a))), rare()),
        "outputs are not those",
    ),
    "the residual": (lambda: problem(plain(nn.Tanh())), "Gauss-Newton"),
    "two inputs": (
        lambda: Problem(
            nn.Bilinear(2, 2, 3),
            {"train": [((randn(4, 2), randn(4, 2)), labels(4, 3))]},
            criterion="cross_entropy",
        ),
        "Bilinear has parameters",
    ),
    "weights per batch": (lambda: problem(plain(nn.Tanh()), weight=lambda batch: 2.0), "weight"),
}


def with_unused() -> nn.Module:
    model = Wrapped(between=lambda a: a.abs() ** 1.5)
    model.activation = nn.Tanh()
    return model


def rare() -> Tensor:
    """Only the last sample reaches the branch: the first 16 show nothing."""
    x = 0.1 * randn(20, 6)
    x[-1] *= 1e4
    return x


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED)
def test_refused_in_one_line(case: str):
    torch.manual_seed(0)
    make, words = REFUSED[case]
    refused = found(make(), "residual" if case == "the residual" else "hessian")
    assert isinstance(refused, Refused) and words in refused.reason and "\n" not in refused.reason


def test_too_much_work_is_refused():
    given = problem(plain(nn.Tanh()))
    operator = Curvature(given, draw(given.data["train"], samples=100))
    assert "more than 1e+01" in closed_ws(operator, most=10.0).reason


BROKEN = {
    "outputs not compared": ({"_agree": lambda *_: True, "_close": lambda *_: True}, "logits rescaled"),
    "the gradient not compared": ({"_difference": lambda *_: ""}, "detached weights"),
    "a few samples compared only": ({"_agree": "first"}, "a branch by size"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name: str, monkeypatch):
    """Without the comparison a wrong network is taken: the table above fails."""
    room = modules["hessdiag.closed_form.recognize"]
    broken, case = BROKEN[name]
    for function, replacement in broken.items():
        if replacement == "first":
            whole = room._agree
            replacement = lambda net, f, theta, batch, rows: len(rows[0]) < 7 or whole(net, f, theta, batch, rows)  # noqa: B023, E731
        monkeypatch.setattr(room, function, replacement)
    assert not isinstance(found(REFUSED[case][0]()), Refused)
