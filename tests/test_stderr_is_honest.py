"""Promise: a 95% interval covers the truth 95 times in 100 over seeds, and a bracket always does. (60 s)"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from hessdiag.operator import as_operator
from hessdiag.results import Metric
from hessdiag.spectral import (
    deflation,
    density,
    effective_rank_from,
    extremes,
    forms,
    frobenius_squared_from,
    lanczos,
    negative_mass,
    trace_from,
    wolkowicz_styan,
)
from tests.models import rotated
from tests.seeds import band, seeds

pytestmark = pytest.mark.coverage
SEEDS = seeds(2000)
BAND = band(SEEDS)
DIMENSION = 100
SPECTRA = {  # name: (eigenvalues, Lanczos steps to deflate, probes)
    "trained": (
        np.r_[
            np.geomspace(0.5, 10, 8),
            0.05 * np.random.default_rng(1).normal(size=72),
            -0.2 * np.random.default_rng(2).random(20),
        ],
        6,
        24,
    ),
    "semicircle": (2 * np.random.default_rng(3).beta(1.5, 1.5, DIMENSION) - 0.7, 0, 16),
    "low rank plus noise": (
        np.r_[
            np.random.default_rng(4).exponential(1, 10), 0.01 * np.abs(np.random.default_rng(5).normal(size=90))
        ],
        0,
        24,
    ),
}
QUANTITIES = ("trace", "frobenius_squared", "effective_rank", "ws_upper", "ws_lower")


def truth(name: str) -> np.ndarray:
    eigenvalues = SPECTRA[name][0]
    d, t1, t2 = len(eigenvalues), eigenvalues.sum(), np.square(eigenvalues).sum()
    m, s = t1 / d, np.sqrt(t2 / d - (t1 / d) ** 2)
    return np.array([t1, t2, t1**2 / t2, m + s * np.sqrt(d - 1), m - s * np.sqrt(d - 1)])


@functools.cache
def measured(name: str) -> np.ndarray:
    """Value, lo and hi over seeds, (seeds, quantities, 3)."""
    eigenvalues, steps, probes = SPECTRA[name]
    op = as_operator(rotated(eigenvalues, seed=6))
    rows = []
    for seed in range(SEEDS):
        krylov = lanczos(op, steps=steps, seed=seed) if steps else None
        values = forms(op, krylov, probes, seed)
        t1, t2 = trace_from(values), frobenius_squared_from(values)
        ws = wolkowicz_styan(t1, t2, op.size)
        results: list[Metric] = [t1, t2, effective_rank_from(values), ws.upper, ws.lower]
        rows.append([(r.value, r.lo, r.hi) for r in results])
    return np.array(rows)


def coverage(samples: np.ndarray, true: np.ndarray) -> np.ndarray:
    return ((samples[..., 1] <= true) & (true <= samples[..., 2])).mean(axis=0)


def honest(samples: np.ndarray, true: np.ndarray) -> bool:
    shares = coverage(samples, true)
    errors = samples[:, :2, 0] - true[:2]  # trace and Frobenius are unbiased: 4 sigma fail 1 time in 16,000
    unbiased = np.abs(errors.mean(axis=0)) < 4 * errors.std(axis=0) / np.sqrt(len(errors))
    return bool(((shares >= BAND[0]) & (shares <= BAND[1])).all() and unbiased.all())


@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_cover_as_often_as_they_say(name: str):
    shares = coverage(measured(name), truth(name))
    assert honest(measured(name), truth(name)), dict(zip(QUANTITIES, shares.tolist(), strict=True))


def widened(samples: np.ndarray, factor: float) -> np.ndarray:
    value = samples[..., :1]
    return np.concatenate([value, value + factor * (samples[..., 1:] - value)], axis=2)


BROKEN = {
    "one percent bias": lambda samples: 1.01 * samples,
    "standard error halved": lambda samples: widened(samples, 0.5),
    "standard error doubled": lambda samples: widened(samples, 2.0),
    "standard error of half as many probes": lambda samples: widened(samples, np.sqrt(2)),
    "lower end missing": lambda samples: np.stack([samples[..., 0], samples[..., 0], samples[..., 2]], axis=2),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert not honest(breakage(measured("trained")), truth("trained"))


SMALL = np.r_[np.geomspace(0.5, 5, 4), 0.2 * np.random.default_rng(7).normal(size=36)]


@functools.cache
def bracketed() -> np.ndarray:
    """lo and hi of lambda_max, lambda_min and the negative share over seeds, (seeds, 3, 2), from few products."""
    op = as_operator(rotated(SMALL, seed=6))
    rows = []
    for seed in range(SEEDS):
        run = extremes(op, seed=seed, max_steps=4)
        share = negative_mass(density(op, 4, 4, seed), confidence=0.95)
        assert run.lambda_max is not None and run.lambda_min is not None
        rows.append([(r.lo, r.hi) for r in (run.lambda_max, run.lambda_min, share)])
    return np.array(rows)


def always(samples: np.ndarray) -> bool:
    true = np.array([SMALL.max(), SMALL.min(), (SMALL < 0).mean()])
    return bool(((samples[..., 0] <= true) & (true <= samples[..., 1])).all())


def test_brackets_always_hold_the_truth():
    assert always(bracketed())
    width = bracketed()[:, 2, 1] - bracketed()[:, 2, 0]
    assert width.mean() < 0.9  # and say something, after 4 probes of 4 steps


@pytest.mark.parametrize(("index", "side"), [(0, 1), (1, 0)], ids=["no upper certificate", "no lower one"])
def test_a_missing_certificate_would_be_noticed(index: int, side: int):
    samples = bracketed().copy()
    samples[:, index, side] = samples[:, index, 1 - side]
    assert not always(samples)


def spread_next_to_diagonal() -> float:
    """Spread of deflated probes of a matrix next to diagonal, over that of vectors uniform on the sphere."""
    rng = np.random.default_rng(8)
    diagonal = np.r_[np.geomspace(1, 20, 6), 1 + rng.random(194)]
    noise = 0.01 * rng.normal(size=(200, 200))
    matrix = np.diag(diagonal) + noise + noise.T
    op = as_operator(matrix)
    krylov = lanczos(op, steps=6)
    P = np.eye(200) - krylov.basis.numpy().T @ krylov.basis.numpy()
    B = P @ matrix @ P
    left = 200 - 6
    sphere = np.sqrt(2 * left / (left + 2) * (np.square(B).sum() - B.trace() ** 2 / left))
    return float(forms(op, krylov, 150, 0).trace.std(ddof=1) / sphere)


def test_probes_keep_little_of_the_diagonal():
    assert spread_next_to_diagonal() < 0.8


def test_this_promise_would_notice_probes_on_the_sphere(monkeypatch):
    monkeypatch.setattr(deflation, "_signs", deflation._on_the_sphere)
    assert spread_next_to_diagonal() > 0.9
