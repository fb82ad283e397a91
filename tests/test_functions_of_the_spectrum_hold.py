"""Promise: tr f(H) from a density holds the truth in its interval; where f is not finite it is refused. (40 s)

Oracle: numpy.linalg.eigvalsh of the dense matrix.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hessdiag
from hessdiag.errors import UsageError
from hessdiag.results import functions
from hessdiag.results.quadrature import gauss
from hessdiag.spectral import lanczos
from hessdiag.spectral.lockstep import lanczos_block
from hessdiag.spectral.measure import measure_of
from tests import models
from tests.seeds import band, seeds

SIZE = 200


def rotated(values):
    Q = torch.linalg.qr(models.randn(SIZE, SIZE, seed=1)).Q
    A = (Q * values) @ Q.T
    return ((A + A.T) / 2).numpy()


X = models.randn(100, SIZE)
SPECTRA = {
    "network": torch.cat([torch.tensor([10.0, 5, 3, -0.2]), 0.05 * models.randn(SIZE - 4).abs()]),
    "rank deficient": torch.linalg.eigvalsh(X.T @ X / 100),
    "semicircle": torch.cos(torch.linspace(0.01, 3.13, SIZE, dtype=torch.float64)),
    "geometric": 0.9 ** torch.arange(SIZE, dtype=torch.float64),
}


def logarithm(damping):
    return lambda x: np.log(x + damping)


FUNCTIONS = {
    "log-determinant": lambda values: logarithm(1e-3 * abs(values).max() + max(0.0, -1.01 * values.min())),
    "Schatten 1": lambda values: np.abs,
    "Schatten 4": lambda values: lambda x: x**4,
    "inverse": lambda values: lambda x: 1 / (x + 0.1 + max(0.0, -1.01 * values.min())),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", SPECTRA)
def test_all_known_is_exact(name, function):
    A = rotated(SPECTRA[name])
    values = np.linalg.eigvalsh(A)
    f = FUNCTIONS[function](values)
    found = hessdiag.spectrum(A, krylov=lanczos(A, steps=SIZE)).apply(f)
    assert found.kind == "exact" and found.confidence == 1.0 and found.lo == found.value == found.hi
    np.testing.assert_allclose(found.value, f(values).sum(), rtol=1e-8, atol=1e-8)


def test_a_basis_of_starts_leaves_depth_alone():
    A = rotated(SPECTRA["semicircle"])
    values = np.linalg.eigvalsh(A)
    found = hessdiag.spectrum(A, probes=SIZE, steps=20).apply(np.exp)
    assert found.stderr == 0.0
    np.testing.assert_allclose(found.value, np.exp(values).sum(), rtol=1e-10)
    rough = hessdiag.spectrum(A, probes=SIZE, steps=12).apply(np.abs)
    assert rough.lo <= np.abs(values).sum() <= rough.hi and rough.lo < rough.hi


def test_powers_are_the_moments():
    A = rotated(SPECTRA["geometric"])
    density = hessdiag.spectrum(A, probes=8, steps=10, seed=3)
    assert density.apply(lambda x: 1.0).value == pytest.approx(SIZE)
    same = hessdiag.spectral.density(hessdiag.as_operator(A), 8, 10, 3).forms
    assert density.apply(lambda x: x).value == pytest.approx(same.trace.mean())
    assert density.apply(lambda x: x**2).value == pytest.approx(same.squares.mean())


def start(A, seed):
    run = lanczos(A, steps=40, seed=seed)
    return measure_of(run).spectrum(1e-12)


WAYS = {
    "starts": lambda A, seed: hessdiag.spectrum(A, probes=12, steps=15, seed=seed),
    "deflated": lambda A, seed: hessdiag.spectrum(
        A, probes=12, steps=15, seed=seed, krylov=lanczos(A, steps=16, seed=seed)
    ),
    "one start": start,
}


@pytest.mark.coverage
@pytest.mark.parametrize(
    ("name", "way"),
    [("network", "starts"), ("network", "one start"), ("rank deficient", "one start"), ("network", "deflated")],
)
def test_intervals_cover(name, way):
    """Of the log-determinant and the Schatten 1 norm: depth is added to chance, so more may hold than 95%."""
    A = rotated(SPECTRA[name])
    A = np.diag(np.linalg.eigvalsh(A)) if way == "one start" else A  # its start is uniform in any basis
    values = np.linalg.eigvalsh(A)
    chosen = [FUNCTIONS[function](values) for function in ("log-determinant", "Schatten 1")]
    number = seeds(1000)
    held = np.zeros(2)
    for seed in range(number):
        density = WAYS[way](A, seed)
        for place, f in enumerate(chosen):
            found = density.apply(f, within=(values[0], values[-1]))
            held[place] += found.lo <= f(values).sum() <= found.hi
    assert (held / number >= band(number, 0.92)[0]).all()


def test_a_start_alone_knows_its_chance_and_its_depth():
    A = np.diag(SPECTRA["network"].numpy())
    found = start(A, 0).apply(np.abs)
    assert found.stderr > 0 and found.lo < found.value < found.hi


def no_array(x):
    return float(x)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (lambda s: s.apply(np.log), "f is not finite at -"),
        (lambda s: s.apply(lambda x: 1 / x), "f is not finite"),
        (lambda s: s.apply(no_array), "must take an array"),
        (lambda s: s.apply(lambda x: x + 1j), "must take an array"),
        (lambda s: s.apply(lambda x: x[:2]), "must take an array"),
        (lambda s: s.apply(np.abs, confidence=1.0), "0.95"),
        (lambda s: s.apply(lambda x: np.log(x + 0.21), within=(-0.3, 11.0)), "f is not finite at -0.3"),
    ],
)
def test_what_is_not_finite_is_refused_in_one_line(asked, text):
    density = hessdiag.spectrum(np.diag(SPECTRA["network"].numpy() - 1e-9), probes=8, steps=20)
    with pytest.raises(UsageError, match=text) as refusal:
        asked(density)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("steps", [12, 20])
def test_the_rules_recurrence_is_found_again(steps):
    alphas, betas, _ = lanczos_block(
        hessdiag.as_operator(rotated(SPECTRA["network"])), models.randn(1, SIZE), steps
    )
    a, b = functions._jacobi(*gauss(alphas[0], betas[0, :-1]), steps)
    np.testing.assert_allclose(a, alphas[0], atol=1e-8)
    np.testing.assert_allclose(b, betas[0, :-1], atol=1e-8)


def test_a_pole_between_known_eigenvalues_is_none():
    values = np.array([-1.0, 2.0, 4.0])
    found = hessdiag.spectrum(np.diag(values), krylov=lanczos(np.diag(values), steps=3)).apply(lambda x: 1 / x)
    assert found.kind == "exact" and found.value == pytest.approx(-0.25)


def test_a_pole_between_nodes_is_met():
    density = hessdiag.spectrum(rotated(SPECTRA["semicircle"]), probes=4, steps=5)
    with pytest.raises(UsageError, match="not finite"):
        density.apply(lambda x: np.where(np.abs(x) < 0.05, np.nan, x))


BROKEN = {
    "depth is left out": ("_between_rules", lambda *_: 0.0),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    A = rotated(SPECTRA["rank deficient"])
    f = logarithm(1e-6)
    truth = f(np.linalg.eigvalsh(A).clip(min=0)).sum()
    density = hessdiag.spectrum(A, probes=SIZE, steps=20)
    found = density.apply(f)
    assert found.lo <= truth <= found.hi
    monkeypatch.setattr(functions, *breakage)
    wrong = density.apply(f)
    assert not wrong.lo <= truth <= wrong.hi
