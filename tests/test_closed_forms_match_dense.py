"""Promise: the closed form is the dense Hessian's tr H, tr H² and gradient, to 1e-10. (15 s)"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.analysis import analyze
from hessdiag.check import change
from hessdiag.check.baseline_text import rounded
from hessdiag.check.recorded import Recorded
from hessdiag.closed_form import ThreeLayer, activation, linear, network, pairwise, plan, three_layer
from hessdiag.closed_form.gradient import Gradients
from hessdiag.errors import UsageError
from hessdiag.problem import Problem
from hessdiag.spectral import blockwise_ws
from tests.models import draws

TOLERANCE = 1e-10  # sums of a few hundred terms in float64: 1e-14 measured
FUNCTIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "identity": lambda a: a,
}
OTHERS = {"mish": F.mish, "elu": F.elu, "sin": torch.sin}  # by the engine's derivatives
QUANTITIES = ("trace", "frobenius_squared", "ws_upper", "ws_lower", "ws_spread", "ws_span")
ORDERS = ("pairwise", "linear")
Batches = list[tuple[Tensor, Tensor]]


def case(name="tanh", biases=(True, True), seed=0, d=4, h=5, C=3, n=17, counted=(True,) * 4) -> tuple:
    """A network, data in ragged batches, and the activation as torch has it."""
    R = draws(seed)
    function = FUNCTIONS.get(name) or OTHERS[name]
    given = activation(name if name in FUNCTIONS else function)
    hidden, hidden_bias, output, output_bias = R(h, d), R(h), R(C, h), R(C)
    net = ThreeLayer(
        hidden, hidden_bias if biases[0] else None, output, output_bias if biases[1] else None, given, counted
    )
    x, y = R(n, d), torch.randint(0, C, (n,), generator=torch.Generator().manual_seed(seed))
    return net, ragged(x, y), function


def ragged(x: Tensor, y: Tensor) -> Batches:
    return [(x[:9], y[:9]), (x[9:10], y[9:10]), (x[10:], y[10:])]


def loss_of(net: ThreeLayer, batches: Batches, function):
    """The mean loss as torch computes it, of all four tensors."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(tensors) -> Tensor:
        a = F.linear(x.flatten(1), tensors[0], tensors[1])
        z = F.linear(function(a), tensors[2], tensors[3])
        if y.is_floating_point():
            return -(y * F.log_softmax(z, 1)).sum() / len(y)
        return F.cross_entropy(z, y, ignore_index=-100)

    return loss


def dense(net: ThreeLayer, batches: Batches, function, tensors=None) -> Tensor:
    """The Hessian by the tensors that count, differentiable where ``tensors`` are."""
    tensors = list(net.tensors if tensors is None else tensors)
    live = [i for i, counts in enumerate(net.counts) if counts]
    flat = torch.cat([tensors[i].reshape(-1) for i in live])
    loss = loss_of(net, batches, function)

    def of(vector: Tensor) -> Tensor:
        pieces = torch.split(vector, [tensors[i].numel() for i in live])
        full = list(tensors)
        for i, piece in zip(live, pieces, strict=True):
            full[i] = piece.view_as(tensors[i])
        return loss(full)

    return torch.func.hessian(of)(flat)


def of_matrix(H: Tensor, quantity: str) -> Tensor:
    """The quantity from the matrix, written apart from what is tested."""
    P, t1, t2 = len(H), H.trace(), H.square().sum()
    s = (t2 / P - (t1 / P) ** 2).sqrt()
    return {
        "trace": t1,
        "frobenius_squared": t2,
        "ws_upper": t1 / P + s * (P - 1) ** 0.5,
        "ws_lower": t1 / P - s * (P - 1) ** 0.5,
        "ws_spread": s * (2 * P) ** 0.5,
        "ws_span": 2 * s * (P - 1) ** 0.5,
    }[quantity]


def off(net: ThreeLayer, batches: Batches, function, order: str) -> float:
    """Largest relative difference of any traces from the dense Hessian's."""
    H = dense(net, batches, function)
    found = three_layer(net, batches, order=order)
    pairs = [(found.trace, H.trace()), (found.frobenius_squared, H.square().sum())]
    sizes = [t.numel() if c else 0 for t, c in zip(net.tensors, net.counts, strict=True)]
    parts = torch.split(H.diagonal(), sizes)
    pairs += [(value, part.sum()) for value, part in zip(found.per_tensor, parts, strict=True)]
    first = sizes[0] + sizes[1]
    blocks = (H[:first, :first], H[first:, first:], H[:first, first:])
    pairs += [(value, block.square().sum()) for value, block in zip(found.blocks, blocks, strict=True)]
    scale = float(H.norm())
    return max(abs(value - float(true)) / max(scale, scale**2) for value, true in pairs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHERS])
def test_traces_of_every_activation(name: str, order: str):
    for biases in itertools.product((True, False), repeat=2):
        assert off(*case(name, biases), order) < TOLERANCE


@pytest.mark.parametrize("order", ORDERS)
def test_traces_of_every_set_of_tensors(order: str):
    for counted in itertools.product((True, False), repeat=4):
        if any(counted):
            assert off(*case(counted=counted, seed=1), order) < TOLERANCE


@pytest.mark.parametrize("order", ORDERS)
def test_shapes_and_targets(order: str):
    for seed, (d, h, C, n) in enumerate([(1, 1, 2, 11), (7, 2, 5, 12), (2, 6, 2, 30), (3, 4, 4, 1)]):
        net, batches, function = case("gelu", seed=seed, d=d, h=h, C=C, n=n)
        kept = [(x, y) for x, y in batches if len(y)]
        assert off(net, kept, function, order) < TOLERANCE
    net, batches, function = case(seed=3)
    soft = [(x, torch.rand(len(y), 3, dtype=torch.float64) + 0.1) for x, y in batches]  # sums unlike 1
    assert off(net, soft, function, order) < TOLERANCE
    holes = [(x, torch.where(torch.arange(len(y)) % 3 == 1, -100, y)) for x, y in batches]
    assert off(net, holes, function, order) < TOLERANCE
    images = [(x.view(-1, 2, 2), y) for x, y in batches]
    assert three_layer(net, images).trace == three_layer(net, batches).trace


@pytest.mark.parametrize("order", ORDERS)
def test_confident_networks_keep_their_digits(order: str):
    """At p = 1 − 1e-9, 1 − p has lost nine digits: the sums must not have."""
    net, batches, _ = case(seed=2)
    sharp = replace(net, output=0 * net.output, output_bias=torch.tensor([20.0, 0.0, 0.0], dtype=torch.float64))
    labelled = [(x, torch.zeros_like(y)) for x, y in batches]
    found = three_layer(sharp, labelled, order=order)
    x = torch.cat([x for x, _ in batches])
    ht = torch.cat([torch.tanh(F.linear(x, net.hidden, net.hidden_bias)), torch.ones(len(x), 1).double()], 1)
    e = torch.exp(torch.tensor(-20.0, dtype=torch.float64))
    other = e / (1 + 2 * e)
    rest = 2 * other * (1 - 2 * other) + 2 * other * (1 - other)  # tr S, both small classes and the large one
    assert found.trace == pytest.approx(float(rest * ht.square().sum(1).mean()), rel=TOLERANCE)


def test_batches_tiles_and_memory_change_nothing(monkeypatch):
    net, batches, _ = case("gelu", n=40, seed=5)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    one = three_layer(net, [(x, y)], gradient=True)
    monkeypatch.setattr("hessdiag.closed_form.traces.TILE_BYTES", 8 * 700)  # one or two samples at a time
    for order in ORDERS:
        for memory in (1.0, 1e9):
            many = three_layer(net, batches, order=order, gradient=True, memory=memory)
            assert many.trace == pytest.approx(one.trace, rel=1e-12)
            assert many.frobenius_squared == pytest.approx(one.frobenius_squared, rel=1e-12)
            assert apart(many.gradient(), one.gradient()) < 1e-11
    assert torch.allclose(one.per_sample.mean(), torch.tensor(one.trace, dtype=torch.float64), rtol=1e-12)


def apart(one: Gradients, other) -> float:
    """Largest difference of two gradients, relative to the largest entry."""
    theirs = other.tensors if isinstance(other, Gradients) else other
    pairs = [(a, b) for a, b in zip(one.tensors, theirs, strict=True) if b is not None]
    scale = max(float(b.abs().max()) for _, b in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / max(scale, 1e-300)


def by_autograd(net: ThreeLayer, batches: Batches, function, quantity: str) -> list[Tensor | None]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in net.tensors]
    value = of_matrix(dense(net, batches, function, leaves), quantity)
    given = [leaf for leaf in leaves if leaf is not None]
    slopes = iter(torch.autograd.grad(value, given, materialize_grads=True))
    return [None if leaf is None else next(slopes) for leaf in leaves]


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus", "gelu", "silu", "mish"])
def test_gradient_of_every_quantity_is_autograds(name: str):
    for biases in ((True, True), (False, False)):
        net, batches, function = case(name, biases, d=3, h=4, n=9 + 3)
        found = [three_layer(net, batches, order=order, gradient=True) for order in ORDERS]
        for quantity in QUANTITIES:
            true = by_autograd(net, batches, function, quantity)
            value = float(of_matrix(dense(net, batches, function), quantity))
            for traces in found:
                assert traces.value(quantity) == pytest.approx(value, rel=TOLERANCE)
                assert apart(traces.gradient(quantity), true) < TOLERANCE


def test_gradient_reaches_tensors_that_do_not_count():
    for counted in ((True, False, False, False), (False, False, True, False), (False, True, False, True)):
        net, batches, function = case("gelu", counted=counted, d=3, h=3, n=12)
        true = by_autograd(net, batches, function, "ws_upper")
        for order in ORDERS:
            assert apart(three_layer(net, batches, order=order, gradient=True).gradient(), true) < TOLERANCE


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_is_the_difference_quotient(order: str):
    net, batches, function = case("silu", seed=4, d=3, h=4, n=12)
    found = three_layer(net, batches, order=order, gradient=True).gradient("ws_upper")
    R, step = draws(9), 1e-5
    directions = [R(*t.shape) for t in net.tensors]
    ends = [
        of_matrix(
            dense(
                net, batches, function, [t + sign * step * v for t, v in zip(net.tensors, directions, strict=True)]
            ),
            "ws_upper",
        )
        for sign in (1, -1)
    ]
    along = sum(float((g * v).sum()) for g, v in zip(found.tensors, directions, strict=True))
    # central differences: h² f‴ and eps/h are both near 1e-10
    assert along == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-7)


def gauss_newton_of(net: ThreeLayer, x: Tensor, function, tensors) -> Tensor:
    """Of all four tensors; differentiable where they are."""

    def outputs(tensors) -> Tensor:
        return F.linear(function(F.linear(x, tensors[0], tensors[1])), tensors[2], tensors[3])

    J = torch.autograd.functional.jacobian(lambda *t: outputs(t), tuple(tensors), create_graph=True)
    J = torch.cat([j.flatten(2) for j in J], 2)
    p = torch.softmax(outputs(tensors), 1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("nca,ncd,ndb->ab", J, S, J) / len(x)


def test_gauss_newton():
    """G = JᵀSJ from the outputs' Jacobian, and its traces' gradient by autograd."""
    net, batches, function = case("gelu", d=3, h=4, n=12)
    net = replace(net, gauss_newton=True)
    x = torch.cat([x for x, _ in batches])
    leaves = [t.clone().requires_grad_() for t in net.tensors]
    G = gauss_newton_of(net, x, function, leaves)
    for quantity in QUANTITIES:
        true = torch.autograd.grad(of_matrix(G, quantity), leaves, retain_graph=True)
        for order in ORDERS:
            found = three_layer(net, batches, order=order, gradient=True)
            assert found.value(quantity) == pytest.approx(float(of_matrix(G, quantity).detach()), rel=TOLERANCE)
            assert apart(found.gradient(quantity), true) < TOLERANCE


def test_bounds_hold_and_blocks_are_between():
    for seed in range(20):
        net, batches, function = case(seed=seed)
        values = torch.linalg.eigvalsh(dense(net, batches, function))
        found = three_layer(net, batches)
        ws = found.ws()
        assert ws.upper.exact_inputs and ws.lower.value <= values[0] and values[-1] <= ws.upper.value
        one, two, three, four = found.per_tensor
        a, b, c = found.blocks
        upper, lower = blockwise_ws((one + two, three + four), ((a, c), (c, b)), (25, 18))
        assert lower.value <= values[0] and values[-1] <= upper.value <= found.frobenius_squared**0.5 * (1 + 1e-12)


def test_a_constant_hessian_has_no_spread_to_descend():
    """One sample, one class direction: H = mI has s = 0, whose root has no derivative."""
    net, batches, _ = case("identity", (False, True), h=1, d=1, C=2, counted=(False, False, False, True))
    one = ThreeLayer(net.hidden, None, net.output[:1], net.output_bias[:1], net.activation, net.counted)
    found = three_layer(one, [(x, torch.zeros_like(y)) for x, y in batches], gradient=True)  # one class: H = 0
    assert found.trace == found.frobenius_squared == found.value("ws_upper") == 0
    assert all(bool(torch.isfinite(t).all()) for t in found.gradient().tensors if t is not None)


def test_the_plan_takes_the_order_that_is_cheaper():
    few, many = case(d=30, h=4, n=10)[0], case(d=2, h=4)[0]
    assert plan(few, 10).order == "pairwise" and plan(many, 100_000).order == "linear"
    assert plan(many, 100_000, memory=1e3).order == "pairwise"  # what always fits
    both = plan(many, 1000)
    assert both.pairwise.seconds > 0 and both.linear.memory > 0 and both.cost is both.linear
    net, batches, _ = case()
    assert three_layer(net, batches).order == plan(net, 17).order


NAMES = ("trace", "frobenius_squared", "effective_rank", "ws_upper", "ws_lower")
MODULES = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}


def posed(name: str, batches: Batches, net: ThreeLayer, criterion="cross_entropy") -> Problem:
    """The network as a user's model, on data in batches."""
    model = nn.Sequential(nn.Linear(4, 5), MODULES[name](), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), net.tensors, strict=True):
            parameter.copy_(value)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return Problem(model, {"train": (x, y)}, criterion=criterion)


def off_by(problem: Problem, H: Tensor, **options) -> dict[str, float]:
    """Relative distance of everything `analyze` says of a matrix that is known; nothing may be an estimate."""
    found = analyze(problem, NAMES, batch_size=5, **options)
    kinds = {name: metric.kind for name, metric in found.metrics.items()}
    assert kinds == dict.fromkeys(NAMES[:3], "exact") | dict.fromkeys(NAMES[3:], "bound")
    bounds = [found.metrics[name] for name in NAMES[3:]]
    assert all(bound.exact_inputs for bound in (*bounds, *found.other_bounds)) and found.cost.products == 0
    values = torch.linalg.eigvalsh(H)
    for bound in (*bounds, *found.other_bounds):
        end = values[-1] if bound.of == "lambda_max" else values[0] if bound.of == "lambda_min" else None
        if end is not None:  # the spread is neither's
            assert bound.lo <= end if bound.side == "lower" else end <= bound.hi
    true = {name: float(of_matrix(H, name)) for name in NAMES if name != "effective_rank"}
    true["effective_rank"] = true["trace"] ** 2 / true["frobenius_squared"]
    assert all(metric.lo <= true[name] <= metric.hi for name, metric in found.metrics.items())
    parts = torch.split(H.diagonal(), [layer.size for layer in found.layers])
    rows = zip(found.layers, parts, strict=True)
    apart = {layer.name: abs(layer.trace - float(part.sum())) / float(H.norm()) for layer, part in rows}
    return apart | {n: abs(m.value - true[n]) / abs(true[n]) for n, m in found.metrics.items()}


@pytest.mark.parametrize("name", MODULES)
def test_analyze_takes_it_by_itself(name: str):
    for seed in range(3):
        net, batches, function = case(name, seed=seed)
        H = dense(net, batches, function)
        assert max(off_by(posed(name, batches, net), H).values()) < TOLERANCE


@pytest.mark.parametrize("name", MODULES)
def test_analyze_on_a_part_of_the_network_and_of_the_targets(name: str):
    net, batches, function = case(name, seed=1)
    part = replace(net, counted=(False, False, True, True))
    assert max(off_by(posed(name, batches, net), dense(part, batches, function), params=("2.*",)).values()) < 1e-10
    holes = [(x, torch.where(torch.arange(len(y)) % 3 == 1, -100, y)) for x, y in batches]
    assert max(off_by(posed(name, holes, net), dense(net, holes, function)).values()) < TOLERANCE
    G = gauss_newton_of(net, torch.cat([x for x, _ in batches]), function, net.tensors).detach()
    assert max(off_by(posed(name, batches, net), G, operator="ggn").values()) < TOLERANCE


def weighted(outputs: Tensor, batch) -> Tensor:
    """A loss whose classes count unequally: none the closed form knows."""
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=outputs.dtype)
    return (F.cross_entropy(outputs, batch[1], reduction="none") * weights[batch[1]]).mean()


def test_analyze_falls_back_where_it_does_not_apply():
    net, batches, _ = case("tanh")
    given = posed("tanh", batches, net)
    smooth = Problem(
        given.model, given.data, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.1)
    )
    deep = Problem(nn.Sequential(given.model, nn.Tanh(), nn.Linear(3, 3).double()), given.data, "cross_entropy")
    sizes = Problem(given.model, given.data, criterion="cross_entropy", weight=lambda batch: 1.0)
    for problem in (posed("tanh", batches, net, weighted), smooth, deep, sizes):
        found = analyze(problem, ("trace", "ws_upper"), probes=8)
        assert found.metrics["trace"].kind == "probes" and not found.metrics["ws_upper"].exact_inputs
        assert not any("closed form" in note for note in found.notes)


def test_the_gate_holds_exact_against_exact():
    """Recorded with ten digits: the same checkpoint is unchanged, another is changed by what it is."""
    net, batches, function = case("gelu")
    other = replace(net, output=1.1 * net.output)
    H = [dense(one, batches, function) for one in (net, other)]
    found = [analyze(posed("gelu", batches, one), NAMES) for one in (net, other)]
    for name in NAMES:
        base, new = (Recorded.of(analysis.metrics[name]) for analysis in found)
        kept = Recorded(**{k: kept_of(getattr(base, k)) for k in Recorded.__slots__})
        same = change.change(kept, base, relative=True, confidence=0.95)
        assert same.lo <= 0 <= same.hi and same.hi - same.lo < 1e-7
        moved = change.change(kept, new, relative=True, confidence=0.95)
        size = [
            float(h.trace() ** 2 / h.square().sum() if name == "effective_rank" else of_matrix(h, name)) for h in H
        ]
        assert moved.lo <= (size[1] - size[0]) / abs(size[0]) <= moved.hi and moved.hi - moved.lo < 1e-7


def kept_of(value):
    return rounded(value) if isinstance(value, float) else value


REFUSED = {
    "an order": (lambda net, b: three_layer(net, b, order="cubic"), "allowed: auto, pairwise, linear"),
    "a quantity": (lambda net, b: three_layer(net, b, gradient=True).gradient("rank"), "allowed: trace"),
    "no gradient": (lambda net, b: three_layer(net, b).gradient(), "gradient=True"),
    "features": (lambda net, b: three_layer(net, [(b[0][0][:, :2], b[0][1])]), "2 features"),
    "classes": (lambda net, b: three_layer(net, [(b[0][0], b[0][1] + 3)]), "allowed: 0 to 2"),
    "soft classes": (lambda net, b: three_layer(net, [(b[0][0], torch.ones(9, 2))]), "3 classes"),
    "cancelling": (
        lambda net, b: three_layer(net, [(b[0][0][:1], torch.tensor([[1.0, -1.0, 0.0]]))]),
        "cancel to 0",
    ),
    "nothing": (lambda net, b: three_layer(net, []), "no sample counts"),
    "all ignored": (lambda net, b: three_layer(net, [(b[0][0], torch.full((9,), -100))]), "no sample counts"),
    "weights": (lambda net, b: replace(net, output=net.hidden), "weights of shapes"),
    "nothing counts": (lambda net, b: replace(net, counted=(False,) * 4), "no parameter counts"),
    "a name": (lambda net, b: activation("swoosh"), "known are tanh"),
    "a mixing function": (
        lambda net, b: activation(lambda a: torch.softmax(a, -1)).at(net.hidden),
        "elementwise function",
    ),
}


@pytest.mark.parametrize("refused, words", REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line(refused, words: str):
    net, batches, _ = case()
    with pytest.raises(UsageError, match=words) as caught:
        refused(net, batches)
    assert "\n" not in str(caught.value)


def no_residual(tile):
    return torch.zeros_like(tile.G)


def no_second(a: Tensor):
    h, h1, h2, h3 = activation("tanh").at(a)
    return h, h1, 0 * h2, h3


def no_third(a: Tensor):
    h, h1, h2, h3 = activation("tanh").at(a)
    return h, h1, h2, 0 * h3


def replaced(net: ThreeLayer, at) -> ThreeLayer:
    return replace(net, activation=replace(net.activation, at=at))


VALUES = {
    "R forgotten": lambda patch: patch.setattr(network.Tile, "R", property(no_residual)),
    "S without its off-diagonal": lambda patch: patch.setattr(
        network.Tile, "S", property(lambda tile: torch.diag_embed(tile.p * tile.q))
    ),
    "off-diagonals counted once": lambda patch: [
        patch.setattr(room, "half", lambda m: m.flatten(1)[:, : m.shape[1] * (m.shape[1] + 1) // 2])
        for room in (pairwise, linear)
    ],
}


@pytest.mark.parametrize("breakage", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("order", ORDERS)
def test_this_promise_would_notice(breakage, order: str, monkeypatch):
    breakage(monkeypatch)
    assert off(*case(), order) > 1e-4


BROKEN = {
    "s″ forgotten": lambda net, b: (replaced(net, no_second), b),
    "the bias's column forgotten": lambda net, b: (replace(net, counted=(True, False, True, True)), b),
    "the Gauss-Newton part only": lambda net, b: (replace(net, gauss_newton=True), b),
    "a sample twice": lambda net, b: (net, [*b, (b[0][0][:1], b[0][1][:1])]),
    "the last batch dropped": lambda net, b: (net, b[:-1]),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_these_breakages_show_in_the_traces(breakage):
    net, batches, function = case()
    H = dense(net, batches, function)
    found = three_layer(*breakage(net, batches))
    assert abs(found.frobenius_squared / float(H.square().sum()) - 1) > 1e-4


def test_a_forgotten_third_derivative_shows_in_the_gradient():
    net, batches, function = case()
    true = by_autograd(net, batches, function, "ws_upper")
    for order in ORDERS:
        assert (
            apart(three_layer(replaced(net, no_third), batches, order=order, gradient=True).gradient(), true)
            > 1e-4
        )
