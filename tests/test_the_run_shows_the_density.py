"""Promise: the run that finds the ends shows the density, with an error that holds, and sure signs. (25 s)"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import eigh_tridiagonal

import hessdiag
from hessdiag.accuracy import EFFORTS
from hessdiag.analysis import run as sweep_run
from hessdiag.errors import UsageError
from hessdiag.operator import ClosureOperator
from hessdiag.spectral import Krylov, extremes, lanczos, measure, measure_of, negative, own_negative_mass, zone
from hessdiag.spectral.measure import Measure
from tests import models
from tests.seeds import seeds

SEEDS = seeds(2000)
RNG = np.random.default_rng(0)


def bulk(size: int) -> np.ndarray:
    """Two-sided, densest at zero, as that of a network."""
    return 0.05 * RNG.normal(size=size) * RNG.random(size)


SPECTRA = {
    "outliers": np.sort(np.r_[6.0 * np.arange(1, 41) ** -1.0, bulk(560)]),
    "no outliers": np.sort(np.random.default_rng(1).normal(size=500)),
    "many zeros": np.sort(np.r_[np.geomspace(0.01, 10, 40), np.zeros(400), -np.geomspace(0.001, 0.2, 60)]),
}


def diagonal(values: np.ndarray) -> ClosureOperator:
    """A start that is uniform on the sphere sees a diagonal matrix as it sees any other of its spectrum."""
    column = torch.from_numpy(values)[:, None]
    return ClosureOperator(lambda block: column * block, len(values))


def seen(values: np.ndarray, steps: int, seed: int = 0) -> tuple[Krylov, Measure]:
    run = lanczos(diagonal(values), steps=steps, seed=seed)
    found = measure_of(run)
    assert found is not None
    return run, found


def start(run: Krylov) -> np.ndarray:
    return run.basis[0].numpy()


def area(nodes: np.ndarray, weights: np.ndarray, values: np.ndarray) -> float:
    """Between two cumulative distributions, as a share of the mean |λ|."""
    grid = np.sort(np.r_[nodes, values])
    order = np.argsort(nodes)
    ours = np.r_[0, np.cumsum(weights[order])][np.searchsorted(nodes[order], grid, side="right")]
    true = np.searchsorted(values, grid, side="right") / len(values)
    return float((np.abs(ours - true)[:-1] * np.diff(grid)).sum() / np.abs(values).mean())


@pytest.mark.parametrize("steps", [5, 12])
def test_the_average_of_both_rules_is_exact_to_degree_2m_minus_1(steps):
    """One degree more than Gauss with as many nodes as the shorter rule: what anti-Gauss is for (Laurie 1996)."""
    values = SPECTRA["no outliers"]
    run, found = seen(values, steps)
    assert not found.converged.any()
    nodes, weights = found.rule
    size = float(np.abs(values).max())
    for power in range(2 * steps):
        true = float(start(run) ** 2 @ (values / size) ** power)
        assert float(weights @ (nodes / size) ** power) == pytest.approx(true, rel=1e-10, abs=1e-12), power


def test_what_stands_out_is_counted_one_by_one():
    values = SPECTRA["outliers"]
    _, found = seen(values, 60)
    spectrum = found.spectrum(1e-12)
    counted = np.array(spectrum.known.nodes)
    assert len(counted) >= 10
    ends = np.r_[values[: (counted < 0).sum()], values[len(values) - (counted > 0).sum() :]]
    assert counted == pytest.approx(ends, rel=1e-3)  # in order from both ends, none of them twice or missing
    assert spectrum.known.weights == pytest.approx([1 / len(values)] * len(counted))
    assert spectrum.outliers == tuple(sorted(spectrum.known.nodes, reverse=True))
    assert spectrum.mass() == pytest.approx(1, abs=1e-12)
    assert all(weight >= 0 for _, weight in spectrum.merged())
    true = float((values > 0.35).mean())
    assert spectrum.mass(0.35) == pytest.approx(true, abs=1e-12)


@functools.cache
def errors(name: str, steps: int) -> np.ndarray:
    """(true, stated) error over seeds."""
    values = SPECTRA[name]
    found = [seen(values, steps, seed)[1] for seed in range(min(SEEDS, 100))]
    return np.array([(area(*one.rule, values), one.error) for one in found])


@pytest.mark.parametrize("steps", [15, 30, 60])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_stated_error_holds_and_is_not_idle(name, steps):
    true, stated = errors(name, steps).T
    assert (true <= stated).mean() >= 0.93
    assert np.median(stated) <= 8 * np.median(true)


def test_a_deeper_run_knows_more():
    shallow, deep = (np.median(errors("outliers", steps)[:, 0]) for steps in (15, 60))
    assert deep < 0.4 * shallow


def share(values: np.ndarray, steps: int, seed: int) -> hessdiag.Estimate:
    run, found = seen(values, steps, seed)
    return own_negative_mass(diagonal(values), run, found.alphas, found.betas, 0.95)


def held(name: str) -> float:
    values = SPECTRA[name]
    true = float((values < 0).mean())
    found = [share(values, 25, seed) for seed in range(min(SEEDS, 400))]
    return float(np.mean([one.lo <= true <= one.hi for one in found]))


@pytest.mark.coverage
@pytest.mark.parametrize("name", SPECTRA)
def test_the_share_of_negative_eigenvalues_lies_in_its_interval(name):
    assert held(name) >= 0.95


def test_where_the_start_shows_everything_chance_alone_is_left():
    """Ten distinct values: after ten steps the measure is complete, and its law is that of Beta variables."""
    values = np.sort(np.repeat(np.r_[-np.arange(1.0, 5), np.arange(1.0, 7)], 30))
    found = [share(values, 30, seed) for seed in range(400)]
    assert all(one.hi - one.lo < 0.2 for one in found)
    rate = float(np.mean([one.lo <= 0.4 <= one.hi for one in found]))
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400) <= rate <= 0.95 + 4 * math.sqrt(0.95 * 0.05 / 400)


def test_signs_beyond_the_zone_are_sure():
    values = SPECTRA["outliers"]
    for seed in range(30):
        run, found = seen(values, 40, seed)
        x = found.spectrum(1e-12).unresolved
        assert 0 < x < values[-1]
        mass = start(run) ** 2
        for cut in (-x, x):
            true = float(mass[values < cut].sum())
            low = negative.share_below(found.alphas, found.betas, cut, closed=False)
            assert low - 1e-12 <= true <= low + zone.KNOWN_TO + 1e-12
    resolved = np.r_[-np.ones(100), np.ones(200)]
    assert seen(resolved, 2)[1].spectrum(1e-12).unresolved == 0


def test_three_times_the_steps_halve_the_zone():
    values = SPECTRA["outliers"]
    for steps, seed in ((30, 0), (30, 1), (50, 2)):
        short, long = (seen(values, m, seed)[1].spectrum(1e-12).unresolved for m in (steps, 3 * steps))
        assert 0 < long <= short / 2


def test_a_run_that_may_not_take_the_steps_asked_for_says_so():
    problem = models.mlp()
    asked = {"quantities": ["lambda_max", "density"], "steps": 30, "seed": 1}
    said = hessdiag.analyze(problem, max_steps=20, **asked).warnings
    assert any("took 20 of the 30 steps asked for: raise `max_steps`" in warning for warning in said)
    said = hessdiag.analyze(problem, budget="20p", **asked).warnings
    assert any("of the 30 steps asked for: it was ended early" in warning for warning in said)
    said = hessdiag.analyze(problem, **asked).warnings
    assert not any("steps asked for" in warning for warning in said)


def test_repeated_eigenvalues_are_not_counted_once():
    """A block that comes six times: its outliers are six each, and the start leans towards them as towards six."""
    block = np.r_[np.geomspace(1, 10, 12), 0.01 * np.random.default_rng(2).normal(size=88)]
    told = [seen(np.sort(np.tile(block, 6)), 40, seed)[1].simple for seed in range(40)]
    assert np.mean(told) < 0.1  # where fewer than five stand out, chance can look like six times as many
    simple = [seen(SPECTRA["outliers"], 40, seed)[1].simple for seed in range(200)]
    assert np.mean(simple) > 0.98


def repeated() -> hessdiag.Problem:
    """Linear regression of six outputs: H is six times the same block."""
    torch.manual_seed(0)
    x = models.randn(120, 40, seed=1) * torch.linspace(0.02, 3, 40).double() ** 3
    return hessdiag.Problem(
        torch.nn.Linear(40, 6, bias=False).double(), {"train": (x, models.randn(120, 6, seed=2))}, criterion="mse"
    )


def test_an_analysis_of_repeated_eigenvalues_takes_further_starts_or_states_its_error():
    values = torch.linalg.eigvalsh(models.dense_hessian(repeated())).numpy()
    further = []
    for seed in range(5):
        found = hessdiag.analyze(repeated(), ["lambda_max", "frobenius_squared", "density"], seed=seed, steps=13)
        further.append(any("further starts" in note and "not simple" in note for note in found.notes))
        true = area(*np.array(found.spectrum.merged()).T, values)
        assert true < 0.2 if further[-1] else true <= found.spectrum.error
    assert any(further)


def test_a_run_that_was_restarted_shows_no_density():
    values = SPECTRA["outliers"]
    assert measure_of(lanczos(diagonal(values), steps=40, max_basis=12)) is None
    assert measure_of(lanczos(diagonal(values), steps=40)) is not None


def test_a_run_goes_on_until_the_density_is_known():
    op = diagonal(SPECTRA["outliers"])
    short, long = (extremes(op, density=error).krylov for error in (0.3, 0.04))
    assert short.size < long.size < 100
    found = measure_of(long)
    assert found is not None and found.depth <= 0.04
    assert extremes(op, which=(), density=0.3).krylov.size > 4  # two nodes cannot be held against themselves
    with pytest.raises(UsageError, match="density=2"):
        extremes(op, density=2.0)


def mnist_mlp() -> np.ndarray:
    """As many eigenvalues beyond each share of the largest as a trained MLP of 55,050 parameters has."""
    ranks = np.log(np.arange(1, 2501))
    up = np.interp(
        ranks, np.log([1, 16, 76, 367, 1129, 1686, 2500]), np.log([1, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-5])
    )
    down = np.interp(ranks, np.log([1, 30, 300, 1789, 2500]), np.log([0.027, 0.012, 5e-3, 1e-3, 1e-5]))
    return np.sort(np.r_[np.exp(up), np.zeros(50_050), -np.exp(down)])


def held_early(steps: int) -> float:
    """How often the stated error holds after so many steps."""
    values = mnist_mlp()
    found = [seen(values, steps, seed)[1] for seed in range(20)]
    return float(np.mean([area(*one.rule, values) <= one.error for one in found]))


@pytest.mark.parametrize("steps", [8, 12, 18])
def test_the_stated_error_holds_of_few_steps_too(steps):
    assert held_early(steps) == 1


def test_a_quick_density_is_as_good_as_asked():
    values, quick = mnist_mlp(), EFFORTS["quick"]
    for seed in range(10):
        run = extremes(
            diagonal(values),
            rtol=quick.lambda_max,
            rtol_min=quick.lambda_min,
            failure=quick.failure,
            density=quick.density,
            seed=seed,
        ).krylov
        found = measure_of(run)
        assert found is not None and found.depth <= quick.density
        assert area(*found.rule, values) <= found.error


def test_a_density_that_is_not_reached_is_said():
    (said,) = extremes(diagonal(SPECTRA["outliers"]), which=("max",), density=0.02, max_steps=20).warnings
    assert "density is known to" in said and "raise max_steps" in said


def gauss_twice(alphas: np.ndarray, betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    nodes, vectors = eigh_tridiagonal(alphas, np.r_[betas[:-1], betas[-1] / math.sqrt(2)])
    return nodes, vectors[0] ** 2


BROKEN: dict[str, tuple[object, str, Callable, Callable]] = {
    "a rule is held against itself": (measure, "UNKNOWN", 0.0, test_a_run_goes_on_until_the_density_is_known),
    "few steps count as many": (measure, "EARLY", 0.0, lambda: test_the_stated_error_holds_of_few_steps_too(18)),
    "the rule itself for anti-Gauss": (
        measure,
        "gauss",
        gauss_twice,
        lambda: test_the_average_of_both_rules_is_exact_to_degree_2m_minus_1(12),
    ),
    "every converged value is taken for simple": (
        measure,
        "SIMPLE",
        -1.0,
        test_repeated_eigenvalues_are_not_counted_once,
    ),
    "values that stand out are weighed": (measure, "OUTSIDE", 1e9, test_what_stands_out_is_counted_one_by_one),
    "values that have not converged are counted": (
        measure,
        "CONVERGED",
        1e3,
        test_what_stands_out_is_counted_one_by_one,
    ),
    "chance is left out": (
        negative,
        "least_share",
        lambda weight, *_: weight,
        test_where_the_start_shows_everything_chance_alone_is_left,
    ),
    "the zone is a quarter as wide": (
        measure,
        "unresolved",
        lambda *a, **k: zone.unresolved(*a, **k) / 4,
        test_signs_beyond_the_zone_are_sure,
    ),
    "depth makes no zone narrower": (
        measure,
        "unresolved",
        lambda parts, *_, **__: float(np.abs(parts[0][0]).max()),
        test_three_times_the_steps_halve_the_zone,
    ),
    "steps that were not taken are not said": (
        sweep_run,
        "_cut_short",
        lambda *_: [],
        test_a_run_that_may_not_take_the_steps_asked_for_says_so,
    ),
}


@pytest.mark.parametrize(("place", "name", "broken", "promise"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(place, name, broken, promise, monkeypatch):
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(AssertionError):
        promise()


def test_an_error_without_depth_would_be_noticed():
    true, _ = errors("outliers", 15).T
    _, deep = errors("outliers", 60).T
    assert (true <= deep).mean() < 0.93
