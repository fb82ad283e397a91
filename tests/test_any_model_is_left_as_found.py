"""Promise: every kind of module is measured as its user meant, and is afterwards what it was. (20 s)

A zoo of modules with something odd about how they hold or use their weights. Each is measured against a dense
Hessian of plain autograd on the user's own module, after which nothing of it may have moved, come what may.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import hessdiag
from hessdiag.engine.checks.preflight import preflight, require_sound
from hessdiag.engine.products import functional
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import HessdiagError
from hessdiag.problem import Problem
from hessdiag.samples import draw
from tests.models import same

ROWS, FEATURES, CLASSES = 24, 4, 3
PLAIN: list[bool] = []  # filled while the truth is computed


class Module(nn.Module):
    """A module whose forward is given: ``forward(self, x)``."""

    def __init__(self, forward, **children):
        super().__init__()
        self._forward = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self._forward(self, x)


def linear(rows=FEATURES, columns=CLASSES):
    return nn.Linear(rows, columns)


def mlp(*odd, hidden=5):
    return nn.Sequential(linear(columns=hidden), nn.Tanh(), *odd, linear(hidden))


def shared():
    layer = linear(columns=FEATURES)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), linear())


def shared_deep():
    block = nn.Sequential(linear(columns=FEATURES), nn.Tanh())
    return nn.Sequential(block, nn.Sequential(block, linear()))


def tied():
    model = nn.Sequential(linear(columns=FEATURES), nn.Tanh(), linear(columns=FEATURES), nn.Tanh(), linear())
    model[2].weight = model[0].weight
    return model


def in_a_list():
    model = Module(lambda s, x: s.a(x) + s.kept[0].square().sum() * x.new_tensor([1.0, 0, 0]), a=linear())
    model.kept = [model.a.weight]
    return model


def in_a_dict():
    model = Module(lambda s, x: s.a(x) + s.kept["w"].square().sum() * x.new_tensor([1.0, 0, 0]), a=linear())
    model.kept = {"w": model.a.weight}
    return model


def in_a_tuple():
    model = Module(lambda s, x: s.a(x) + s.kept[0].square().sum() * x.new_tensor([1.0, 0, 0]), a=linear())
    model.kept = (model.a.weight,)
    return model


def in_a_closure():
    layer = linear()
    weight = layer.weight
    return Module(lambda s, x: s.a(x) + weight.square().sum() * x.new_tensor([1.0, 0, 0]), a=layer)


def in_a_partial():
    layer = linear()
    add = functools.partial(torch.mul, layer.bias)
    return Module(lambda s, x: s.a(x) + add(s.a(x)), a=layer)


def in_an_object():
    class Config:
        pass

    model = Module(lambda s, x: s.a(x) * s.config.weight.sum(), a=linear())
    model.config = Config()
    model.config.weight = model.a.weight
    return model


def pruned():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.4)
    prune.random_structured(model[2], "weight", 0.4, dim=0)
    return model


def old_spectral_norm():
    model = mlp()
    nn.utils.spectral_norm(model[0])
    return model.eval()


def new_spectral_norm():
    model = mlp()
    parametrizations.spectral_norm(model[0])
    return model.eval()


def orthogonal():
    return nn.Sequential(linear(columns=FEATURES), nn.Tanh(), parametrizations.orthogonal(linear(4, 4)), linear())


class Positive(nn.Module):
    def forward(self, raw):
        return F.softplus(raw)


def parametrized():
    model = mlp()
    parametrize.register_parametrization(model[0], "weight", Positive())
    return model


def hooked():
    model = mlp()
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return model


def dropping():
    return mlp(nn.Dropout(0.5)).train()


def batch_norm():
    return mlp(nn.BatchNorm1d(5)).train()


def mixed_modes():
    model = mlp(nn.BatchNorm1d(5), nn.Dropout(0.2)).train()
    model[2].eval()
    return model


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def recurrent():
    return Module(
        lambda s, x: s.out(s.gru(x[:, :, None])[0][:, -1]), gru=nn.GRU(1, 3, batch_first=True), out=linear(3)
    )


def bidirectional():
    lstm = nn.LSTM(1, 2, batch_first=True, bidirectional=True)
    return Module(lambda s, x: s.out(s.lstm(x[:, :, None])[0][:, -1]), lstm=lstm, out=linear(4))


def with_a_cache():
    def forward(self, x):
        self.seen = self.a(x)  # kept for a plot, say
        self.calls.append(len(x))
        return self.out(torch.tanh(self.seen))

    model = Module(forward, a=linear(columns=5), out=linear(5))
    model.calls = [7]
    return model


def folded(filled):
    """A weight that is computed once and kept, as for inference."""

    def forward(self, x):
        if self.kept is None:
            self.kept = torch.tanh(self.a.weight)
        return self.out(torch.tanh(F.linear(x, self.kept)))

    model = Module(forward, a=linear(columns=5), out=linear(5))
    model.a.bias = None
    model.kept = filled
    return model


def renormed():
    """Its rows are rewritten in forward, in evaluation too; no row is beyond the norm when it is measured."""
    torch.manual_seed(5)
    model = Module(
        lambda self, x: self.out(torch.tanh(self.e((x > 0).long()).flatten(1))), out=linear(FEATURES * 2)
    )
    model.e = nn.Embedding(2, 2, max_norm=0.5)
    return model


def counting():
    def forward(self, x):
        self.steps += 1
        return self.out(torch.tanh(self.a(x)))

    model = Module(forward, a=linear(columns=5), out=linear(5))
    model.register_buffer("steps", torch.tensor(3))
    return model


def rebound_buffer():
    def forward(self, x):
        self.last = x.detach().mean()
        return self.a(x)

    model = Module(forward, a=linear())
    model.register_buffer("last", torch.tensor(3.0))
    return model


def parameter_list():
    weights = nn.ParameterList(nn.Parameter(torch.randn(FEATURES, CLASSES)) for _ in range(2))
    return Module(lambda s, x: x @ s.weights[0] * torch.tanh(x @ s.weights[1]), weights=weights)


def complex_weight():
    def forward(self, x):
        spectrum = torch.fft.rfft(x)
        return self.out(torch.tanh(torch.fft.irfft(spectrum * self.w, n=FEATURES)))

    return Module(forward, w=nn.Parameter(torch.randn(3, dtype=torch.cdouble)), out=linear())


def checkpointed(reentrant):
    def forward(self, x):
        hidden = self.a(x)
        # plain autograd cannot differentiate through the reentrant form
        return self.out(self.body(hidden) if PLAIN else checkpoint(self.body, hidden, use_reentrant=reentrant))

    return Module(forward, a=linear(columns=5), body=nn.Sequential(linear(5, 5), nn.Tanh()), out=linear(5))


def checkpointed_sequence():
    body = nn.Sequential(*[nn.Sequential(linear(5, 5), nn.Tanh()) for _ in range(3)])
    return Module(
        lambda s, x: s.out(checkpoint_sequential(s.body, 2, s.a(x), use_reentrant=False)),
        a=linear(columns=5), body=body, out=linear(5),
    )  # fmt: skip


def attention():
    layer = nn.TransformerEncoderLayer(2, 1, 4, batch_first=True)
    return Module(lambda s, x: s.out(s.body(x.unflatten(1, (2, 2))).flatten(1)), body=layer, out=linear())


def drawing():
    """Draws from every random stream and uses none of it."""

    def forward(self, x):
        torch.rand(1), np.random.rand(), random.random()
        return self.a(x)

    return Module(forward, a=linear())


ZOO = {
    "a module under two names": shared,
    "a block under two names": shared_deep,
    "tied tensors": tied,
    "a parameter in a list": in_a_list,
    "a parameter in a dict": in_a_dict,
    "a parameter in a tuple": in_a_tuple,
    "a parameter in a closure": in_a_closure,
    "a parameter in a partial": in_a_partial,
    "a parameter in an object": in_an_object,
    "pruned": pruned,
    "spectral norm by hook": old_spectral_norm,
    "spectral norm": new_spectral_norm,
    "orthogonal": orthogonal,
    "parametrized": parametrized,
    "hooks that change values": hooked,
    "dropout in training mode": dropping,
    "BatchNorm in training mode": batch_norm,
    "mixed modes": mixed_modes,
    "frozen": frozen,
    "GRU": recurrent,
    "LSTM in two directions": bidirectional,
    "a cache": with_a_cache,
    "a weight folded and kept": lambda: folded(None),
    "a counter": counting,
    "a buffer bound anew": rebound_buffer,
    "a parameter list": parameter_list,
    "complex weights": complex_weight,
    "checkpointing": lambda: checkpointed(False),
    "checkpointing, reentrant": lambda: checkpointed(True),
    "a checkpointed sequence": checkpointed_sequence,
    "attention": attention,
    "random numbers drawn": drawing,
}


@pytest.fixture(params=ZOO.values(), ids=ZOO)
def problem(request):
    torch.manual_seed(5)
    model = request.param().double()
    x, y = torch.randn(ROWS, FEATURES, dtype=torch.float64), torch.randint(CLASSES, (ROWS,))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    return Problem(model, {"train": (x, y)}, criterion="cross_entropy", meta={"lr": 0.1})


def dense(problem):
    """The Hessian by double backward on a copy of the user's module, complex entries as pairs of reals."""
    model = copy.deepcopy(problem.model).eval() if deepcopies(problem.model) else problem.model
    modes = [module.training for module in model.modules()]
    model.eval()
    PLAIN.append(True)
    x, y = problem.data["train"]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat(pieces):
        pieces = [torch.zeros_like(p) if t is None else t for t, p in zip(pieces, parameters, strict=True)]
        return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in pieces])

    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(model(x), y)
    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
    rows = [
        flat(torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)) for entry in gradient
    ]
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    PLAIN.clear()
    return torch.stack(rows).detach()


def deepcopies(model):
    """Closures and partials do not follow a copy, and what pruning computed cannot be copied."""
    return not any(
        isinstance(value, torch.Tensor) for m in model.modules() for value in vars(m).values()
    ) and not (isinstance(model, Module) and model._forward.__closure__)


def state(problem):
    """All that must not move: objects by identity, tensors by value too."""
    model = problem.model
    return {
        "tensors": {n: (id(t), t.detach().clone()) for n, t in model.named_parameters(remove_duplicate=False)},
        "buffers": {n: (id(t), t.clone()) for n, t in model.named_buffers(remove_duplicate=False)},
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "grad": [(id(p.grad), p.grad.clone()) for p in model.parameters()],
        "attributes": [
            {k: tuple(map(id, v)) if isinstance(v, list | tuple) else id(v) for k, v in vars(m).items()}
            for m in model.modules()
        ],
        "requires": [p.requires_grad for p in model.parameters()],
        "random": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
        "meta": dict(problem.meta),
    }


def measured(problem):
    samples = draw(problem.data["train"], samples=ROWS, batch_size=7)
    checked = preflight(problem, samples)
    require_sound(checked)
    op = checked.operator
    return op, op @ torch.eye(op.size, dtype=torch.float64)


def test_products_are_those_of_the_users_own_module(problem):
    truth = dense(problem)
    _, found = measured(problem)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11 * float(truth.abs().max()))


def unchanged_by(problem, run):
    before = state(problem)
    run(problem)
    return same(state(problem), before)


def test_a_measurement_leaves_it_as_found(problem):
    assert unchanged_by(
        problem, lambda p: hessdiag.analyze(p, ["lambda_max", "trace"], max_steps=6, probes=2, density_probes=2)
    )


def clearing(model, batch):
    model.zero_grad()
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("make", [renormed, linear], ids=["rows renormed in forward", "gradients cleared"])
def test_what_the_users_code_rewrites_is_put_back(make):
    torch.manual_seed(5)
    model = make().double()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    data = {"train": (torch.randn(ROWS, FEATURES, dtype=torch.float64), torch.randint(CLASSES, (ROWS,)))}

    def run(asked):
        with contextlib.suppress(HessdiagError):
            hessdiag.analyze(asked, ["lambda_max"], max_steps=6)

    assert unchanged_by(Problem(model, data, loss=clearing, meta={}), run)


def stopped_by(error):
    def run(problem):
        op = Curvature(problem, draw(problem.data["train"], samples=ROWS, batch_size=7))
        calls = iter(range(99))

        def raising(module, inputs):
            if next(calls) > 0:
                raise error

        handle = next(m for m in problem.model.modules() if not list(m.children())).register_forward_pre_hook(
            raising
        )
        try:
            _ = op @ torch.ones(op.size, dtype=torch.float64)
        except type(error):
            pass
        finally:
            handle.remove()

    return run


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("in the middle"), RuntimeError("of torch")])
def test_a_stopped_measurement_leaves_it_as_found(problem, error):
    assert unchanged_by(problem, stopped_by(error))


def test_it_can_be_trained_on(problem):
    measured(problem)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in problem.model.parameters() if p.requires_grad]
    optimizer.zero_grad()
    F.cross_entropy(problem.model(problem.data["train"][0]), problem.data["train"][1]).backward()
    optimizer.step()
    after = [p for p in problem.model.parameters() if p.requires_grad]
    assert all(
        not torch.equal(a, b) for a, b in zip(before, after, strict=True) if b.grad is not None and b.grad.any()
    )


def by_functional_call(self, function, theta, batch):
    shell = Shell(self._model, function)
    tensors = {f"model.{name}": tensor for name, tensor in self.tensors(theta).items()}
    return torch.func.functional_call(shell, tensors, (batch,))


class Shell(nn.Module):
    def __init__(self, model, function):
        super().__init__()
        self.model, self._function = model, function

    def forward(self, batch):
        return self._function(self.model, batch)


def no_context(*_):
    return contextlib.nullcontext(lambda: None)


def with_functional_call(monkeypatch):
    monkeypatch.setattr(functional.Functional, "_call", by_functional_call)
    monkeypatch.setattr(functional, "left_as_found", no_context)


BROKEN = {
    "torch's own functional_call": (shared, with_functional_call),
    "attributes are not put back": (pruned, lambda m: m.setattr(functional, "left_as_found", no_context)),
    "a cache stays": (with_a_cache, lambda m: m.setattr(functional, "left_as_found", no_context)),
    "random states are not put back": (drawing, lambda m: m.setattr(functional, "random_states", no_context)),
    "recomputation is left on": (
        lambda: checkpointed(False),
        lambda m: m.setattr(functional, "kept_activations", no_context),
    ),
    "nobody looks past the module": (
        in_a_closure,
        lambda m: m.setattr(functional.Functional, "_reached_past", lambda *_: ()),
    ),
}


@pytest.mark.parametrize(("make", "breakage"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(make, breakage, monkeypatch):
    torch.manual_seed(5)
    model = make().double()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    data = (torch.randn(ROWS, FEATURES, dtype=torch.float64), torch.randint(CLASSES, (ROWS,)))
    subject = Problem(model, {"train": data}, criterion="cross_entropy")
    truth = dense(subject)
    breakage(monkeypatch)

    before = state(subject)
    try:
        found = measured(subject)[1]
        kept = same(state(subject), before)
    except (RuntimeError, KeyError, AttributeError, HessdiagError):
        return
    right = torch.allclose(found, truth, rtol=1e-9, atol=1e-11 * float(truth.abs().max()))
    assert not (right and kept)
