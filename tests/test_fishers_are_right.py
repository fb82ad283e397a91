"""Promise: both Fisher matrices are sums of outer products of gradients; the drawn one has the mean G. (60 s)

Oracle: gradients of one example after the other by torch.func, in float64, written without hessdiag; and G, which
other tests hold against the whole Jacobian.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessdiag
from hessdiag.criteria import Criterion
from hessdiag.engine.products import fisher
from hessdiag.errors import BudgetError, HessdiagError, UsageError
from hessdiag.problem import Problem
from tests import models

SIGMAS = 5.0


def flat_gradients(problem, loss):
    """The gradient of every term, (terms, P): ``loss(outputs, targets)`` gives the terms of one example."""
    model, (inputs, targets) = problem.bare_model().eval(), problem.data["train"]
    named = {name: p.detach().double() for name, p in model.named_parameters()}

    def terms(tensors, x, y):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return loss(torch.func.functional_call(model, tensors, (x[None],))[0], y).reshape(-1)

    found = [torch.func.jacrev(terms)(named, x, y) for x, y in zip(inputs, targets, strict=True)]
    return torch.cat([torch.cat([one[name].flatten(1) for name in named], dim=1) for one in found])


def segmentation():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    return Problem(
        model, {"train": (models.randn(6, 2, 4, 4), models.labels(96, 3).view(6, 4, 4))}, "cross_entropy"
    )


def soft():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    targets = models.randn(9, 3, seed=2).softmax(-1)
    return Problem(model, {"train": (models.randn(9, 4), targets)}, criterion="cross_entropy")


def binary():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    data = (models.randn(11, 4), (models.randn(11, 1, seed=2) > 0).double())
    return Problem(model, {"train": data}, criterion=lambda f, b: F.binary_cross_entropy_with_logits(f, b[1]))


def tokens(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none", ignore_index=-100)


CASES = {  # the problem, the terms of an example's loss, and how many the mean divides by
    "classes": (models.mlp, lambda f, y: F.cross_entropy(f, y), 40),
    "convolutions": (models.cnn, lambda f, y: F.cross_entropy(f, y), 24),
    "tokens": (models.attention, tokens, None),
    "squares": (models.regression, lambda f, y: (f - y).square().sum(), 44),
    "places": (
        segmentation,
        lambda f, y: F.cross_entropy(f.movedim(0, -1).flatten(0, 1), y.flatten(), reduction="none"),
        96,
    ),
    "soft targets": (soft, lambda f, y: F.cross_entropy(f, y), 9),
    "a criterion of one's own": (binary, lambda f, y: F.binary_cross_entropy_with_logits(f, y), 11),
}


def expected(name):
    make, loss, number = CASES[name]
    problem = make()
    g = flat_gradients(problem, loss)
    kept = number or int((problem.data["train"][1] != -100).sum())
    return problem, g.T @ g / kept


def error(found, truth):
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("batch_size", [100, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_empirical_fisher_is_the_sum_over_gradients(name, batch_size):
    problem, truth = expected(name)
    H = hessdiag.hessian(problem, operator="empirical_fisher", samples=1000, batch_size=batch_size)
    assert error(H.dense(), truth) < 1e-12
    assert "empirical_fisher" in repr(H)


def test_single_precision():
    problem, truth = expected("classes")
    H = hessdiag.hessian(problem, operator="empirical_fisher", dtype=torch.float32)
    assert error(H.dense(), truth) < 1e-5


SAMPLED = [name for name in CASES if name != "a criterion of one's own"]


@pytest.mark.parametrize("name", SAMPLED)
def test_the_mean_of_the_drawn_fisher_is_gauss_newton(name):
    """Forms of four random vectors within 5 standard errors, over 60 seeds."""
    problem = CASES[name][0]()
    G = hessdiag.hessian(problem, operator="ggn", samples=1000)
    V = models.randn(G.size, 4, seed=8)
    drawn = hessdiag.hessian(problem, operator="mc_fisher", samples=1000)
    seen = []
    for seed in range(60):
        drawn.noise = list(fisher._uniform(problem, drawn.batches, 1, seed))
        seen.append((V * (drawn @ V)).sum(0))
    mean, spread = torch.stack(seen).mean(0), torch.stack(seen).std(0) / 60**0.5
    assert bool(((mean - (V * (G @ V)).sum(0)).abs() <= SIGMAS * spread).all()) and float(spread.min()) > 0


@pytest.mark.parametrize("name", SAMPLED)
def test_draws_are_those_of_any_batches(name):
    problem = CASES[name][0]()
    make = lambda size, **more: hessdiag.hessian(  # noqa: E731
        problem, operator="mc_fisher", samples=1000, batch_size=size, seed=3, **more
    )
    whole, parts = make(1000, draws=3), make(4, draws=3)
    assert error(parts.dense(), whole.dense()) < 1e-12
    parts.micro_batch = 3
    assert error(parts.dense(), whole.dense()) < 1e-12
    assert error(make(1000, draws=4).dense(), whole.dense()) > 1e-3
    other = hessdiag.hessian(problem, operator="mc_fisher", samples=1000, seed=4, draws=3)
    assert error(other.dense(), whole.dense()) > 1e-3


def test_more_draws_begin_with_fewer():
    problem = models.mlp()
    one, two = (hessdiag.hessian(problem, operator="mc_fisher", draws=n, seed=5) for n in (1, 2))
    assert torch.equal(one.noise[0][:, 0], two.noise[0][:, 0])
    assert not torch.equal(two.noise[0][:, 0], two.noise[0][:, 1])


def test_the_model_and_its_random_numbers_stay():
    problem = models.cnn()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    state = torch.random.get_rng_state()
    hessdiag.hessian(problem, operator="mc_fisher", draws=2).dense()
    assert torch.equal(torch.random.get_rng_state(), state) and problem.model.training
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    assert all(p.grad is None for p in problem.model.parameters())


def by_loss():
    return Problem(
        nn.Linear(2, 2), {"train": torch.ones(4, 2)}, loss=lambda model, batch: model(batch).square().mean()
    )


def weighted():
    problem = models.mlp()
    problem.weight = lambda batch: 2.0 * len(batch[0])
    return problem


@pytest.mark.parametrize(
    ("asked", "kind", "text"),
    [
        (lambda: hessdiag.hessian(by_loss(), operator="empirical_fisher"), UsageError, "criterion"),
        (lambda: hessdiag.hessian(weighted(), operator="empirical_fisher"), UsageError, "weight of its own"),
        (lambda: hessdiag.hessian(binary(), operator="mc_fisher"), UsageError, "operator='ggn'"),
        (lambda: hessdiag.hessian(models.mlp(), operator="mc_fisher", draws=0), BudgetError, "at least 1"),
        (lambda: hessdiag.hessian(models.mlp(), operator="fisher"), HessdiagError, "allowed: hessian"),
    ],
)
def test_what_has_no_fisher_is_refused_in_one_line(asked, kind, text):
    with pytest.raises(kind, match=text) as refusal:
        asked()
    assert "\n" not in str(refusal.value)


BROKEN = {
    "gradients of the batch's mean": lambda old: lambda f, o, b, n: old(f, o, b, n) / len(o),
    "one direction for the whole batch": lambda old: lambda f, o, b, n: old(f, o, b, n).mean(1, True),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    problem, truth = expected("classes")
    monkeypatch.setattr(fisher, "gradients_of_terms", breakage(fisher.gradients_of_terms))
    assert error(hessdiag.hessian(problem, operator="empirical_fisher").dense(), truth) > 1e-3


def test_ignored_positions_would_be_noticed(monkeypatch):
    problem = models.attention()
    G = hessdiag.hessian(problem, operator="ggn").dense()
    few = hessdiag.hessian(problem, operator="mc_fisher", draws=500).dense()
    assert float((few - G).norm() / G.norm()) < 0.07
    monkeypatch.setattr(Criterion, "sizes", lambda self, targets: torch.ones(len(targets), dtype=torch.float64))
    wrong = hessdiag.hessian(problem, operator="mc_fisher", draws=500).dense()
    assert float((wrong - G).norm() / G.norm()) > 0.1


TORCHS = {
    "weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5]).double()), models.labels(12, 3)),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), models.labels(12, 3)),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), models.labels(12, 3)),
    "binary": (nn.BCEWithLogitsLoss(), (models.randn(12, 3, seed=4) > 0).double()),
    "weighted binary": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 4.0]).double()),
        (models.randn(12, 3, seed=4) > 0).double(),
    ),
    "squares": (nn.MSELoss(), models.randn(12, 3, seed=3)),
}


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_own_losses(name):
    loss, targets = TORCHS[name]
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), models.randn(12, 4)
    G = hessdiag.hessian(model, loss, (x, targets), operator="ggn").dense()
    drawn = hessdiag.hessian(model, loss, (x, targets), operator="mc_fisher", draws=3000).dense()
    assert float((drawn - G).norm() / G.norm()) < 0.05
    given = hessdiag.hessian(model, loss, (x, targets), operator="empirical_fisher").dense()
    if name in ("a sum", "binary", "squares"):
        summed = type(loss)(reduction="sum")
        losses = [summed(model(x[i : i + 1]), targets[i : i + 1]) for i in range(12)]
        pieces = [torch.autograd.grad(one, list(model.parameters())) for one in losses]
        g = torch.stack([torch.cat([piece.flatten() for piece in one]) for one in pieces])
        over = {"a sum": 1, "binary": 36, "squares": 36}[name]  # as curvlinops divides
        assert error(given, g.T @ g / over) < 1e-12
