"""Promise: products formed block by block are exact, hold one block's graph, and are refused without a stack.

Oracles: a dense float64 Hessian, and double backward of the whole loss, both without hessdiag. About 20 s.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessdiag
from hessdiag.engine.products import streaming
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.methods import METHODS
from hessdiag.errors import HessdiagError, MeasurementError
from hessdiag.problem import Problem
from tests import models
from tests.models import same
from tests.test_model_is_left_as_found import state

TOLERANCE = {torch.float64: 1e-11}  # relative to the largest entry; in float32 what `models.rounding` says
DTYPES = [torch.float32, torch.float64]
WIDTH, LENGTH, VOCABULARY, LAYERS = 4, 5, 7, 3


class Block(nn.Module):
    """Pre-norm causal attention and GELU MLP; may take a mask, and may return its attention too."""

    def __init__(self, returns="tensor"):
        super().__init__()
        self.norm, self.again = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU(), nn.Linear(5, WIDTH))
        self.returns = returns

    def forward(self, x, mask=None):
        q, k, v = self.qkv(self.norm(x)).split(WIDTH, -1)
        weights = None
        if self.returns == "tuple":
            weights = (q @ k.mT / 2 - 1e9 * torch.ones(LENGTH, LENGTH, dtype=x.dtype).triu(1)).softmax(-1)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(mixed)
        x = x + self.mlp(self.again(x))
        return (x, weights) if self.returns == "tuple" else x


class KeyCache:
    """Where transformers keep what blocks have seen."""


class Transformer(nn.Module):
    """Embeddings with positions, blocks, final norm, a head tied to the embeddings; variants by name."""

    def __init__(self, variant="", block=Block):
        super().__init__()
        self.variant = variant
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(block("tuple") if variant == "tuple" else block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens):
        first = x = self.token(tokens) + self.position(torch.arange(LENGTH))
        kept = []
        for layer in self.layers:
            if self.variant == "mask":  # the first token is never seen but by itself
                mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
                mask = mask & ((tokens != tokens[:, :1])[:, None, :] | torch.eye(LENGTH, dtype=torch.bool))
                x = layer(x, mask=mask)
            elif self.variant == "tuple":
                x, weights = layer(x)
                kept.append(weights)
            elif self.variant == "depends":
                x = layer(x, mask=self.position.weight @ self.position.weight.T)
            elif self.variant == "scaled":
                x = 2 * layer(x)
            elif self.variant == "cache":
                x = layer(x, KeyCache())
            elif self.variant == "keyword":
                x = layer(x=x)
            else:
                x = layer(x)
            kept.append(x)
        if self.variant == "twice":
            x = self.layers[0](x)
        if self.variant == "all layers":
            x = sum(kept)
        if self.variant == "attention in the loss":
            x = x * self.layers[0].norm.weight
        if self.variant == "skip":
            x = x + first
        return self.head(self.norm(x))


class Residual(nn.Module):
    """Has statistics of its own, and may write into what it is given."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm.running_mean.normal_(generator=models.generator(3))

    def forward(self, x):
        kept = x.clone()
        return kept + torch.tanh(self.linear(self.norm(x.mul_(self.factor) if self.factor != 1 else x)))


class Odd(torch.autograd.Function):
    """x · sigmoid(x) without forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return slope * (s + x * s * (1 - s))


class OddBlock(Block):
    def forward(self, x, mask=None):
        return x + Odd.apply(self.out(self.norm(x)))


def characters(model, **options):
    """Next-token loss with padded targets, so that tokens and not examples are averaged."""
    tokens = torch.randint(0, VOCABULARY, (9, LENGTH), generator=models.generator(6))
    targets = tokens.roll(-1, 1)
    for row in range(9):
        targets[row, LENGTH - row % 4 :] = -100
    return Problem(model, {"train": (tokens, targets)}, criterion="cross_entropy", **options)


def transformer(variant="", **options):
    torch.manual_seed(5)
    return characters(Transformer(variant, options.pop("block", Block)).double(), **options)


def vectors(*layers, **options):
    return Problem(
        nn.Sequential(*layers).double(), {"train": (models.randn(12, WIDTH), models.labels(12, 3))}, **options
    )


def sequential():
    torch.manual_seed(6)
    return vectors(
        nn.Linear(WIDTH, WIDTH), *(Residual(1.5) for _ in range(4)), nn.Linear(WIDTH, 3), criterion="cross_entropy"
    )


def bare_stack():
    """Data go straight into the first block, and the last block's output is the model's."""
    torch.manual_seed(7)
    data = {"train": (models.randn(12, WIDTH), models.randn(12, WIDTH, seed=2))}
    return Problem(nn.Sequential(*(Residual() for _ in range(3))).double(), data, criterion="mse")


def shared():
    """A weight that the embeddings and two blocks have in common, and one that no block is without."""
    problem = transformer()
    layers = problem.model.layers
    layers[0].out.weight = problem.model.position.weight = nn.Parameter(models.randn(WIDTH, WIDTH) / 2)
    problem.model.position.weight = nn.Parameter(models.randn(LENGTH, WIDTH) / 2)
    layers[2].out.weight = layers[0].out.weight
    layers[1].norm.bias = problem.model.norm.bias
    return problem


SUBJECTS = {
    "tied head": transformer,
    "masks as keywords": lambda: transformer("mask"),
    "blocks that return tuples": lambda: transformer("tuple"),
    "a skip around all blocks": lambda: transformer("skip"),
    "shared weights": shared,
    "no forward mode": lambda: transformer(block=OddBlock),
    "nn.Sequential": sequential,
    "nothing but blocks": bare_stack,
    "two blocks named": lambda: transformer(blocks=["layers.1", "layers.2"]),
    "one block named": lambda: transformer(blocks="layers.1"),
}


operator = functools.partial(models.operator, method="layer_streamed", batch_size=5)


def off(product, truth):
    """Largest error relative to the largest entry."""
    return float((product.double() - truth).abs().max() / truth.abs().max())


def rows(op):
    return models.randn(op.size, 2, seed=11)


@cache
def dense(make):
    return models.dense_hessian(make())


def by_double_backward(problem, V):
    """H V of the whole mean loss in float64, without hessdiag."""
    model, (inputs, targets) = problem.model.eval(), problem.data["train"]
    named = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = model(inputs.clone())
        if problem.criterion == "mse":
            loss = (outputs - targets).square().mean()
        else:
            loss = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        slopes = torch.autograd.grad(loss, named, create_graph=True, materialize_grads=True)
        slope = torch.cat([piece.flatten() for piece in slopes])
        products = [torch.autograd.grad(slope, named, v, retain_graph=True, materialize_grads=True) for v in V.T]
    return torch.stack([torch.cat([piece.flatten() for piece in product]) for product in products], dim=1)


@cache
def room(make, dtype):
    """The tolerance of a product, relative to its largest entry."""
    if dtype in TOLERANCE:
        return TOLERANCE[dtype]
    op = operator(make())
    return models.rounding(make, lambda problem: by_double_backward(problem, rows(op)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [transformer, sequential], ids=lambda make: make.__name__)
def test_products_are_those_of_the_dense_hessian(make, dtype):
    op = operator(make(), dtype=dtype)
    assert off(op @ rows(op), dense(make) @ rows(op)) < room(make, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_products_are_those_of_double_backward(name, dtype):
    problem = SUBJECTS[name]()
    op = operator(problem, dtype=dtype)
    assert off(op @ rows(op), by_double_backward(problem, rows(op))) < room(SUBJECTS[name], dtype)


@pytest.mark.parametrize("kind", ["ggn", "residual"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_products_are_those_of_the_whole_graph(name, kind):
    problem = SUBJECTS[name]()
    whole, streamed = (operator(problem, kind, method=method) for method in ("retained_graph", "layer_streamed"))
    whole, streamed = whole @ rows(whole), streamed @ rows(streamed)
    assert float((streamed - whole).norm() / whole.norm()) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "globs",
    [("layers.1.*",), ("!layers.*",), ("!token.*", "!position.*", "!layers.0.*"), ("norm.*",), ("position.*",)],
    ids=" ".join,
)
def test_some_of_the_parameters_give_their_block_of_the_hessian(globs, frozen):
    problem, H = transformer(), dense(transformer)
    named = dict(problem.model.named_parameters())
    problem.params = globs
    chosen = problem.parameter_names()
    if frozen:
        problem.params = ("*",)
        for name, parameter in named.items():
            parameter.requires_grad_(name in chosen)
    kept = torch.cat([torch.full((p.numel(),), name in chosen) for name, p in named.items()])
    op, G = operator(problem), operator(problem, "ggn")
    known = operator(problem, "ggn", method="retained_graph")
    assert off(op @ rows(op), H[kept][:, kept] @ rows(op)) < TOLERANCE[torch.float64]
    assert off(G @ rows(op), known @ rows(op)) < TOLERANCE[torch.float64]


def test_an_analysis_passes_its_self_test():
    analysis = hessdiag.analyze(transformer(), quantities=("lambda_max",), method="layer_streamed", batch_size=9)
    truth = float(torch.linalg.eigvalsh(dense(transformer))[-1])
    assert analysis.metrics["lambda_max"].value == pytest.approx(truth, rel=1e-3)  # what analyze certifies


def live_bytes(layers):
    """Most bytes that graphs hold at a time, in one product of a stack of linear maps and tanh."""
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH)) for _ in range(layers)]
    problem = vectors(*parts, nn.Linear(WIDTH, 3), criterion="cross_entropy")
    op = operator(problem, batch_size=12)
    held = peak = 0

    class Held:
        def __init__(self, tensor):
            nonlocal held, peak
            self.tensor, size = tensor.detach(), tensor.nbytes
            held += size
            peak = max(peak, held)
            weakref.finalize(self, freed, size)

    def freed(size):
        nonlocal held
        held -= size

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            _ = op @ torch.ones(op.size, dtype=torch.float64)
    finally:
        gc.enable()
    assert held == 0  # nothing waits for the garbage collector
    return peak


def test_the_graphs_held_do_not_grow_with_the_number_of_blocks():
    assert live_bytes(12) < 1.05 * live_bytes(3)


def subject():
    problem = transformer()
    problem.model.train()
    problem.model.layers[1].eval()
    problem.model.layers[0].register_forward_hook(lambda *_: None)
    inputs, targets = problem.data["train"]
    F.cross_entropy(problem.model(inputs).flatten(0, 1), targets.flatten()).backward()
    return problem


def anatomy(model):
    """The modules themselves, and every attribute of each."""
    return [
        (name, id(module), {k: id(v) for k, v in vars(module).items()}) for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails):
    problem = subject()
    # what hangs at a module is looked at too: children, hooks, a forward of its own
    children = {name: dict(module._modules) for name, module in problem.model.named_modules()}
    before, shape = state(problem.model), anatomy(problem.model)
    op = operator(problem)
    if fails:
        layer, calls = problem.model.layers[2], iter(range(100))

        def failing(*_):
            if next(calls) > 3:
                raise ValueError("in the middle")

        handle = layer.register_forward_pre_hook(failing)
        with pytest.raises(ValueError, match="in the middle"):
            _ = op @ models.randn(op.size)
        handle.remove()
    else:
        _ = op @ models.randn(op.size)
    assert same(state(problem.model), before)
    assert anatomy(problem.model) == shape
    assert {name: dict(module._modules) for name, module in problem.model.named_modules()} == children


def penalized():
    def loss(model, batch):
        fit = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
        return fit + sum(p.square().sum() for p in model.parameters())

    problem = transformer()
    return Problem(problem.model, problem.data, loss=loss)


def cached():
    """A block that remembers what it saw."""

    class Forgetful(Block):
        def forward(self, x, mask=None):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x) * (1 + 0.1 * self.calls)

    return transformer(block=Forgetful)


def attached():
    """A forward of the model's own that knows its blocks by another way than through the model."""
    problem = transformer()
    problem.model.forward = problem.model.forward
    return problem


REFUSED = {
    "no stack": (models.mlp, "ModuleList or Sequential"),
    "another way in": (attached, "is not called"),
    "called twice": (lambda: transformer("twice"), "layers.0 is called twice"),
    "something between": (lambda: transformer("scaled"), "layers.1 does not get what layers.0 gives"),
    "a mask with parameters": (lambda: transformer("depends"), "further tensor"),
    "the stream as a keyword": (lambda: transformer("keyword"), "first positional"),
    "layers in between are used": (lambda: transformer("all layers"), "before the last"),
    "a weight is used apart": (lambda: transformer("attention in the loss"), "layers.0.norm"),
    "a penalty on the weights": (penalized, "otherwise than by calling"),
    "a block with a memory": (cached, "again|second time|otherwise"),
    "a cache": (lambda: transformer("cache"), "gets a KeyCache"),
    "a wrong name": (lambda: transformer(blocks=["layers.0", "layers.9"]), "no module 'layers.9'"),
    "names in a wrong order": (lambda: transformer(blocks=["layers.1", "layers.0"]), "out of turn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_stack_is_refused_in_one_line(name):
    make, words = REFUSED[name]
    problem = make()
    op = operator(problem)
    with pytest.raises(HessdiagError, match=words) as refused:
        _ = op @ models.randn(op.size)
    text = str(refused.value)
    assert "\n" not in text
    assert "it needs" in text or "allowed: " in text
    if isinstance(refused.value, MeasurementError):
        assert "`method='layer_streamed'`" in text
        assert "`method='auto'`" in text


def test_what_else_a_forward_asks_of_its_blocks_is_answered():
    class Asking(Transformer):
        def forward(self, tokens):
            assert all(layer.returns == "tensor" and not hasattr(layer, "nothing") for layer in self.layers)
            return super().forward(tokens)

    torch.manual_seed(5)
    problem = characters(Asking().double())
    op = operator(problem)
    assert off(op @ rows(op), by_double_backward(problem, rows(op))) < TOLERANCE[torch.float64]


def test_a_copy_of_the_model_is_another_model():
    """What was found out about one model is not taken for granted of another."""
    problem = transformer()
    other = Problem(copy.deepcopy(problem.model), problem.data, criterion="cross_entropy")
    other.model.layers[0].mlp[0].weight.data.mul_(2)
    for each in (problem, other):
        function = Functional(each)
        batch = function.place(each.data["train"])
        vectors = models.randn(2, function.size)
        with function.measuring():
            whole = METHODS["retained_graph"](function, "hessian", batch, vectors)
            streamed = METHODS["layer_streamed"](function, "hessian", batch, vectors)
        assert float((streamed - whole).norm() / whole.norm()) < TOLERANCE[torch.float64]


def _drop_a_block(monkeypatch):
    original, calls = streaming._Sweep._add, iter(range(1000))
    monkeypatch.setattr(
        streaming._Sweep, "_add", lambda self, *a: None if next(calls) == 2 else original(self, *a)
    )


def _change(monkeypatch, name, change):
    original = getattr(streaming, name)
    monkeypatch.setattr(streaming, name, lambda *a, **k: change(original, *a, **k))


def _drop_the_source(monkeypatch):
    original = streaming._Sweep._head

    def head(self, *arguments):
        found = original(self, *arguments)
        self._source = None
        return found

    monkeypatch.setattr(streaming._Sweep, "_head", head)


def _nothing_moves(original, call, primals, along):
    output, moves = original(call, primals, along)
    return output, [torch.zeros_like(move) for move in moves]


def _without_slopes_changes(original, y, inputs, slope, moves, along, **options):
    return original(y, inputs, slope, None if moves is None else [0 * m for m in moves], along, **options)


def _without_curvature(original, y, inputs, slope, moves, along, **options):
    still = along if moves is None else [tuple(torch.zeros_like(t) for t in ts) for ts in along]
    return original(y, inputs, slope, moves, still, **options)


def _the_first_vector_for_all(original, y, inputs, slope, moves, along, **options):
    return original(y, inputs, slope, moves, [along[0]] * len(along), **options)


BROKEN = {
    "a block's part is left out": _drop_a_block,
    "the embeddings' part is left out": _drop_the_source,
    "changes are not passed on from block to block": lambda m: _change(m, "push_forward", _nothing_moves),
    "changes do not leave the embeddings": lambda m: _change(m, "push", lambda f, *a: [0 * x for x in f(*a)]),
    "changes of the slope are dropped": lambda m: _change(m, "pull", _without_slopes_changes),
    "blocks count as linear": lambda m: _change(m, "pull", _without_curvature),
    "all vectors are the first": lambda m: _change(m, "pull", _the_first_vector_for_all),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    problem = transformer()
    op = operator(problem)
    truth = by_double_backward(problem, rows(op))
    breakage(monkeypatch)
    assert off(op @ rows(op), truth) > 1e3 * TOLERANCE[torch.float64]


def test_this_promise_would_notice_graphs_that_are_kept(monkeypatch):
    kept = []
    _change(monkeypatch, "pull", lambda f, *a, **k: (kept.append(a), f(*a, **{**k, "last": False}))[1])
    with pytest.raises(AssertionError):
        test_the_graphs_held_do_not_grow_with_the_number_of_blocks()


def test_this_promise_would_notice_a_stack_that_is_none(monkeypatch):
    monkeypatch.setattr(streaming, "refuse", lambda why: None)
    with pytest.raises(pytest.fail.Exception):
        test_what_is_no_stack_is_refused_in_one_line("something between")
