"""Promise: diagonals are those of the dense matrix, exactly where that is said, else within their errors. (60 s)

Oracle: the dense matrix.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.analysis import diagonal as module
from hessdiag.engine.squares import diagonals
from hessdiag.errors import BudgetError, UsageError
from hessdiag.problem import Problem
from hessdiag.spectral import diagonal as probing
from tests import models
from tests.seeds import band, seeds

SIZE = 60


def symmetric(matrix):
    return ((matrix + matrix.T) / 2).double()


Q = torch.linalg.qr(models.randn(SIZE, SIZE, seed=1)).Q
COUPLED = torch.diag(torch.ones(SIZE - 1), 1)
MATRICES = {
    "dense": symmetric(models.randn(SIZE, SIZE)),
    "outliers": symmetric((Q * torch.cat([torch.tensor([50.0, 20, 10]), 0.1 * models.randn(SIZE - 3)])) @ Q.T),
    "rank one": torch.outer(models.randn(SIZE, seed=4), models.randn(SIZE, seed=4)),
    "tridiagonal": symmetric(torch.diag(models.randn(SIZE)) + 2 * COUPLED),
}


def held(found, truth):
    """The share of entries within their intervals, and whether the joint error holds."""
    inside = (found.lo <= truth) & (truth <= found.hi)
    return float(inside.double().mean()), float((found.value - truth).norm()) <= found.error


@pytest.mark.parametrize("name", MATRICES)
def test_few_dimensions_are_exact(name):
    A = MATRICES[name]
    found = hessdiag.diagonal(A, probes=SIZE)
    assert found.kind == "exact" and found.products == SIZE
    assert torch.equal(found.value, A.diagonal()) and held(found, A.diagonal()) == (1.0, True)
    assert found.stderr.max() == 0


def test_a_diagonal_matrix_needs_no_luck():
    values = models.randn(SIZE)
    found = hessdiag.diagonal(torch.diag(values), probes=2)
    assert torch.equal(found.value, values) and found.stderr.max() == 0 and held(found, values) == (1.0, True)


@pytest.mark.coverage
@pytest.mark.parametrize("deflate", [0, 6])
@pytest.mark.parametrize("name", MATRICES)
def test_errors_cover(name, deflate):
    """Each entry's interval in 92 to 98% of seeds; all entries together in 95% and more."""
    A = MATRICES[name]
    truth, number = A.diagonal(), seeds(1000)
    single, joint = 0.0, 0
    for seed in range(number):
        share, together = held(hessdiag.diagonal(A, probes=16, seed=seed, deflate=deflate), truth)
        single, joint = single + share / number, joint + together
    assert joint / number >= band(number, 0.95)[0]
    assert 0.92 <= single <= (1.0 if name == "rank one" and deflate else 0.98)  # the run has found all of it


def test_the_mean_of_many_is_the_diagonal_and_stderr_its_spread():
    A = MATRICES["dense"]
    found = [hessdiag.diagonal(A, probes=8, seed=seed) for seed in range(300)]
    values = torch.stack([one.value for one in found])
    expected = ((A.square().sum(0) - A.diagonal().square()) / 8).sqrt()
    assert float(((values.mean(0) - A.diagonal()) / (expected / 300**0.5)).abs().max()) < 5
    stderr = torch.stack([one.stderr.square() for one in found]).mean(0).sqrt()
    assert torch.allclose(stderr, expected, rtol=0.12)
    assert torch.allclose(values.std(0), expected, rtol=0.25)


@pytest.mark.parametrize("name", ["outliers", "dense"])
def test_a_run_taken_out_narrows_the_errors(name):
    A = MATRICES[name]
    plain, deflated = (hessdiag.diagonal(A, probes=16, deflate=k) for k in (0, 12))
    assert plain.products == 16 and deflated.products == 28
    assert held(deflated, A.diagonal())[1]
    assert deflated.error < (0.1 if name == "outliers" else 1.0) * plain.error


def relu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    return Problem(model, {"train": (models.randn(30, 5), models.labels(30, 3))}, criterion="cross_entropy")


MODELS = {"relu": relu, "convolutions": models.cnn, "smooth": models.mlp, "regression": models.regression}
KINDS = ["hessian", "ggn", "residual", "empirical_fisher", "mc_fisher"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_models_give_what_they_know_exactly(name, kind):
    options = {"draws": 2} if kind == "mc_fisher" else {}
    H = hessdiag.hessian(MODELS[name](), operator=kind, samples=1000, batch_size=16, **options)
    truth = H.dense().diagonal()
    found = hessdiag.diagonal(H, probes=30)
    exact = kind in ("ggn", "empirical_fisher", "mc_fisher") or name in ("relu", "convolutions")
    assert found.kind == ("exact" if exact else "probes")
    assert float((found.value - truth).norm()) <= found.error + 1e-12 * float(truth.norm())
    if exact:
        assert found.products == 0
        return
    still = found.stderr == 0  # the last layer, in which the outputs are linear
    last = [name for name, _ in H.layout][-2:]
    named = found.named("stderr")
    assert all(float(named[name].max()) == 0 for name in last) and not bool(still.all())
    assert torch.allclose(found.value[still], truth[still], atol=1e-12)
    assert named[last[0]].shape == MODELS[name]().model[-1].weight.shape


def test_tokens_of_a_language_model():
    H = hessdiag.hessian(models.attention(), operator="empirical_fisher", samples=1000)
    assert torch.allclose(hessdiag.diagonal(H).value, H.dense().diagonal(), atol=1e-12)
    G = hessdiag.hessian(models.attention(), operator="ggn", samples=1000)
    found = hessdiag.diagonal(G, probes=40)
    assert found.kind == "probes" and "35 outputs per example" in G.notes[-1]
    assert held(found, G.dense().diagonal())[1]


def test_single_precision():
    H = hessdiag.hessian(relu(), dtype=torch.float32)
    truth = hessdiag.hessian(relu()).dense().diagonal()
    found = hessdiag.diagonal(H)
    assert found.kind == "exact" and held(found, truth) == (1.0, True)


def test_where_the_rest_spreads_more_the_whole_is_probed(monkeypatch):
    H = hessdiag.hessian(models.mlp())
    monkeypatch.setattr(module, "_spreads_less", lambda *_: False)
    found = hessdiag.diagonal(H, probes=30)
    assert found.method == "Hutchinson" and held(found, H.dense().diagonal())[1]


def test_one_line_says_it():
    assert repr(hessdiag.diagonal(MATRICES["dense"], probes=8)).count("\n") == 0


@pytest.mark.parametrize(
    ("asked", "kind", "text"),
    [
        (lambda A: hessdiag.diagonal(A, probes=1), BudgetError, "standard error"),
        (lambda A: hessdiag.diagonal(A, confidence=1.0), UsageError, "0.95"),
        (lambda A: hessdiag.diagonal(A, probes=4).named("error"), UsageError, "'stderr'"),
    ],
)
def test_what_says_nothing_is_refused_in_one_line(asked, kind, text):
    with pytest.raises(kind, match=text) as refusal:
        asked(MATRICES["dense"])
    assert "\n" not in str(refusal.value)


def test_what_a_run_knows_is_the_difference_to_the_bulk():
    A, size = MATRICES["dense"], SIZE
    run = hessdiag.lanczos(A, steps=5)
    P = torch.eye(size).double() - run.basis.T @ run.basis
    bulk = (P @ A @ P).diagonal()
    assert torch.allclose(probing._of_run(run) + bulk, A.diagonal(), atol=1e-12)
    without = (run.basis * (torch.from_numpy(run.T) @ run.basis)).sum(
        0
    )  # the coupling to the next vector left out
    assert not torch.allclose(without + bulk, A.diagonal(), atol=1e-2)


def _unsigned(old):
    return lambda function, piece, signs, columns: old(function, piece, signs, columns.abs())


def test_signs_of_columns_would_be_missed(monkeypatch):
    H = hessdiag.hessian(relu(), operator="ggn")
    truth = H.dense().diagonal()
    assert held(hessdiag.diagonal(H), truth)[1]
    monkeypatch.setattr(diagonals, "_squares", _unsigned(diagonals._squares))
    assert not held(hessdiag.diagonal(H), truth)[1]
