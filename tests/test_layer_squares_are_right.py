"""Promise: squares of per-example gradients from captured layers are those of the gradients themselves.

Oracle: one backward pass of plain autograd per example and column, in float64, written without hessdiag.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag.criteria import Criterion
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.squares import captured, layer_squares, loss_roots, pullbacks
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.engine.squares.pullbacks import Pullbacks
from hessdiag.problem import Problem
from tests import models

EXAMPLES = 9
COLUMNS = 3
TOLERANCE = 1e-9  # relative to a tensor's largest: sums of some hundred products in float64


class Net(nn.Module):
    """Named layers and a forward of one's own."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._forward(self, x)


class Scaled(nn.Linear):
    """Not the linear layer its base is."""

    def forward(self, x):
        return 2 * super().forward(x) + x.sum(-1, keepdim=True)


def tokens(length=6, words=7):
    return torch.randint(0, words, (EXAMPLES, length), generator=models.generator(4))


def settled(model, *shape):
    """BatchNorm with statistics worth having."""
    model.double()(models.randn(30, *shape, seed=9))
    return model, models.randn(EXAMPLES, *shape)


def seq(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), models.randn(EXAMPLES, 5)


def image(*layers, size=7, channels=4):
    return seq(*layers), models.randn(EXAMPLES, channels, size, size)


def signal(*layers):
    return seq(*layers), models.randn(EXAMPLES, 4, 11)


def tied():
    def forward(m, x):
        return m.head(torch.tanh(m.mix(m.embed(x))))

    net = Net(forward, embed=nn.Embedding(7, 4), mix=nn.Linear(4, 4), head=nn.Linear(4, 7, bias=False))
    net.head.weight = net.embed.weight
    return net, tokens()


def positions(ids):
    def forward(m, x):
        places = torch.arange(x.shape[1])
        return m.head(torch.tanh(m.embed(x) + m.place(places[None] if ids == 2 else places)))

    return Net(forward, embed=nn.Embedding(7, 4), place=nn.Embedding(EXAMPLES, 4), head=nn.Linear(4, 3)), tokens(
        EXAMPLES
    )


def attention():
    def forward(m, x):
        h = m.norm(m.embed(x))
        q, k, v = (m.qkv(h)[..., i : i + 4] for i in (0, 4, 8))
        return m.head(m.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)))

    layers = {
        "embed": nn.Embedding(7, 4),
        "norm": nn.LayerNorm(4),
        "qkv": nn.Linear(4, 12),
        "out": nn.Linear(4, 4),
    }
    return Net(forward, **layers, head=nn.Linear(4, 7)), tokens()


def twice():
    def forward(m, x):
        return m.head(torch.tanh(m.shared(torch.tanh(m.shared(x)))))

    return Net(forward, shared=nn.Linear(5, 5), head=nn.Linear(5, 3)), models.randn(EXAMPLES, 4, 5)


def convolved_twice():
    def forward(m, x):
        return m.head(torch.tanh(m.shared(torch.tanh(m.shared(x)))).flatten(1))

    shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    return Net(forward, shared=shared, head=nn.Linear(100, 3)), models.randn(EXAMPLES, 4, 5, 5)


def frozen():
    model, x = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model, x


def expert():
    """The second is not asked by the first examples."""

    def forward(m, x):
        return torch.where(x[:, :1] > 0.2, m.second(x), m.first(x))

    return Net(forward, first=nn.Linear(5, 3), second=nn.Linear(5, 3)), models.randn(EXAMPLES, 5)


CAPTURED = {
    "in-place ReLU": mlp,
    "linear, many positions": lambda: (seq(nn.Linear(2, 3), nn.Tanh()), models.randn(EXAMPLES, 3, 8, 2)),
    "linear, few positions": lambda: (seq(nn.Linear(30, 20), nn.Tanh()), models.randn(EXAMPLES, 2, 30)),
    "stride, dilation, padding": lambda: image(nn.Conv2d(4, 3, (3, 2), (2, 1), (2, 1), (1, 2)), nn.ReLU(True)),
    "few places": lambda: image(nn.Conv2d(4, 16, 3), nn.Tanh(), size=4),
    "groups, same padding": lambda: image(nn.Conv2d(4, 8, (4, 3), padding="same", groups=2, bias=False)),
    "depthwise": lambda: image(nn.Conv2d(4, 4, 3, padding="valid", groups=4), nn.Tanh()),
    "circular and reflected": lambda: image(
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 2, 3, padding=2, padding_mode="reflect"),
    ),
    "one dimension": lambda: signal(nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=1, groups=2), nn.Tanh()),
    "padding_idx": lambda: (seq(nn.Embedding(7, 4, padding_idx=2), nn.Tanh()), tokens()),
    "LayerNorm": lambda: (seq(nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm((6, 4))), models.randn(EXAMPLES, 6, 4)),
    "RMSNorm": lambda: (seq(nn.RMSNorm(4), nn.Tanh()), models.randn(EXAMPLES, 3, 6, 4)),
    "GroupNorm": lambda: image(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 2), nn.GroupNorm(4, 4, eps=0.1), nn.Tanh()),
    "BatchNorm": lambda: settled(seq(nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.ReLU(True)), 4, 6, 6),
    "BatchNorm, one dimension": lambda: settled(seq(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()), 5),
    "tied embedding and head": tied,
    "positions without examples": lambda: positions(1),
    "positions of one example": lambda: positions(2),
    "attention": attention,
    "called twice": twice,
    "convolution called twice": convolved_twice,
    "frozen tensors": frozen,
    "two experts": expert,
}


def bare():
    def forward(m, x):
        return m.head(torch.tanh(x @ m.w)) * m.scale

    layers = {"w": nn.Parameter(models.randn(5, 4)), "scale": nn.Parameter(models.randn(3))}
    return Net(forward, **layers, head=nn.Linear(4, 3)), models.randn(EXAMPLES, 5)


def by_hand():
    """A layer's weight used once more without the layer."""

    def forward(m, x):
        return m.head(torch.tanh(m.layer(x)) + F.linear(x, m.layer.weight))

    return Net(forward, layer=nn.Linear(5, 4), head=nn.Linear(4, 3)), models.randn(EXAMPLES, 5)


def lying():
    return nn.Sequential(Scaled(5, 6), nn.Tanh(), nn.Linear(6, 3)), models.randn(EXAMPLES, 5)


def patched():
    model, x = mlp()
    original = model[0].forward
    model[0].forward = lambda x: original(3 * x)
    return model, x


def parametrised():
    model, x = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model, x


def windows():
    """Positions folded into examples."""

    def forward(m, x):
        return m.head(torch.tanh(m.inner(x.reshape(-1, 5))).reshape(len(x), -1))

    return Net(forward, inner=nn.Linear(5, 2), head=nn.Linear(8, 3)), models.randn(EXAMPLES, 4, 5)


def volume():
    return seq(nn.Conv3d(2, 3, 2), nn.Tanh()), models.randn(EXAMPLES, 2, 3, 3, 3)


def torch_attention():
    def forward(m, x):
        return m.head(m.mix(x, x, x, need_weights=False)[0])

    mix = nn.MultiheadAttention(4, 2, batch_first=True)
    return Net(forward, mix=mix, head=nn.Linear(4, 3)), models.randn(EXAMPLES, 5, 4)


SLOW = {  # name: (subject, the tensors that go by per-example gradients)
    "parameters of no layer": (bare, {"w", "scale"}),
    "a weight used by hand, too": (by_hand, {"layer.weight"}),
    "a layer with another forward": (lying, {"0.weight", "0.bias"}),
    "a patched layer": (patched, {"0.weight", "0.bias"}),
    "weight norm": (
        parametrised,
        {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    ),
    "positions folded into examples": (windows, {"inner.weight", "inner.bias"}),
    "a layer that is not known": (volume, {"0.weight", "0.bias"}),
    "torch's attention": (
        torch_attention,
        {"mix.in_proj_weight", "mix.in_proj_bias", "mix.out_proj.weight", "mix.out_proj.bias"},
    ),
}


def problem(make):
    torch.manual_seed(3)
    model, x = make()
    model = model.double()
    model.eval()
    with torch.no_grad():
        outputs = model(x)
    for parameter in model.parameters():  # biases and norms that begin at 0 and 1 hide mistakes
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.zero_grad()
    labels = models.labels(outputs[..., 0].numel(), outputs.shape[-1]).view(outputs.shape[:-1])
    return Problem(model, {"train": (x, labels)}, criterion="cross_entropy")


operator = functools.partial(models.operator, batch_size=EXAMPLES)


def truth(model, x, columns):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.zeros(*columns.shape[:2], len(parameters), dtype=torch.float64)
    for n in range(len(x)):
        outputs = model(x[n : n + 1])[0]
        for c in range(columns.shape[1]):
            slopes = torch.autograd.grad(outputs, parameters, columns[n, c], retain_graph=True, allow_unused=True)
            found[n, c] = torch.stack([outputs.new_zeros(()) if s is None else s.square().sum() for s in slopes])
    return found


def measured(make, columns=COLUMNS) -> tuple[Pullbacks, float]:
    """How it was done, and the largest error of any tensor, relative to its largest square."""
    subject = problem(make)
    op = operator(subject)
    (piece,) = op.batches
    with op.timed():
        pulled = pullbacks.pullbacks(op)
        forward = pulled.forward(piece)
        cotangents = models.randn(EXAMPLES, columns, *forward.outputs.shape[1:], seed=5)
        found = pulled.squares(forward, piece, cotangents)
    true = truth(subject.model, piece[0], cotangents)
    scale = true.flatten(0, 1).amax(0).clamp(min=1e-12)
    return pulled, float(((found - true).abs().flatten(0, 1).amax(0) / scale).max())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("columns", [1, COLUMNS])
@pytest.mark.parametrize("name", CAPTURED)
def test_captured_layers_give_the_squares(name, columns):
    pulled, off = measured(CAPTURED[name], columns)
    assert not pulled.slow
    assert pulled.reasons == []
    assert off < TOLERANCE


@pytest.mark.parametrize("name", SLOW)
def test_what_is_no_known_layer_goes_by_gradients(name):
    make, names = SLOW[name]
    pulled, off = measured(make)
    assert {pulled.function.names[i] for i in pulled.slow} == names
    assert off < TOLERANCE


@pytest.mark.parametrize(
    "name", ["stride, dilation, padding", "tied embedding and head", "attention", "few places"]
)
def test_memory_does_not_change_the_squares(name, monkeypatch):
    for room in (pullbacks, layer_squares):
        for limit in ("CHUNK_BYTES", "GRADIENTS_BYTES"):
            if hasattr(room, limit):
                monkeypatch.setattr(room, limit, 1)
    pulled, off = measured(CAPTURED[name])
    assert not pulled.slow
    assert off < TOLERANCE


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


def doubled():
    return nn.Sequential(Doubled(5, 6), nn.Tanh(), nn.Linear(6, 3)), models.randn(EXAMPLES, 5)


def test_a_tensor_that_disagrees_goes_by_gradients_and_a_note_says_so(monkeypatch):
    monkeypatch.setattr(captured, "LAYERS", frozenset({*captured.LAYERS, Doubled}))
    pulled, off = measured(doubled)
    assert {pulled.function.names[i] for i in pulled.slow} == {"0.weight"}
    assert off < TOLERANCE
    op = operator(problem(doubled))
    gauss_newton_trace(op)
    assert [note for note in op.notes if "0.weight" in note and "\n" not in note]


def test_a_model_that_cannot_be_captured_is_still_right(monkeypatch):
    def fails(*_):
        raise RuntimeError("hooks are not for this one")

    monkeypatch.setattr(pullbacks, "capture", fails)
    pulled, off = measured(mlp)
    assert pulled.all_slow
    assert "hooks are not for this one" in pulled.reasons[0]
    assert off < TOLERANCE


def test_what_fails_later_is_done_again_by_gradients(monkeypatch):
    subject = problem(CAPTURED["attention"])
    true = gauss_newton_trace(operator(subject), draws=3).draws.numpy()
    original, calls = pullbacks.capture, []

    def fails_in_the_end(*arguments):
        calls.append(arguments)
        if len(calls) > 4:  # two captures to learn the roles, one to check them, one batch
            raise RuntimeError("another shape")
        return original(*arguments)

    monkeypatch.setattr(pullbacks, "capture", fails_in_the_end)
    op = operator(subject, batch_size=5)
    assert gauss_newton_trace(op, draws=3).draws.numpy() == pytest.approx(true, rel=1e-10)
    assert len(calls) == 5
    assert "another shape" in op.notes[0]


def test_a_backward_that_cannot_be_batched_goes_column_by_column(monkeypatch):
    original = torch.autograd.grad

    def grad(*arguments, is_grads_batched=False, **options):
        if is_grads_batched:
            raise RuntimeError("Batching rule not implemented")
        return original(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    pulled, off = measured(CAPTURED["BatchNorm"])
    assert not pulled.batched
    assert not pulled.slow
    assert off < TOLERANCE


def test_nothing_of_the_model_is_left_changed():
    subject = problem(CAPTURED["attention"])
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    gauss_newton_trace(operator(subject))
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in subject.model.named_parameters())
    assert not any(module._forward_hooks for module in subject.model.modules())


@pytest.mark.parametrize("batch_size", [2, 4, EXAMPLES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["attention", "BatchNorm", "positions without examples"])
def test_the_trace_is_the_dense_one(name, dtype, batch_size):
    """Exactly where there are few outputs; and batches of any size, one of 4 examples and 4 positions included."""
    subject = problem(CAPTURED[name])
    found = gauss_newton_trace(operator(subject, dtype=dtype, batch_size=batch_size), draws=2)
    reference = Curvature(subject, models.sample(subject, EXAMPLES), kind="ggn", dtype=torch.float64)
    if found.exact:
        true = float(reference.dense().trace())
        assert float(found.draws[0]) == pytest.approx(true, rel=1e-10 if dtype == torch.float64 else 1e-5)
    else:
        whole = gauss_newton_trace(operator(subject), draws=2)
        assert found.draws.numpy() == pytest.approx(whole.draws.numpy(), rel=1e-4)


def soft():
    targets = models.randn(5, 4, seed=2).abs()
    return models.randn(5, 4), targets, "cross_entropy"


def classes_second():
    targets = models.labels(5 * 6, 3).view(5, 2, 3)
    targets[:, 0, 1] = -100
    return 3 * models.randn(5, 3, 2, 3), targets, "cross_entropy"


def next_tokens():
    labels = torch.randint(4, (5, 3), generator=models.generator(4))
    labels[1, 1:] = -100
    return labels


ROOTS = {
    "labels": lambda: (models.randn(5, 4), models.labels(5, 4), "cross_entropy"),
    "a confident model": lambda: (300 * models.randn(5, 4), models.labels(5, 4), "cross_entropy"),
    "soft targets": soft,
    "classes second, some ignored": classes_second,
    "soft targets, classes second": lambda: (
        models.randn(5, 3, 2),
        2 * models.randn(5, 3, 2, seed=2).softmax(1),
        "cross_entropy",
    ),
    "next tokens, some ignored": lambda: (models.randn(5, 3, 4), next_tokens(), "causal_lm"),
    "squared error": lambda: (models.randn(5, 2, 3), models.randn(5, 2, 3, seed=2), "mse"),
}


def root_is_off(outputs, targets, criterion) -> float:
    subject = Problem(nn.Linear(1, 1), {"train": (outputs, targets)}, criterion=criterion)
    found = loss_roots.root(subject, outputs, (outputs, targets)).flatten(2)
    off = 0.0
    for n in range(len(outputs)):
        true = torch.autograd.functional.hessian(
            lambda o, n=n: subject.loss_sum(o, (None, targets[n : n + 1])), outputs[n : n + 1]
        ).reshape(found.shape[2], -1)
        off = max(off, float((found[n].T @ found[n] - true).abs().max()))
    return off


@pytest.mark.parametrize("name", ROOTS)
def test_the_root_of_a_loss_is_its_hessians(name):
    assert root_is_off(*ROOTS[name]()) < 1e-12


def test_targets_that_sum_to_less_than_nothing_have_no_root():
    outputs, targets, criterion = soft()
    subject = Problem(nn.Linear(1, 1), {"train": (outputs, -targets)}, criterion=criterion)
    assert loss_roots.root(subject, outputs, (outputs, -targets)) is None


def unchecked(patch):
    patch.setattr(pullbacks, "_check", lambda found, piece: None)


def replaced(room, name, change):
    def apply(patch):
        unchecked(patch)
        patch.setattr(room, name, change(getattr(room, name)))

    return apply


class Agreeing(dict):
    """Counts whatever is expected."""

    def update(self, *_):
        pass

    def __getitem__(self, _):
        return self

    def __eq__(self, _):
        return True


BROKEN = {  # name: (what is broken, a subject that must notice)
    "groups are forgotten": (
        replaced(layer_squares, "_product_squares", lambda f: lambda d, a: f(d.sum(2, True), a.sum(1, True))),
        CAPTURED["depthwise"],
    ),
    "the padding's row counts": (
        replaced(layer_squares, "_without_padding", lambda f: lambda u, s, some=None: s),
        CAPTURED["padding_idx"],
    ),
    "each place is an id of its own": (
        replaced(
            layer_squares,
            "_placed",
            lambda f: lambda use, slopes, first: f(use, slopes, torch.arange(first.shape[1]).expand(first.shape)),
        ),
        attention,
    ),
    "positions are squared one by one": (
        replaced(layer_squares, "_over_positions", lambda f: lambda m, s: f(m, s.square()).sqrt()),
        CAPTURED["LayerNorm"],
    ),
    "the norm's affine part is kept": (
        replaced(layer_squares, "_normalized", lambda f: lambda call, entry: 1.1 * f(call, entry)),
        CAPTURED["BatchNorm"],
    ),
    "the second call is forgotten": (
        replaced(pullbacks, "squares", lambda f: lambda uses: f(uses[:1])),
        CAPTURED["convolution called twice"],
    ),
    "the graph is not asked who else uses a tensor": (
        replaced(captured, "Counter", lambda _: Agreeing),
        by_hand,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch):
    breakage, make = BROKEN[name]
    assert measured(make)[1] < TOLERANCE
    breakage(monkeypatch)
    pulled, off = measured(make)
    assert not pulled.slow
    assert off > TOLERANCE


BROKEN_ROOTS = {
    "the row's weight is not its root": (
        replaced(Criterion, "sizes", lambda f: lambda self, labels: f(self, labels) ** 2),
        soft,
    ),
    "ignored places count": (
        replaced(Criterion, "sizes", lambda f: lambda self, labels: torch.ones_like(f(self, labels))),
        classes_second,
    ),
    "no projection": (
        replaced(loss_roots, "_applied", lambda f: lambda _, outputs, targets, z: outputs.softmax(-1).sqrt() * z),
        soft,
    ),
}


@pytest.mark.parametrize("name", BROKEN_ROOTS)
def test_a_wrong_root_would_be_noticed(name, monkeypatch):
    breakage, make = BROKEN_ROOTS[name]
    breakage(monkeypatch)
    assert root_is_off(*make()) > 1e-6
