"""Promise: where every direction is covered the numbers are exact, breakdown included. (3 s)"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hessdiag.errors import BudgetError
from hessdiag.operator import ClosureOperator, as_operator
from hessdiag.results import Metric
from hessdiag.spectral import (
    density,
    effective_rank,
    extremes,
    forms,
    frobenius_squared,
    lanczos,
    negative_mass,
    trace,
)
from tests.models import rotated

RNG = np.random.default_rng(0)


MATRICES = {
    "two times the identity": 2 * torch.eye(9, dtype=torch.float64),
    "rank one": torch.ones(8, 8, dtype=torch.float64),
    "rank one, negative": -torch.ones(8, 8, dtype=torch.float64),
    "zero": torch.zeros(7, 7, dtype=torch.float64),
    "one by one": torch.full((1, 1), -3.0, dtype=torch.float64),
    "repeated": rotated(np.r_[np.full(4, 5.0), np.full(5, -1.0), 2.0], seed=RNG),
    "swap": torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64),
    "distinct": rotated(np.linspace(-1, 4, 12), seed=RNG),
}
TOLERANCE = 1e-13  # relative to the largest |eigenvalue|: 450 eps for a dozen products and an eigh


def exact(result: Metric, true: float, scale: float) -> bool:
    return abs(result.value - true) <= TOLERANCE * scale and result.lo <= true <= result.hi


@pytest.mark.parametrize("name", MATRICES)
def test_extremes(name: str):
    matrix = MATRICES[name]
    eigenvalues = np.linalg.eigvalsh(matrix.numpy())
    result = extremes(matrix, max_steps=50)
    scale = max(np.abs(eigenvalues).max(), 1e-300)
    assert result.lambda_max is not None and result.lambda_min is not None
    for found, true in ((result.lambda_max, eigenvalues[-1]), (result.lambda_min, eigenvalues[0])):
        assert exact(found, true, scale)
        assert found.hi - found.lo <= TOLERANCE * 10 * scale
    assert result.krylov.exhausted and not result.warnings
    assert result.krylov.size == matrix.shape[0]  # copies of one eigenvalue too
    np.testing.assert_allclose(result.krylov.ritz_values, eigenvalues, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("steps", [0, 3, 50])
@pytest.mark.parametrize("name", MATRICES)
def test_moments(name: str, steps: int):
    matrix = MATRICES[name]
    size, eigenvalues = matrix.shape[0], np.linalg.eigvalsh(matrix.numpy())
    t1, t2 = eigenvalues.sum(), np.square(eigenvalues).sum()
    krylov = lanczos(matrix, steps=steps) if steps else None
    arguments = {"probes": size, "krylov": krylov}
    scale = size * max(np.abs(eigenvalues).max(), np.square(eigenvalues).max())
    for found, true in ((trace(matrix, **arguments), t1), (frobenius_squared(matrix, **arguments), t2)):
        assert found.kind == "exact" and found.stderr == 0.0
        assert abs(found.value - true) <= TOLERANCE * scale
    rank = effective_rank(matrix, **arguments)
    assert rank.value == pytest.approx(t1**2 / t2 if t2 else 0.0, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", MATRICES)
def test_a_full_run_needs_no_probes(name: str):
    matrix = MATRICES[name]
    krylov = lanczos(matrix, steps=50)
    left = matrix.shape[0] - krylov.size
    result = trace(matrix, probes=left, krylov=krylov)
    assert result.kind == "exact"
    assert result.provenance.products == krylov.products + left
    assert result.value == pytest.approx(float(matrix.trace()), abs=1e-13 * 40)


@pytest.mark.parametrize(
    "function", [np.exp, np.abs, lambda x: (x > 0.1).astype(float)], ids=["exp", "abs", "step"]
)
@pytest.mark.parametrize("steps", [0, 50])
@pytest.mark.parametrize("name", MATRICES)
def test_density_is_the_spectrum(name: str, steps: int, function):
    matrix = MATRICES[name]
    size, eigenvalues = matrix.shape[0], np.linalg.eigvalsh(matrix.numpy())
    run = density(as_operator(matrix), size, size, 0, lanczos(matrix, steps=steps) if steps else None)
    nodes, weights = np.array(run.spectrum.merged()).T
    assert run.exact
    assert (weights * function(nodes)).sum() == pytest.approx(function(eigenvalues).mean(), abs=1e-11)
    share = negative_mass(run)
    assert share.lo - 1e-12 <= (eigenvalues < -1e-9).mean() <= share.hi + 1e-12
    if name not in ("zero", "rank one", "rank one, negative"):  # eigenvalues within rounding of 0 are undecidable
        assert share.hi - share.lo < 1e-12


def test_fewer_probes_are_not_called_exact():
    matrix = MATRICES["distinct"]
    assert trace(matrix, probes=11).kind == "probes"
    with pytest.raises(BudgetError, match="1 more"):
        trace(matrix, probes=1)
    assert not forms(as_operator(matrix), None, 11, 0).exact


class Remembering:
    """An operator that hands out its own memory: what it returns must not be written into."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.shape, self.dtype = matrix, matrix.shape, matrix.dtype
        self.answers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __matmul__(self, block: torch.Tensor) -> torch.Tensor:
        for asked, answer in self.answers:
            if torch.equal(asked, block):
                return answer
        self.answers.append((block.clone(), self.matrix @ block))
        return self.answers[-1][1]


def own_memory_stays_whole() -> bool:
    held = Remembering(MATRICES["distinct"])
    first = lanczos(held, steps=5, seed=1).ritz_values
    again = lanczos(held, steps=5, seed=1).ritz_values
    return len(held.answers) == 5 and np.array_equal(first, again)


def test_what_an_operator_returns_stays_its_own():
    assert own_memory_stays_whole()
    same = as_operator(torch.eye(6, dtype=torch.float64))
    same._matmat = lambda block: block
    assert lanczos(same, steps=3).ritz_values == pytest.approx([1.0] * 3)


def test_this_promise_would_notice_borrowed_memory(monkeypatch):
    monkeypatch.setattr(ClosureOperator, "multiply", lambda self, rows: self._matmat(rows.T).T)
    assert not own_memory_stays_whole()


BROKEN = {
    "one eigenvalue missed": lambda result: dataclasses.replace(result, value=result.value - 1.0, lo=-99.0),
    "a rounding error in float32": lambda result: dataclasses.replace(
        result, value=result.value * (1 + 1e-7), hi=result.value * 2
    ),
    "an interval beside the truth": lambda result: dataclasses.replace(
        result, value=result.value, lo=result.value, hi=result.value
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    matrix = MATRICES["distinct"]
    result = trace(matrix, probes=12)
    true = np.nextafter(result.value, 99)  # a rounding away, whatever the value was rounded to here
    assert exact(result, np.linspace(-1, 4, 12).sum(), 4.0 * 12)
    assert exact(result, true, 4.0 * 12)
    assert not exact(breakage(result), true, 4.0 * 12)
