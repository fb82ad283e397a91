"""Promise: asked for an accuracy, the trace's probes stop there, and the interval covers. (25 s)"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.analysis import settled, traces
from hessdiag.errors import UsageError
from hessdiag.operator import as_operator
from hessdiag.results.interval import PILOT, enough
from hessdiag.settings import MOST_PROBES, Settings
from hessdiag.spectral import deflation, forms_for, lanczos, moments
from hessdiag.spectral import enough as planning
from hessdiag.spectral.enough import FEWEST, SHORT, Goal
from tests import models
from tests.seeds import band, seeds

SEEDS = seeds(2000)
BAND = band(SEEDS)
# zᵀHz of signs z: two sums of 200 terms, whose absolute values sum to at most 200 ‖H‖ = 35 tr(H)
ROUNDING = 35 * 2 * math.sqrt(200) * np.finfo(float).eps
SPECTRUM = np.r_[np.geomspace(0.5, 10, 8), 0.3 * np.random.default_rng(1).random(192)]
MATRIX = models.rotated(SPECTRUM, seed=6)


def asked(rtol: float, seed: int = 0, probes: int = 150, deflate: int = 0) -> hessdiag.Estimate:
    return hessdiag.trace(MATRIX, probes=probes, seed=seed, rtol=rtol, deflate=deflate)


def test_as_many_probes_as_the_tolerance_needs():
    many = hessdiag.trace(MATRIX, probes=150, seed=1)
    spread = many.stderr * math.sqrt(150) / SPECTRUM.sum()
    assert len(asked(0.5).per_probe) == PILOT
    for rtol in (spread / 4, spread / 6):
        numbers = [len(asked(rtol, seed).per_probe) for seed in range(20)]
        assert np.mean(numbers) == pytest.approx((spread / rtol) ** 2, rel=0.4)
        assert len(set(numbers)) > 5  # every run decides by itself
    # a longer run begins with a shorter one's probes, and a run without tolerance with both; not to the bit,
    # because blocks of another width are multiplied by other kernels
    long, short = asked(0.05).per_probe, asked(0.5).per_probe
    fixed = hessdiag.trace(MATRIX, probes=len(long)).per_probe
    assert fixed == pytest.approx(long, rel=ROUNDING)
    assert long[: len(short)] == pytest.approx(short, rel=ROUNDING)
    assert np.ptp(long) > 1e6 * ROUNDING * np.mean(long)  # so that other probes are told apart
    assert asked(0.05).provenance.products == len(long) + PILOT


@functools.cache
def over_seeds() -> tuple[float, float]:
    """Bias in its own standard errors, and how often the interval holds the truth."""
    found = [asked(0.01, seed, deflate=6) for seed in range(SEEDS)]  # 8 to 60 probes; 8 alone cover 0.93
    values = np.array([one.value for one in found])
    held = float(np.mean([one.lo <= SPECTRUM.sum() <= one.hi for one in found]))
    return float((values.mean() - SPECTRUM.sum()) / values.std() * math.sqrt(SEEDS)), held


@pytest.mark.coverage
def test_stopping_moves_no_value_and_shortens_no_interval():
    bias, held = over_seeds()
    assert abs(bias) < 4
    assert BAND[0] <= held <= BAND[1]


PLANNED = SEEDS // 2
GOAL = Goal(trace=0.01, square=0.02, confidence=0.95, most=150)


@functools.cache
def planned() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per seed and moment: its error, whether its interval holds, and how wide it is for what was asked."""
    true = np.array([SPECTRUM.sum(), np.square(SPECTRUM).sum()])
    rows = []
    for seed in range(PLANNED):
        op = as_operator(MATRIX)
        krylov = lanczos(op, steps=12, seed=seed)
        found = forms_for(op, krylov, GOAL, seed)
        both = [moments.trace_from(found), moments.frobenius_squared_from(found)]
        asked = np.array([GOAL.trace, GOAL.square]) * true
        rows.append(
            (
                [one.value - t for one, t in zip(both, true, strict=True)],
                [one.lo <= t <= one.hi for one, t in zip(both, true, strict=True)],
                [(one.hi - one.lo) / 2 / a for one, a in zip(both, asked, strict=True)],
            )
        )
    errors, held, widths = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    return errors, held, widths


@pytest.mark.coverage
def test_probes_counted_by_the_run_are_enough_and_cover():
    errors, held, widths = planned()
    assert (np.abs(errors.mean(0)) < 4 * errors.std(0) / math.sqrt(PLANNED)).all()
    low, high = band(PLANNED, 0.93, 0.98)
    assert ((held.mean(0) >= low) & (held.mean(0) <= high)).all(), held.mean(0)
    assert (widths.max(1) <= SHORT * 1.4).mean() > 0.95
    assert np.median(widths.max(1)) > 0.6  # and no more than it takes


def test_the_most_is_the_most():
    found = asked(0.001, probes=20)
    assert len(found.per_probe) == 20 - PILOT
    assert found.stderr > 0.001 * found.value


@pytest.mark.parametrize("rtol", [0.0, 1.0, -0.1])
def test_tolerances_out_of_range_are_refused(rtol: float):
    with pytest.raises(UsageError, match="rtol"):
        asked(rtol)
    with pytest.raises(UsageError, match="accuracy='trace"):
        Settings(accuracy={"trace": rtol})


def smooth() -> hessdiag.Problem:
    """Few outputs, so that tr(G) is exact, and curved tensors, whose tr(R) takes probes; no closed form."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)]
    data = (models.randn(60, 6), models.labels(60, 3))
    return hessdiag.Problem(nn.Sequential(*layers).double(), {"train": data}, criterion="cross_entropy")


def analysis(half: float | None, *quantities: str, problem: hessdiag.Problem | None = None, **options: object):
    """With half the trace's interval as asked, or with 32 probes."""
    known: dict[str, object] = {"probes": 32} if half is None else {"accuracy": {"trace": half}}
    return hessdiag.analyze(problem or smooth(), ["trace", *quantities], **known, **options)


def probes(found: hessdiag.Analysis) -> int:
    return len(found.metrics["trace"].per_probe)


def test_probes_of_the_residual_stop_too():
    everything, loose, tight = analysis(None), analysis(0.4), analysis(0.06)
    assert probes(everything) == 32
    assert probes(loose) == PILOT < probes(tight) <= MOST_PROBES - PILOT
    assert loose.cost.products < everything.cost.products
    truth = float(models.dense_hessian(smooth()).trace())
    for found in (loose, tight):
        trace = found.metrics["trace"]
        assert trace.lo <= truth <= trace.hi
        assert "tr(G) exactly" in trace.provenance.method
        assert trace.provenance.settings["probes"] == probes(found) == trace.provenance.products - PILOT
        assert all(row.lo <= row.trace <= row.hi for row in found.layers)


def test_what_is_not_reached_is_said_with_what_it_takes():
    found = analysis(0.001)
    trace = found.metrics["trace"]
    (said,) = [text for text in found.warnings if "trace is known to" in text]
    needed = int(said.split("probes=")[1].rstrip("`"))
    reached = (trace.hi - trace.lo) / 2 / abs(trace.value)
    assert needed == math.ceil(len(trace.per_probe) * (reached / 0.001) ** 2)
    assert not [text for text in analysis(0.4).warnings if "trace is known to" in text]


def bare() -> hessdiag.Problem:
    """The same as a loss alone: the trace comes from probes on H."""
    problem = smooth()
    return hessdiag.Problem(
        problem.model,
        problem.data,
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )


def test_probes_on_the_hessian_are_as_many_as_the_run_says():
    alone = analysis(0.4, problem=bare())
    assert FEWEST <= probes(alone) < 2 * FEWEST
    assert len(alone.layers) == 6
    assert sum(row.trace for row in alone.layers) == pytest.approx(alone.metrics["trace"].value, rel=1e-9)
    shared = analysis(0.4, "frobenius_squared", problem=bare(), effort="thorough")
    assert probes(shared) > FEWEST
    square = shared.metrics["frobenius_squared"]
    assert (square.hi - square.lo) / 2 <= SHORT * 0.01 * square.value or len(square.per_probe) == MOST_PROBES


def test_where_every_direction_is_explored_a_tolerance_changes_nothing():
    layers = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)]
    torch.manual_seed(0)
    problem = hessdiag.Problem(
        nn.Sequential(*layers).double(),
        {"train": (models.randn(64, 3), models.labels(64, 3))},
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )
    plain, tolerant = analysis(None, problem=problem), analysis(0.4, problem=problem)
    assert plain.metrics["trace"].kind == "exact"
    assert plain.metrics["trace"].data is not None
    assert len(plain.layers) == 4
    assert (tolerant.metrics, tolerant.layers) == (plain.metrics, plain.layers)


def test_a_finished_measurement_is_not_taken_for_another_accuracy():
    from hessdiag.analysis import Measurement

    asked = (None, {"trace": 0.1}, {"trace": 0.01})
    keys = {Measurement(smooth(), Settings(quantities=("trace",), accuracy=a)).key for a in asked}
    assert len(keys) == 3


def test_checks_draw_in_pairs_and_have_no_such_option():
    """Fewer probes than the baseline's would leave pairs unused, and more could never be drawn."""
    from hessdiag.check.pytest.pytest_run import OPTIONS
    from hessdiag.check.schema import RunTable

    for name in ("accuracy", "effort", "budget"):
        assert name not in RunTable.model_fields
        assert name not in OPTIONS
    assert "probes" in RunTable.model_fields
    assert "probes" in OPTIONS


def pilots_used_again(op, krylov, probes, seed, rtol):
    """The mean of those that decided and those that came after."""
    pilot = deflation.forms(op, krylov, PILOT, seed)
    needed = pilot.trace.var(ddof=1) / (rtol * pilot.trace.mean()) ** 2
    more = min(math.ceil(needed), probes) - PILOT
    if more <= 0:
        return pilot
    rest = deflation.forms(op, krylov, more, seed, first=PILOT)
    joined = {name: np.concatenate([getattr(pilot, name), getattr(rest, name)]) for name in ("trace", "squares")}
    return replace(pilot, products=pilot.products + len(rest.trace), **joined)


def third(pilot: np.ndarray, wanted: float, most: int) -> int:
    return enough(pilot, wanted * math.sqrt(3), most)


BROKEN = {
    "pilots are used again": (
        moments,
        "forms_to",
        pilots_used_again,
        test_stopping_moves_no_value_and_shortens_no_interval,
    ),
    "a third as many": (deflation, "enough", third, test_as_many_probes_as_the_tolerance_needs),
    "always all": (deflation, "enough", lambda *a: a[-1], test_as_many_probes_as_the_tolerance_needs),
    "what the run knows is not used": (
        planning,
        "_unexplained",
        lambda krylov, measure: (1e9, 1e9),
        test_probes_counted_by_the_run_are_enough_and_cover,
    ),
    "three times as wide is enough": (
        Goal,
        "allowed",
        lambda goal, trace, square: (3 * goal.trace * trace, 3 * goal.square * square),
        test_probes_counted_by_the_run_are_enough_and_cover,
    ),
    "the residual's always all": (traces, "enough", lambda *a: a[-1], test_probes_of_the_residual_stop_too),
}


@pytest.mark.parametrize(("place", "name", "broken", "promise"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(place, name, broken, promise, monkeypatch):
    over_seeds.cache_clear()
    planned.cache_clear()
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(AssertionError):
        promise()
    over_seeds.cache_clear()
    planned.cache_clear()


def test_this_promise_would_notice_an_unsaid_shortfall(monkeypatch):
    monkeypatch.setattr(settled, "BEYOND", math.inf)
    with pytest.raises(ValueError, match="not enough values"):
        test_what_is_not_reached_is_said_with_what_it_takes()
