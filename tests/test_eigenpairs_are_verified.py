"""Promise: eigenpairs are those of the dense matrix, none is missing, and a cluster is called one. (40 s)

Oracle: numpy.linalg.eigh of the dense matrix.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.errors import UsageError
from hessdiag.operator import ClosureOperator, as_operator
from hessdiag.problem import Problem
from hessdiag.spectral import ranked, subspace
from tests import models
from tests.seeds import seeds

SIZE = 320


def rotated(values, seed=0):
    """A dense matrix of these eigenvalues."""
    Q = torch.linalg.qr(models.randn(len(values), len(values), seed=seed)).Q
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def bulk(*outliers, width=0.3):
    return torch.cat([torch.tensor(outliers, dtype=torch.float64), width * models.randn(SIZE - len(outliers))])


SPECTRA = {
    "outliers": bulk(10, 7, 5, 4, 3.5, -2),
    "multiple": bulk(10, 10, 10, 4, 4, 3, -6, -6),
    "one cluster": bulk(5, 5 + 1e-7, 5 - 1e-7, 5 + 2e-7, 5, 5),
    "both signs": bulk(5, -5, 4, -4, 3, -3),
    "negative": -torch.linspace(0.1, 1, SIZE, dtype=torch.float64),
    "many copies": torch.cat([torch.full((40,), 5.0), 0.3 * models.randn(SIZE - 40)]).double(),
    "geometric": 0.8 ** torch.arange(SIZE, dtype=torch.float64),
}


def truth(A, which, k):
    values = np.linalg.eigvalsh(A.double().numpy())
    order = {"LA": -values, "SA": values, "LM": -np.abs(values)}[which]
    return values[np.argsort(order, kind="stable")[:k]]


def right(pairs, A, which):
    """Whether every interval holds the eigenvalue of its rank: on either side, the outermost first."""
    values = np.linalg.eigvalsh(A.double().numpy())
    top = [pair for pair in pairs.pairs if which == "LA" or (which == "LM" and pair.value > 0)]
    bottom = [pair for pair in pairs.pairs if not any(pair is one for one in top)]
    sides = ((top, values[::-1]), (bottom, values))
    held = all(
        pair.lo <= value <= pair.hi for some, true in sides for pair, value in zip(some, true, strict=False)
    )
    rest = values[len(bottom) : len(values) - len(top)]
    return held and (not len(rest) or (pairs.others[0] <= rest[0] and rest[-1] <= pairs.others[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_pairs_are_those_of_the_dense_matrix(name, which, dtype):
    A = rotated(SPECTRA[name]).to(dtype)
    H = as_operator(A)
    pairs = hessdiag.eigenpairs(H, k=5, which=which, rtol=1e-4)
    assert right(pairs, A, which)
    scale = float(torch.linalg.matrix_norm(A.double(), 2))
    np.testing.assert_allclose(np.abs(pairs.values), np.abs(truth(A, which, 5)), atol=1e-3 * scale)
    residuals = torch.linalg.vector_norm(
        A @ pairs.vectors - pairs.vectors * torch.tensor(pairs.values).to(A), dim=0
    )
    np.testing.assert_allclose([pair.residual for pair in pairs.pairs], residuals, atol=2 * pairs.pairs[0].floor)
    overlap = pairs.vectors.T @ pairs.vectors
    assert torch.allclose(overlap, torch.eye(5).to(A), atol=1e-5)
    assert H.products == pairs.products <= 260


def test_vectors_known_alone_are_the_eigenvectors():
    A = rotated(SPECTRA["outliers"])
    values, vectors = np.linalg.eigh(A.numpy())
    pairs = hessdiag.eigenpairs(A, k=5)
    assert pairs.clusters == () and pairs.warnings == ()
    for rank, pair in enumerate(pairs.pairs):
        gap = np.sort(np.abs(values - values[-1 - rank]))[1]
        sine = np.sqrt(max(0.0, 1 - float(vectors[:, -1 - rank] @ pairs.vectors[:, rank].numpy()) ** 2))
        assert sine <= 1.1 * pair.residual / gap + 1e-8


def test_a_cluster_says_so_and_its_space_is_known():
    A = rotated(SPECTRA["multiple"])
    pairs = hessdiag.eigenpairs(A, k=6)
    assert pairs.clusters == ((0, 1, 2), (3, 4))
    vectors = torch.from_numpy(np.linalg.eigh(A.numpy())[1][:, -3:].copy())
    angles = torch.linalg.svdvals(vectors.T @ pairs.vectors[:, :3])
    assert float(angles.min()) > 1 - 1e-5
    assert not hessdiag.eigenpairs(A, k=6).warnings
    cut = hessdiag.eigenpairs(A, k=2)
    assert "a cluster that goes on" in cut.warnings[0]


def regression(outputs):
    """Every eigenvalue of its Hessian occurs once per output."""
    torch.manual_seed(0)
    x = models.randn(60, 40) * torch.logspace(0, -2, 40, dtype=torch.float64)
    y = models.randn(60, outputs, seed=2)
    return Problem(nn.Linear(40, outputs).double(), {"train": (x, y)}, criterion="mse")


def test_copies_of_an_eigenvalue_are_all_found():
    H = hessdiag.hessian(regression(7))
    A = H.dense()
    pairs = hessdiag.eigenpairs(H, k=10, max_products=250)
    assert H.size > 250 and right(pairs, A, "LA")
    np.testing.assert_allclose(pairs.values, truth(A, "LA", 10), rtol=1e-6)
    assert pairs.clusters[0] == tuple(range(7))


def test_vectors_come_in_parameter_shape():
    problem = models.mlp()
    H = hessdiag.hessian(problem)
    pairs = hessdiag.eigenpairs(H, k=3, max_products=70)
    named = pairs.named(0)
    assert {name: piece.shape for name, piece in named.items()} == {
        name: p.shape for name, p in problem.model.named_parameters()
    }
    image = H @ named
    for name, piece in named.items():
        assert torch.allclose(image[name], pairs.pairs[0].value * piece, atol=3e-3 * pairs.pairs[0].value)
    assert right(pairs, models.dense_hessian(problem), "LA")
    assert repr(pairs).startswith("<3 eigenpairs: ") and "\n" not in repr(pairs)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_few_dimensions_are_all_known(which):
    A = rotated(torch.tensor([3.0, 2, 2, -5, 1, 0]).double())
    pairs = hessdiag.eigenpairs(A, k=4, which=which)
    assert right(pairs, A, which) and pairs.confidence == 1.0
    assert pairs.products == 6 + 4
    np.testing.assert_allclose(pairs.values, truth(A, which, 4), atol=1e-12)
    assert len(hessdiag.eigenpairs(A, k=6).values) == 6
    assert hessdiag.eigenpairs(torch.zeros(4, 4), k=2).values.tolist() == [0, 0]


def test_products_that_are_too_few_are_said():
    A = rotated(torch.linspace(-1, 1, SIZE, dtype=torch.float64))
    pairs = hessdiag.eigenpairs(A, k=5, max_products=40)
    assert pairs.products <= 40
    assert "not certified" in pairs.warnings[0]
    assert right(pairs, A, "LA")


def test_a_small_basis_is_restarted_and_right():
    A = rotated(SPECTRA["outliers"])
    assert right(hessdiag.eigenpairs(A, k=5, max_basis=26), A, "LA")


LARGE = ClosureOperator(lambda block: block, 10**9)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (lambda A: hessdiag.eigenpairs(A, k=0), "1 to 320"),
        (lambda A: hessdiag.eigenpairs(A, k=321), "1 to 320"),
        (lambda A: hessdiag.eigenpairs(A, k=3, which="SM"), "'LA'"),
        (lambda A: hessdiag.eigenpairs(A, k=50, max_products=60), "at least 2 k . 10 = 110"),
        (lambda A: hessdiag.eigenpairs(A, k=5, max_basis=10), "at least 4 k . 6 = 26"),
        (lambda A: hessdiag.eigenpairs(A, k=5, rtol=0.0), "between 0 and 1"),
        (lambda A: hessdiag.eigenpairs(LARGE, k=2000), "GiB, more than half of the free memory"),
    ],
)
def test_what_cannot_be_found_is_refused_in_one_line(asked, text):
    with pytest.raises(UsageError, match=text) as refusal:
        asked(rotated(SPECTRA["outliers"]))
    assert "\n" not in str(refusal.value)


@pytest.mark.coverage
def test_intervals_hold_over_seeds():
    """Each run may fail in 1 of 1,000 cases per side; five of so many are four sigma more."""
    values = torch.cat([torch.tensor([4.0, 3.9, 3.9, 2.0]), torch.linspace(-1, 1.9, 126)]).double()
    A = torch.diag(values)
    number = seeds(1000)
    wrong = sum(not right(hessdiag.eigenpairs(A, k=3, seed=s, max_products=80), A, "LA") for s in range(number))
    assert wrong <= 5 * number / 1000


BROKEN = {
    "no look for missing copies": (subspace, "_beyond", lambda known, wanted: -1.0),
    "no reach beyond the value": (ranked, "_reach", lambda gap, r: 0.0),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    where, name, broken = breakage
    A = rotated(SPECTRA["multiple"])
    assert right(hessdiag.eigenpairs(A, k=5), A, "LA")
    monkeypatch.setattr(where, name, broken)
    if name == "_beyond":
        monkeypatch.setattr(subspace, "_joining", lambda known, krylov, wanted: _first(known, krylov, wanted))
        monkeypatch.setattr(subspace, "_certify", lambda known, *_: setattr(known, "upper", -1.0))
    assert not right(hessdiag.eigenpairs(A, k=5), A, "LA")


def _first(known, krylov, wanted):
    return [] if len(known.values) >= wanted.number else wanted.best(krylov.ritz_values).tolist()
