"""Promise: of two ways to the trace the better one is printed, and choosing shortens no interval. (20 s)"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.analysis import Measurement, analyze, sweep
from hessdiag.analysis.probed import Probed
from hessdiag.analysis.spending import Spending
from hessdiag.analysis.sweep import Sweep
from hessdiag.operator import as_operator
from hessdiag.results.interval import PILOT, mean_interval
from hessdiag.settings import Settings
from hessdiag.spectral import forms, lanczos
from tests import models

ASKED = {"quantities": ("trace", "frobenius_squared"), "confidence": 0.999, "batch_size": 1, "probes": 32}


def low_rank() -> hessdiag.Problem:
    """Three examples far from their targets: R is large, and so small in rank that a run explains all of H."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    return hessdiag.Problem(model, {"train": (models.randn(3, 40), 5 + models.randn(3, 1))}, criterion="mse")


def smooth() -> hessdiag.Problem:
    """Few outputs and a bulk of full rank: tr(G) is exact, and tr(R) as well known as the rest of H."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)]
    data = (models.randn(20, 6), models.labels(20, 3))
    return hessdiag.Problem(nn.Sequential(*layers).double(), {"train": data}, criterion="cross_entropy")


def relative_error() -> float:
    found = analyze(low_rank(), **ASKED).metrics["trace"]
    truth = float(models.dense_hessian(low_rank()).trace())
    assert found.lo <= truth <= found.hi
    return found.stderr / abs(truth)


def test_what_the_run_explains_is_not_left_to_probes_on_the_residual():
    assert relative_error() < 1e-8
    found = analyze(low_rank(), **ASKED)
    trace = found.metrics["trace"]
    assert len(trace.per_probe) == 32 - PILOT  # those that decided are not in it
    assert any("the trace comes from probes on H" in note for note in found.notes)
    assert sum(layer.trace for layer in found.layers) == pytest.approx(trace.value, rel=1e-9)
    assert trace.data is None  # three batches
    alone = analyze(low_rank(), "trace", probes=32).metrics["trace"]  # nothing else draws on H
    assert "tr(G) exactly" in alone.provenance.method and len(alone.per_probe) == 32


def test_each_way_is_taken_where_it_is_better_and_both_hold_the_truth():
    problem = smooth()
    truth = float(models.dense_hessian(problem).trace())
    operator = Measurement(problem, Settings(**ASKED)).operator
    lengths = set()
    for seed in range(16):
        spending, before = Spending(None, operator, 1.0, 0.0), operator.beside
        found = Sweep(operator, Settings(seed=seed, **ASKED), spending).run()
        trace = found.metrics["trace"]
        assert trace.lo <= truth <= trace.hi, seed
        on_h = any("probes on H" in note for note in found.notes)
        assert len(trace.per_probe) == (32 - PILOT if on_h else 32)
        assert operator.beside - before == (PILOT if on_h else PILOT + 32)
        lengths.add(len(trace.per_probe))
    assert lengths == {24, 32}


def test_where_the_accuracy_decides_probes_on_the_hessian_do_both():
    asked = {**ASKED, "probes": None}
    trace, square = (analyze(low_rank(), **asked).metrics[name] for name in asked["quantities"])
    assert len(trace.per_probe) == len(square.per_probe) == 8
    assert trace.stderr < 1e-8 * abs(trace.value)


SEEDS = 2000  # the standard error of a coverage of 0.95 is 0.005: the band is four of them wide
BAND = (0.93, 0.97)


@functools.cache
def chosen(again: bool = False) -> np.ndarray:
    """(value, lo, hi) of the better of two means as uncertain as each other: where choosing could hurt."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(60, 60))
    matrix = torch.from_numpy(draws + draws.T)
    op = as_operator(matrix)
    rows = []
    for seed in range(SEEDS):
        ours = forms(op, lanczos(op, steps=4, seed=seed), 32, seed).trace
        signs = rng.choice([-1.0, 1.0], size=(40, 60))
        theirs = np.einsum("ni,ij,nj->n", signs, matrix.numpy(), signs)  # as if R were all of H
        pilots = [(x[:PILOT], x[PILOT:]) for x in (ours, theirs)]
        spreads = [pilot.std(ddof=1) / math.sqrt(len(rest)) for pilot, rest in pilots]
        pilot, rest = pilots[int(np.argmin(spreads))]
        samples = pilot if again else rest
        _, lo, hi = mean_interval(samples, 0.95)
        rows.append(
            (samples.mean() - float(matrix.trace()), lo - float(matrix.trace()), hi - float(matrix.trace()))
        )
    return np.array(rows)


def honest(rows: np.ndarray) -> bool:
    held = ((rows[:, 1] <= 0) & (rows[:, 2] >= 0)).mean()
    unbiased = abs(rows[:, 0].mean()) < 4 * rows[:, 0].std() / math.sqrt(SEEDS)
    return bool(BAND[0] <= held <= BAND[1] and unbiased)


def test_choosing_by_pilots_costs_no_coverage():
    assert honest(chosen())


def test_this_promise_would_notice_pilots_used_again():
    assert not honest(chosen(again=True))


BROKEN = {
    "probes on R whatever they say": (sweep.Sweep, "_better", lambda self, f, m: self._of_model(f, m.settle())),
    "the pilots stay in": (Probed, "without", lambda self, number: self),
}


@pytest.mark.parametrize(("place", "name", "broken"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(place, name, broken, monkeypatch):
    monkeypatch.setattr(place, name, broken)
    with pytest.raises(AssertionError):
        test_what_the_run_explains_is_not_left_to_probes_on_the_residual()
