"""Promise: products are exact, for H, G and R, in every way they can be formed.

Oracles: closed forms of linear models first, then a dense float64 Hessian written without hessdiag.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hessdiag.engine.checks import planner
from hessdiag.engine.products import graphs, stacking
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.methods import EXACT_METHODS
from hessdiag.problem import Problem
from tests import models

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}  # relative to the largest entry: rounding of 1e3 terms
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]
CLOSED = {
    "linear": models.linear_regression,
    "logistic": lambda: models.softmax_regression(2),
    "softmax": lambda: models.softmax_regression(3),
}
DENSE = {
    "mlp": models.mlp,
    "cnn, BatchNorm in evaluation mode": models.cnn,
    "attention, padded tokens": models.attention,
    "regression": models.regression,
}


def truth(name):
    if name in CLOSED:
        return CLOSED[name]()
    problem = DENSE[name]()
    return problem, models.dense_hessian(problem)


def off(product, H):
    return float((product.double() - H).abs().max() / H.abs().max())


def misses(op, H):
    """Largest error over random vectors: a wrong entry anywhere shows in each of them."""
    V = models.randn(len(H), 3, seed=11)
    return off((op @ V.to(op.device)).cpu(), H @ V)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("name", [*CLOSED, *DENSE])
def test_hessian(name, method, dtype):
    problem, H = truth(name)
    assert misses(models.operator(problem, method=method, dtype=dtype), H) < TOLERANCE[dtype]


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("name", [*CLOSED, *DENSE])
def test_hessian_is_gauss_newton_plus_residual(name, method):
    problem, H = truth(name)
    V = models.randn(len(H), 3, seed=11)
    G, R = (models.operator(problem, kind, method) @ V for kind in ("ggn", "residual"))
    assert off(G + R, H @ V) < TOLERANCE[torch.float64]
    if name in CLOSED:  # linear in the parameters: no residual
        assert float(R.abs().max()) < 1e-14 * float(G.abs().max())


@pytest.mark.parametrize("kind", ["hessian", "ggn", "residual"])
@pytest.mark.parametrize("name", ["mlp", "cnn, BatchNorm in evaluation mode", "attention, padded tokens"])
def test_batches_passed_together_keep_each_its_own_form(name, kind):
    """What error bars over data are made of: v·H_b v of every batch, the last one shorter than the others."""
    problem, H = truth(name)
    V = models.randn(len(H), 5, seed=3)
    together, apart = (
        models.operator(problem, kind, method, batch_size=3) for method in ("stacked_graph", "retained_graph")
    )
    together.block = 2  # several graphs
    assert together.stackable
    assert sorted(len(stack.indices) for stack in together.stacks)[-1] > 1
    with together.recorded() as ours, apart.recorded() as theirs:
        assert off(together @ V, (apart @ V).double()) < TOLERANCE[torch.float64]
    _ = together @ V  # nobody asks for what this one shows
    assert len(ours.batches) == len(theirs.tensors) == 5
    assert off(torch.stack(ours.batches), torch.stack(theirs.batches)) < TOLERANCE[torch.float64]
    assert off(torch.stack(ours.tensors), torch.stack(theirs.tensors)) < TOLERANCE[torch.float64]


def test_the_planner_takes_batches_together_where_that_works():
    problem, _ = truth("mlp")
    plan = planner.choose(models.operator(problem), fixed=False)
    assert plan.method == "stacked_graph"
    assert plan.agreement < 1e-12


@pytest.mark.parametrize("name", DENSE)
def test_the_plan_is_the_same_whatever_the_clock_says(name, monkeypatch):
    problem, _ = truth(name)
    found = []
    for seconds in (1e-9, 1e-3, 10.0):
        ticks = itertools.accumulate(itertools.cycle((seconds, 1.0, 1e-6)))
        monkeypatch.setattr(planner.time, "perf_counter", lambda ticks=ticks: next(ticks))
        operators = [models.operator(problem, kind) for kind in ("hessian", "ggn")]
        found += [planner.choose(op, fixed=False).method for op in operators]
    # of attention's two batches one is shorter; and vmap's convolutions are slow
    assert set(found[::2]) == {"stacked_graph" if name in ("mlp", "regression") else "retained_graph"}
    assert set(found[1::2]) == {"retained_graph"}


def test_two_batches_that_mix_are_noticed(monkeypatch):
    problem, _ = truth("mlp")
    original = graphs.StackGraph.products
    monkeypatch.setattr(graphs.StackGraph, "products", lambda *a, **k: original(*a, **k).flip(1))
    assert planner.choose(models.operator(problem), fixed=False).agreement > planner.AGREEMENT[torch.float64]


def test_planning_looks_at_few_examples_however_many_there_are(monkeypatch):
    """Fewer than the sample set has four times over: less than five gradients."""
    problem, _ = truth("mlp")
    inputs, targets = (tensor.repeat(50, *[1] * (tensor.dim() - 1)) for tensor in problem.data["train"])
    problem = Problem(problem.model, {"train": (inputs, targets)}, criterion="cross_entropy")
    op, passed = models.operator(problem, batch_size=100), []
    op.batch_losses, op.trial  # noqa: B018
    original = Functional.total
    monkeypatch.setattr(
        Functional,
        "total",
        lambda self, theta, batch: (passed.append(len(batch[0])), original(self, theta, batch))[1],
    )
    planner.choose(op, fixed=False)
    assert sum(passed) < 0.2 * len(inputs)


def test_batches_are_tried_together_only_where_that_may_pay(monkeypatch):
    problem, _ = truth("mlp")
    own = Problem(problem.model, problem.data, criterion=lambda outputs, batch: F.cross_entropy(outputs, batch[1]))
    tried = []
    monkeypatch.setattr(planner, "_stacked", lambda *_: tried.append(1))
    planner.choose(models.operator(own), fixed=False, products=planner.WORTH_STACKING - 1)
    monkeypatch.setattr(stacking, "STACKED_WORK", 1)
    planner.choose(models.operator(problem), fixed=False)
    assert not tried
    monkeypatch.undo()
    monkeypatch.setattr(planner, "_stacked", lambda *_: tried.append(1))
    planner.choose(models.operator(own), fixed=False, products=planner.WORTH_STACKING)
    planner.choose(models.operator(problem), fixed=False, products=2)
    assert len(tried) == 2


ALONE = """
import sys, torch
from hessdiag import Problem, analyze
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
data = {"train": (torch.randn(32, 4), torch.arange(32) % 3)}
found = analyze(Problem(model, data, criterion="cross_entropy"), ["lambda_max"], batch_size=8)
print(found.environment["method"], "sympy" in sys.modules)
"""


def test_batches_go_together_without_sympy():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["stacked_graph", "False"], done.stderr


@pytest.mark.parametrize("ignored", [0, 3])
def test_the_loss_under_vmap_is_torchs(ignored):
    outputs, classes = models.randn(4, 6, 5), models.labels(24, 5).view(4, 6)
    classes[:, :ignored] = -100
    problem = Problem(torch.nn.Linear(1, 1), {"train": (outputs, classes)}, criterion="cross_entropy")
    tried = outputs.clone().requires_grad_()
    ours = stacking.vmapped(lambda o, y: problem.loss_sum(o, (None, y)), tried, classes)
    known = outputs.clone().requires_grad_()
    true = torch.stack([F.cross_entropy(o, y, reduction="sum") for o, y in zip(known, classes, strict=True)])
    assert torch.allclose(ours, true, rtol=1e-14)
    gradients = [torch.autograd.grad(total.sum(), leaf)[0] for total, leaf in ((ours, tried), (true, known))]
    assert torch.allclose(*gradients, rtol=1e-13, atol=1e-16)


def test_batches_go_one_by_one_where_together_they_do_not_fit(monkeypatch):
    problem, H = truth("mlp")

    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(graphs.StackGraph, "products", full)
    op = models.operator(problem, method="stacked_graph")
    assert misses(op, H) < TOLERANCE[torch.float64]
    assert op.method == "retained_graph"
    assert len(op.notes) == 1


def test_the_gauss_newton_matrix_is_positive_semidefinite():
    problem, _ = truth("mlp")
    G = models.operator(problem, "ggn").dense()
    assert float(torch.linalg.eigvalsh(G)[0]) > -1e-12 * float(G.abs().max())


def test_finite_differences_are_what_they_say():
    problem, H = truth("mlp")
    assert misses(models.operator(problem, method="finite_difference"), H) < 1e-7
    assert 1e-8 < misses(models.operator(problem, method="finite_difference", dtype=torch.float32), H) < 2e-2


@pytest.mark.parametrize("globs", [("0.*",), ("*.bias",), ("*", "!2.*")])
def test_a_subset_of_parameters_is_a_block_of_the_hessian(globs):
    problem, H = truth("mlp")
    names = problem.parameter_names()
    sizes = [p.numel() for p in problem.model.parameters()]
    problem.params = globs
    kept = torch.cat([torch.full((s,), n in problem.parameter_names()) for n, s in zip(names, sizes, strict=True)])
    assert off(models.operator(problem).dense(), H[kept][:, kept]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["cnn, BatchNorm in evaluation mode", "attention, padded tokens"])
def test_every_device_at_hand(name, device):
    """On a machine with CUDA this runs there too, by the same code."""
    problem, H = truth(name)
    op = Curvature(problem, models.sample(problem, 7), dtype=torch.float64, device=device)
    assert misses(op, H) < TOLERANCE[torch.float64]


def test_vectors_blocks_and_scipy_agree():
    problem, H = truth("softmax")
    op = models.operator(problem)
    V = models.randn(op.size, 3, seed=8)
    assert off(op @ V, H @ V) < TOLERANCE[torch.float64]
    assert off(op @ V[:, 0], H @ V[:, 0]) < TOLERANCE[torch.float64]
    assert off(torch.from_numpy(op.to_scipy() @ V.numpy()), H @ V) < TOLERANCE[torch.float64]
    assert op.products == 3 + 1 + 3


BROKEN = {
    "batch means are averaged": lambda op: _equal_batches(op),
    "half of the data is missing": lambda op: _lose_half(op),
    "the Gauss-Newton matrix is given for H": lambda op: setattr(op, "kind", "ggn"),
    "a stack of batches counts once": lambda op: _first_of_each_stack(op),
    "one weight is off by a thousandth": lambda op: op.function.theta[0].data.view(-1)[0].mul_(1.001),
}


def _equal_batches(op):
    from hessdiag.engine.products import methods

    def averaged(function, kind, batch, rows):
        return methods.retained_graph(function, kind, batch, rows) / function.problem.count(batch)

    op.total_weight = len(op.batches)
    op.method = "averaged"
    methods.METHODS["averaged"] = averaged


def _lose_half(op):
    half = len(op.batches) // 2
    op.batches, op.weights = op.batches[half:], op.weights[half:]
    op.mine = tuple(range(len(op.batches)))


def _first_of_each_stack(op):
    op.method = "stacked_graph"
    op.stacks = tuple(
        type(s)(s.indices[:1], tuple(tensor[:1] for tensor in s.tensors), s.first) for s in op.stacks
    )


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    problem, H = truth("attention, padded tokens")
    op = models.operator(problem, batch_size=3)
    breakage(op)
    assert misses(op, H) > 10 * TOLERANCE[torch.float64]
