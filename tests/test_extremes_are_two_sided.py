"""Promise: lambda_max and lambda_min lie inside their intervals, and both ends say something. (10 s)"""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hessdiag.errors import UsageError
from hessdiag.operator import ClosureOperator, as_operator
from hessdiag.spectral import Extremes, extremes, inner, lanczos
from hessdiag.spectral.certificate import SPARED, certificate
from tests.models import rotated

RNG = np.random.default_rng(1)
TRAINED = np.r_[np.geomspace(1, 30, 10), 0.01 * RNG.normal(size=270), -0.3 * RNG.random(20)]
SPECTRA = {
    "trained": TRAINED,
    "semicircle": 2 * RNG.beta(1.5, 1.5, 200) - 1,
    "negative definite": -TRAINED - 50,
    "clustered at the top": np.r_[np.full(3, 2.0), 2 - 1e-6 * np.arange(1, 4), RNG.random(100)],
    "wide": np.r_[1e6, 1e-6 * RNG.random(80)],
}


def contains(result: Extremes, eigenvalues: np.ndarray) -> bool:
    high, low = result.lambda_max, result.lambda_min
    return bool(
        high is not None
        and low is not None
        and high.lo <= eigenvalues.max() <= high.hi
        and low.lo <= eigenvalues.min() <= low.hi
    )


@pytest.mark.parametrize("max_basis", [None, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_truth_is_inside(name: str, dtype: torch.dtype, max_basis: int | None):
    matrix = rotated(SPECTRA[name], dtype=dtype)
    eigenvalues = np.linalg.eigvalsh(matrix.double().numpy())  # of the matrix as it was rounded
    result = extremes(matrix, max_basis=max_basis)
    assert contains(result, eigenvalues)
    if not result.warnings:
        radius = np.abs(eigenvalues).max()
        # rtol is 1e-3; twice that leaves room for the rounding floor of float32 (2e-6 of the radius)
        assert result.lambda_max is not None and result.lambda_min is not None
        assert result.lambda_max.hi - result.lambda_max.lo <= 2e-3 * abs(eigenvalues.max())
        assert result.lambda_min.hi - result.lambda_min.lo <= 2e-3 * radius


def test_the_top_is_verified_and_has_no_ghosts():
    result = extremes(rotated(TRAINED), top=5, max_steps=200, rtol=1e-9)
    truth = np.sort(TRAINED)[::-1][:5]
    found = np.array([r.value for r in result.top])
    reach = np.array([r.residual + r.floor for r in result.top])
    assert (np.abs(found - truth) <= reach).all()
    assert (np.diff(found) < 0).all()
    assert result.krylov.orthogonality < 1e-13  # 64 eps and the square root of 100 terms


def test_a_run_cut_short_says_so():
    result = extremes(rotated(SPECTRA["semicircle"]), max_steps=5)
    assert contains(result, SPECTRA["semicircle"])
    assert len(result.warnings) == 2 and all("max_steps" in text for text in result.warnings)


def test_lambda_max_alone_is_cheap_and_counted():
    op = as_operator(rotated(TRAINED))
    result = extremes(op, which=("max",))
    assert result.lambda_min is None and result.lambda_max is not None
    assert result.lambda_max.provenance.products == op.products <= 20
    assert result.convergence.steps[-1] == op.products - 1
    assert result.convergence.certificate_max[-1] >= result.convergence.ritz_max[-1]


def test_a_restarted_run_holds_no_more_than_its_basis():
    values = torch.linspace(-1, 1, 200_000, dtype=torch.float32) ** 9
    values[7] = 5.0
    op = ClosureOperator(lambda block: values[:, None] * block, 200_000, dtype=torch.float32)
    result = extremes(op, which=("max",), max_basis=8)
    assert result.lambda_max is not None
    assert result.lambda_max.lo <= 5.0 <= result.lambda_max.hi
    assert result.krylov.basis.shape[0] <= 8


@pytest.mark.parametrize("max_basis", [None, 6, 11])
def test_the_recurrence_holds_through_restarts(max_basis: int | None):
    matrix = rotated(TRAINED)
    run = lanczos(matrix, steps=40, max_basis=max_basis)
    left = run.basis @ matrix - torch.from_numpy(run.T) @ run.basis
    assert run.residual is not None
    left[-1] -= run.beta * run.residual
    # products of norm 30 rounded to 2e-16, summed over 40 steps
    assert float(left.abs().max()) < 1e-12
    assert run.orthogonality < 1e-13


@pytest.mark.parametrize(
    "arguments",
    [{"rtol": 0.0}, {"which": ("middle",)}, {"top": 0}, {"failure": 1.0}, {"max_basis": 3}, {"max_steps": 0}],
    ids=str,
)
def test_refusals_are_one_line(arguments: dict):
    with pytest.raises(UsageError, match=next(iter(arguments)).split("_")[-1]) as refusal:
        extremes(rotated(TRAINED), **arguments)
    assert "\n" not in str(refusal.value)


def without_upper_certificate(result: Extremes) -> Extremes:
    assert result.lambda_max is not None
    return dataclasses.replace(
        result, lambda_max=dataclasses.replace(result.lambda_max, hi=result.lambda_max.value)
    )


def without_lower_certificate(result: Extremes) -> Extremes:
    assert result.lambda_min is not None
    return dataclasses.replace(
        result, lambda_min=dataclasses.replace(result.lambda_min, lo=result.lambda_min.value)
    )


def large() -> ClosureOperator:
    """20,000 float32 eigenvalues: inner products are added up in pieces here."""
    spread = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.05
    values = torch.cat([torch.arange(1.0, 11.0) * 3, spread[10:]])[:, None]
    return ClosureOperator(lambda block: values * block, 20_000, dtype=torch.float32)


def test_a_large_float32_run_stays_orthogonal():
    result = extremes(large())
    assert result.krylov.size > 20
    assert result.krylov.orthogonality < 2e-6
    assert result.lambda_max is not None and result.lambda_max.lo <= 30.0 <= result.lambda_max.hi
    assert not result.warnings


def test_this_promise_would_notice_vectors_that_are_not_projected(monkeypatch):
    room = importlib.import_module("hessdiag.spectral.lanczos")

    own = inner.continue_basis
    monkeypatch.setattr(room, "continue_basis", lambda work, basis, total: own(work, basis[-2:], total))
    run = lanczos(large(), steps=40)
    assert run.orthogonality > 0.1


def shifted(size: int, gap: float, dtype: torch.dtype = torch.float32, shift: float = 1.0, copies: int = 1):
    """``shift`` I + ``gap`` Σ uuᵀ of orthonormal random u, and its largest and smallest eigenvalue."""
    shape = (size, copies)
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    U = torch.linalg.qr(draws).Q.to(dtype)
    top = gap * float(torch.linalg.matrix_norm(U.double(), 2)) ** 2
    op = ClosureOperator(lambda block: shift * block + gap * (U @ (U.T @ block)), size, dtype=dtype)
    return op, np.array([shift + min(top, 0.0), shift + max(top, 0.0)] + [shift] * (copies < size))


@pytest.mark.parametrize("shift", [1.0, -0.01])
@pytest.mark.parametrize("gap", [1e-1, -1e-3, 1e-4, 1e-5, -1e-6])
@pytest.mark.parametrize("size", [400, 60_000])
def test_a_shifted_identity_hides_nothing(size: int, gap: float, shift: float):
    """Of these a step leaves gap / √size: far less than 64 units of rounding, where a run was called exhausted."""
    op, eigenvalues = shifted(size, gap * abs(shift), shift=shift)
    for seed in range(3):
        assert contains(extremes(op, seed=seed, max_steps=40), eigenvalues), seed


def test_what_one_start_cannot_see_is_found_after_it():
    values = np.r_[np.full(20, 3.0), np.full(20, -1.0), np.full(40, 0.5)]
    op = as_operator(rotated(values))
    run = lanczos(op, steps=30)
    assert run.products == run.size == op.products == 30  # three would be enough for one copy of each
    assert not run.exhausted
    assert (np.abs(run.ritz_values - 3.0) < 1e-12).sum() > 5  # one start sees one copy
    # float32 is followed through rounding, and spends its products too
    assert lanczos(rotated(values, dtype=torch.float32), steps=30).products == 30


def missed(seeds: int, failure: float) -> float:
    """How often a certificate of six starts misses the gap, of which each start leaves too little to go on."""
    op, eigenvalues = shifted(50, 1e-6, torch.float64)
    misses = 0
    for seed in range(seeds):
        run = lanczos(op, steps=6, seed=seed)
        assert run.breakdowns == 6
        bound = certificate(run.cycles, run.ritz_values[-1], +1, dimension=50, failure=failure)
        misses += bound < eigenvalues.max()
    return misses / seeds


def test_a_certificate_of_several_starts_fails_as_often_as_it_says(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(importlib.import_module("hessdiag.spectral.lanczos"), "BREAKDOWN", 1e10)
    room = importlib.import_module("hessdiag.spectral.certificate")
    monkeypatch.setattr(room, "SPARED", 2.0**5)  # what six starts are allowed is then what was asked
    assert 0.07 < missed(1500, 0.1) < 0.13  # four standard errors; it is exact where a gap has rank one
    monkeypatch.setattr(room, "gammainccinv", lambda shape, share: -np.log(share))  # as if one start were all
    assert missed(300, 0.1) > 0.13


def test_the_failures_of_all_looks_add_up_to_what_was_asked():
    allowed = [1 - SPARED] + [SPARED / 2 ** (count - 1) for count in range(2, 60)]
    assert 1 - 1e-9 < sum(allowed) <= 1


class Precisions(TorchDispatchMode):
    """How exact products of float32 matrices were allowed to be, each time one was formed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "mm" in str(operation):
            self.seen.add(torch.get_float32_matmul_precision())
        return operation(*args, **(kwargs or {}))


def precisions() -> set[str]:
    op = large()
    torch.set_float32_matmul_precision("medium")
    try:
        with Precisions() as recorded:
            lanczos(op, steps=8)
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    return recorded.seen


def test_vectors_are_projected_in_full_precision_whatever_is_allowed():
    assert precisions() == {"highest"}


def test_this_promise_would_notice_tensorfloat(monkeypatch):
    monkeypatch.setattr(inner, "_taken", inner._taken.__wrapped__)
    assert precisions() != {"highest"}


BROKEN = {"no upper certificate": without_upper_certificate, "no lower certificate": without_lower_certificate}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    result = extremes(rotated(SPECTRA["semicircle"]), max_steps=8)
    assert contains(result, SPECTRA["semicircle"])
    assert not contains(breakage(result), SPECTRA["semicircle"])


def test_top_values_inside_a_continuum_are_warned_of():
    """A bulk up to 1 below an outlier of 100: values inside it are no single eigenvalues, and it says so."""
    bulk = torch.linspace(0, 1, 499, dtype=torch.float64)
    found = extremes(torch.diag(torch.cat([bulk, torch.tensor([100.0], dtype=torch.float64)])), top=5)
    assert any("continuum" in warning for warning in found.warnings)
    apart = torch.tensor([100.0, 50.0, 20.0, 10.0, 5.0], dtype=torch.float64)
    assert not extremes(torch.diag(torch.cat([bulk, apart])), top=5).warnings
