"""Promise: the density is quadrature: mass 1, exact moments, unbiased, deflated or not. (10 s)"""

from __future__ import annotations

import dataclasses
import functools
from importlib import import_module

import numpy as np
import pytest
import torch

from hessdiag.errors import BudgetError
from hessdiag.operator import as_operator
from hessdiag.results import Quadrature, Spectrum
from hessdiag.results.quadrature import gauss, share_below
from hessdiag.spectral import density, known_half, lanczos, negative_mass, spectrum, zone
from hessdiag.spectral.deflation import unit_probes
from hessdiag.spectral.density import STREAM
from hessdiag.spectral.lockstep import lanczos_block
from tests.models import rotated

RNG = np.random.default_rng(0)
EIGENVALUES = np.r_[np.geomspace(0.5, 10, 6), 0.2 * (2 * RNG.beta(1.5, 1.5, 54) - 1)]
SIZE = len(EIGENVALUES)


MATRIX = rotated(EIGENVALUES, seed=1)
STEPS, PROBES = 6, 5


def moment(quadrature: Quadrature, power: int) -> float:
    return float(np.dot(quadrature.weights, np.array(quadrature.nodes) ** power))


def run(krylov_steps: int, seed: int = 0, max_basis: int | None = None) -> Spectrum:
    krylov = lanczos(MATRIX, steps=krylov_steps, max_basis=max_basis) if krylov_steps else None
    return spectrum(MATRIX, probes=PROBES, steps=STEPS, seed=seed, krylov=krylov)


@pytest.mark.parametrize(("krylov_steps", "max_basis"), [(0, None), (12, None), (40, 14)])
def test_weights_are_a_measure_of_mass_one(krylov_steps: int, max_basis: int | None):
    result = run(krylov_steps, max_basis=max_basis)
    assert result.mass() == pytest.approx(1.0, abs=1e-12)
    assert result.per_probe_mass(-np.inf, np.inf) == pytest.approx([1.0] * PROBES, abs=1e-12)
    assert all(weight >= 0 for _, weight in result.merged())


@pytest.mark.parametrize(("krylov_steps", "max_basis"), [(12, None), (40, 14)])
def test_the_known_part_has_exact_moments(krylov_steps: int, max_basis: int | None):
    krylov = lanczos(MATRIX, steps=krylov_steps, max_basis=max_basis)
    known = known_half(krylov)
    assert known is not None
    result = spectrum(MATRIX, probes=2, steps=STEPS, krylov=krylov)
    for power in range(2 * (krylov.size - known.size) + 2):
        true = (
            torch.einsum("id,de,ie->", known.basis, torch.linalg.matrix_power(MATRIX, power), known.basis) / SIZE
        )
        assert moment(result.known, power) == pytest.approx(float(true), rel=1e-11)


def moments_match(rule: tuple[np.ndarray, np.ndarray], vector: np.ndarray) -> bool:
    nodes, weights = rule
    true = [vector @ np.linalg.matrix_power(MATRIX.numpy(), p) @ vector for p in range(2 * STEPS)]
    found = [(weights * nodes**p).sum() for p in range(2 * STEPS)]
    return bool(np.allclose(found, true, rtol=1e-11, atol=0))


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_gauss_is_exact_to_degree_2m_minus_1(reorthogonalize: bool):
    starts = torch.randn(3, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    starts /= starts.norm(dim=1, keepdim=True)
    alphas, betas, lengths = lanczos_block(as_operator(MATRIX), starts, STEPS, reorthogonalize=reorthogonalize)
    assert (lengths == STEPS).all()
    for start, a, b in zip(starts.numpy(), alphas, betas, strict=True):
        assert moments_match(gauss(a, b[:-1]), start)


@functools.cache
def runs(krylov_steps: int) -> tuple[Spectrum, ...]:
    return tuple(run(krylov_steps, seed) for seed in range(200))


def unbiased(krylov_steps: int, change=lambda result: result) -> bool:
    """Mean of tr f over 200 seeds within 4 sigma of the truth, f analytic so that 6 steps integrate it."""
    truth = np.exp(-EIGENVALUES / 5).mean()
    found = []
    for result in runs(krylov_steps):
        nodes, weights = np.array(change(result).merged()).T
        found.append((weights * np.exp(-nodes / 5)).sum())
    error = np.array(found) - truth
    return bool(abs(error.mean()) < 4 * error.std() / len(found) ** 0.5 + 1e-7)  # 1e-7: the Gauss rule's error


@pytest.mark.parametrize("krylov_steps", [0, 12])
def test_the_density_is_unbiased(krylov_steps: int):
    assert unbiased(krylov_steps)


BROKEN = {
    "known part forgotten": lambda r: dataclasses.replace(r, known=Quadrature(nodes=(), weights=())),
    "known part counted twice": lambda r: dataclasses.replace(
        r, known=dataclasses.replace(r.known, weights=tuple(2 * w for w in r.known.weights))
    ),
    "nodes a percent of the largest off": lambda r: dataclasses.replace(
        r, probes=tuple(dataclasses.replace(p, nodes=tuple(n + 0.1 for n in p.nodes)) for p in r.probes)
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert not unbiased(12, breakage)


def test_squared_eigenvectors_would_be_noticed():
    start = np.random.default_rng(2).normal(size=SIZE)
    start /= np.linalg.norm(start)
    alphas, betas, _ = lanczos_block(as_operator(MATRIX), torch.from_numpy(start)[None], STEPS)
    nodes, weights = gauss(alphas[0], betas[0, :-1])
    assert moments_match((nodes, weights), start)
    assert not moments_match((nodes, np.sqrt(weights) / np.sqrt(weights).sum()), start)


def test_radau_brackets_every_measure_rigorously():
    matrix = MATRIX.numpy()
    values, vectors = np.linalg.eigh(matrix)
    for seed in range(50):
        start = np.random.default_rng(seed).normal(size=SIZE)
        start /= np.linalg.norm(start)
        shares = (vectors.T @ start) ** 2
        alphas, betas, _ = lanczos_block(as_operator(MATRIX), torch.from_numpy(start)[None], 5 + seed % 20)
        for cut in (-0.05, 0.0, 0.03, 1.0):
            true = shares[values < cut].sum()
            low = share_below(alphas[0], betas[0], cut, closed=False)
            high = share_below(alphas[0], betas[0], cut, closed=True)
            assert low - 1e-12 <= true <= high + 1e-12


def test_the_forms_of_the_starts_are_theirs():
    op = as_operator(MATRIX)
    krylov = lanczos(op, steps=12)
    known = known_half(krylov)
    assert known is not None
    found = density(op, PROBES, STEPS, 3, krylov).forms
    starts = torch.cat(list(unit_probes(op, known, PROBES, 3, STREAM)))
    images = starts @ MATRIX
    bulk = images - images @ known.basis.T @ known.basis
    left = SIZE - known.size
    trace = float(np.trace(known.T)) + left * (starts * images).sum(1)
    squares = float(np.square(known.T).sum()) + 2 * known.beta**2 + left * bulk.square().sum(1)
    np.testing.assert_allclose(found.trace, trace, rtol=1e-12)
    np.testing.assert_allclose(found.squares, squares, rtol=1e-12)
    assert found.products == krylov.products + PROBES * STEPS


def test_outliers_are_the_converged_ritz_values_off_the_bulk():
    krylov = lanczos(MATRIX, steps=30)
    found = spectrum(MATRIX, probes=4, steps=10, krylov=krylov).outliers
    np.testing.assert_allclose(found, np.sort(EIGENVALUES)[::-1][: len(found)], rtol=1e-9)
    assert len(found) == 6  # the geometric outliers, and none of the bulk


def test_one_probe_has_no_bracket():
    with pytest.raises(BudgetError, match="at least 2"):
        negative_mass(density(as_operator(MATRIX), 1, STEPS, 0))


@pytest.mark.parametrize("krylov_steps", [0, 12])
def test_signs_beyond_the_zone_are_sure(krylov_steps: int):
    """The measure that the starts and the known part have in truth, against the rules drawn."""
    beyond_the_zone_signs_are_sure(krylov_steps)


def beyond_the_zone_signs_are_sure(krylov_steps: int) -> None:
    op, result = as_operator(MATRIX), run(krylov_steps)
    values, vectors = np.linalg.eigh(MATRIX.numpy())
    known = known_half(lanczos(MATRIX, steps=krylov_steps)) if krylov_steps else None
    share = (SIZE - (known.size if known else 0)) / SIZE
    starts = torch.cat(list(unit_probes(op, known, PROBES, 0, STREAM))).numpy()
    masses = share * ((starts @ vectors) ** 2).mean(axis=0)
    if known is not None:
        masses = masses + ((known.basis.numpy() @ vectors) ** 2).sum(axis=0) / SIZE
    assert 0 < result.unresolved < values[-1]
    for cut in (-result.unresolved, result.unresolved):
        assert result.mass(-np.inf, cut) == pytest.approx(masses[values < cut].sum(), abs=zone.KNOWN_TO)


def test_a_zone_left_out_of_further_starts_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_module("hessdiag.spectral.density"), "unresolved", lambda *_, **__: 1e-3)
    with pytest.raises(AssertionError):
        for steps in (0, 12):
            beyond_the_zone_signs_are_sure(steps)


def test_every_eigenvalue_known_leaves_no_zone():
    whole_run = lanczos(MATRIX, steps=SIZE)
    assert whole_run.exhausted
    result = spectrum(MATRIX, probes=2, steps=STEPS, krylov=whole_run)
    assert result.whole and result.unresolved == 0
    assert not run(12).whole
