"""Promise: with exact traces every bound is on its side of the truth, for any spectrum. (10 s)"""

from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
import torch

from hessdiag.errors import UsageError
from hessdiag.operator import as_operator
from hessdiag.results import Bound, Estimate, Provenance
from hessdiag.spectral import (
    christoffel,
    deflated_ws,
    forms,
    frobenius_bound,
    frobenius_squared_from,
    lanczos,
    moment_lower,
    trace_from,
    wolkowicz_styan,
    wolkowicz_styan_of,
)

KINDS = {
    "normal": lambda rng, d: rng.normal(size=d),
    "near rank one": lambda rng, d: np.r_[rng.normal() * 5, 1e-9 * rng.normal(size=d - 1)],
    "positive": lambda rng, d: rng.exponential(size=d),
    "constant": lambda rng, d: np.full(d, rng.normal()),
    "half zero": lambda rng, d: np.r_[rng.normal(size=(d + 1) // 2), np.zeros(d // 2)],
    "extremal": lambda rng, d: np.r_[rng.normal() + 3, np.full(d - 1, 0.1)],
    "heavy tail": lambda rng, d: rng.standard_cauchy(size=d),
}


def traces(eigenvalues: np.ndarray, order: int = 6) -> list[float]:
    return [math.fsum(eigenvalues**j) for j in range(order + 1)]


def bounds(eigenvalues: np.ndarray) -> list[tuple[Bound, float]]:
    """Every bound with the number it bounds."""
    high, low = float(eigenvalues.max()), float(eigenvalues.min())
    t = traces(eigenvalues)
    ws = wolkowicz_styan(t[1], t[2], len(eigenvalues))
    found = [(ws.upper, high), (ws.lower, low), (ws.inner_max, high), (ws.inner_min, low)]
    found += [(ws.spread, high - low), (frobenius_bound(t[2]), high), (moment_lower(t[2], t[3]), high)]
    for order in (3, 5, 7):
        upper, lower = christoffel(t[:order])
        found += [(upper, high), (lower, low)]
    upper, lower = deflated_ws(
        lanczos(torch.diag(torch.from_numpy(eigenvalues)), steps=3), t[1], t[2], len(eigenvalues)
    )
    return [*found, (upper, high), (lower, low)]


def holds(bound: Bound, true: float, scale: float) -> bool:
    # s² = T₂/d − m² cancels: a rounding of eps T₂ becomes √eps ‖H‖ = 1.5e-8 in s where all are equal
    room = 1e-7 * scale
    return bound.hi >= true - room if bound.side == "upper" else bound.lo <= true + room


@pytest.mark.parametrize("kind", KINDS)
def test_every_bound_holds(kind: str):
    rng = np.random.default_rng(0)
    for _ in range(150):
        eigenvalues = KINDS[kind](rng, int(rng.integers(1, 40)))
        scale = float(np.linalg.norm(eigenvalues))
        for bound, true in bounds(eigenvalues):
            assert holds(bound, true, scale), (bound, true)
            assert bound.exact_inputs and bound.confidence == 1.0


def test_thousands_of_wolkowicz_styan():
    rng = np.random.default_rng(1)
    for _ in range(3000):
        eigenvalues = rng.normal(size=int(rng.integers(2, 20))) ** int(rng.integers(1, 6))
        scale = float(np.linalg.norm(eigenvalues))
        ws = wolkowicz_styan(*traces(eigenvalues, 2)[1:], len(eigenvalues))
        high, low = eigenvalues.max(), eigenvalues.min()
        pairs = (
            (ws.upper, high),
            (ws.lower, low),
            (ws.inner_max, high),
            (ws.inner_min, low),
            (ws.spread, high - low),
        )
        assert all(holds(bound, true, scale) for bound, true in pairs)


def test_closed_forms():
    ws = wolkowicz_styan(0.0, 2.0, 2)  # eigenvalues −1 and 1: every bound is attained
    assert [b.value for b in (ws.upper, ws.lower, ws.inner_max, ws.inner_min, ws.spread)] == [1, -1, 1, -1, 2]
    eigenvalues = np.r_[7.0, np.full(9, 0.5)]  # one at the bound, the rest equal: attained
    t = traces(eigenvalues)
    assert wolkowicz_styan(t[1], t[2], 10).upper.value == pytest.approx(7.0, rel=1e-14)
    assert wolkowicz_styan(t[1], t[2], 10, lambda_max=7.0).upper.looseness == pytest.approx(1.0, rel=1e-14)
    identity = wolkowicz_styan(10.0, 20.0, 5)
    assert identity.upper.lo <= 2.0 <= identity.upper.hi <= 2.0 + 1e-6
    assert frobenius_bound(9.0).value == 3.0
    assert moment_lower(2.0, 3.0).value == 1.5


def test_order_one_is_wolkowicz_styan_and_each_order_is_tighter():
    rng = np.random.default_rng(2)
    for _ in range(100):
        t = traces(rng.normal(size=25))
        orders = [christoffel(t[:n])[0].value for n in (3, 5, 7)]
        assert orders[0] == pytest.approx(wolkowicz_styan(t[1], t[2], 25).upper.value, rel=1e-10)
        assert orders[0] >= orders[1] * (1 - 1e-9) and orders[1] >= orders[2] * (1 - 1e-6)


def test_deflation_makes_it_tight():
    eigenvalues = np.r_[np.geomspace(1, 30, 10), 0.01 * np.random.default_rng(3).normal(size=290)]
    t = traces(eigenvalues, 2)
    run = lanczos(torch.diag(torch.from_numpy(eigenvalues)), steps=10)
    upper, _ = deflated_ws(run, t[1], t[2], 300, lambda_max=30.0)
    plain = wolkowicz_styan(t[1], t[2], 300, lambda_max=30.0).upper
    assert plain.looseness is not None and upper.looseness is not None
    assert upper.looseness < 1 + 1e-4 and plain.looseness > 1.3


def test_the_rank_may_stand_for_the_dimension():
    eigenvalues = np.r_[np.random.default_rng(4).exponential(size=6), np.zeros(50)]
    t = traces(eigenvalues, 2)
    assert (
        eigenvalues.max()
        <= wolkowicz_styan(t[1], t[2], 6).upper.value
        < wolkowicz_styan(t[1], t[2], 56).upper.value
    )


def test_estimated_inputs_are_no_guarantee():
    matrix = torch.diag(torch.linspace(-1, 2, 40, dtype=torch.float64) ** 3)
    rotation = torch.linalg.qr(
        torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).Q
    matrix = rotation @ matrix @ rotation.T
    matrix = (matrix + matrix.T) / 2
    ws = wolkowicz_styan_of(matrix, probes=8, deflate=4)
    assert not ws.upper.exact_inputs and ws.upper.confidence == 0.95 and ws.upper.lo < ws.upper.value < ws.upper.hi
    exact = wolkowicz_styan_of(matrix, probes=40, deflate=0)
    assert exact.upper.exact_inputs and exact.upper.hi - exact.upper.lo < 1e-10 * exact.upper.value
    # an exact trace beside probes for the square, as on ReLU networks
    values = forms(as_operator(matrix), None, 12, 0)
    mixed = wolkowicz_styan(float(matrix.trace()), frobenius_squared_from(values), 40).upper
    other = forms(as_operator(matrix), None, 6, 1)
    apart = wolkowicz_styan(trace_from(other), frobenius_squared_from(values), 40).upper
    for bound in (mixed, apart):
        assert not bound.exact_inputs and bound.lo < bound.value < bound.hi


def mean_over_all_probes() -> tuple[float, float]:
    """Mean of the upper bound over every pair of sign probes of a 6 x 6 matrix, and the bound by true traces."""
    draws = np.random.default_rng(0).normal(size=(6, 6))
    matrix = draws + draws.T
    signs = np.array(list(itertools.product([-1, 1], repeat=6)))[:32]  # −z says what z says
    t1, t2 = np.einsum("ni,ij,nj->n", signs, matrix, signs), np.square(signs @ matrix).sum(axis=1)
    assert t1.mean() == pytest.approx(np.trace(matrix)) and t2.mean() == pytest.approx(np.square(matrix).sum())
    values = []
    for pair in itertools.product(range(32), repeat=2):
        one, two = (estimate(name, t[list(pair)]) for name, t in (("trace", t1), ("frobenius_squared", t2)))
        values.append(wolkowicz_styan(one, two, 6).upper.value)
    return float(np.mean(values)), wolkowicz_styan(float(t1.mean()), float(t2.mean()), 6).upper.value


def estimate(quantity: str, samples: np.ndarray) -> Estimate:
    value = float(samples.mean())
    kind = {"kind": "probes", "confidence": 0.95, "provenance": Provenance(method="")}
    return Estimate(
        quantity=quantity, value=value, lo=value, hi=value, stderr=1.0, per_probe=tuple(samples), **kind
    )


def bias() -> float:
    mean, true = mean_over_all_probes()
    return abs(mean / true - 1)


def test_bounds_from_few_probes_are_next_to_unbiased():
    assert bias() < 0.008


@pytest.mark.parametrize("correction", ["_overstated", "_short_root"])
def test_this_promise_would_notice_a_bias_left_in(correction, monkeypatch):
    monkeypatch.setattr(importlib.import_module("hessdiag.spectral.bounds"), correction, lambda *_: 0.0)
    assert bias() > 0.012


@pytest.mark.parametrize(
    "refused",
    [
        lambda: wolkowicz_styan(1.0, -1.0, 3),
        lambda: wolkowicz_styan(1.0, 1.0, 0),
        lambda: christoffel([3.0, 1.0]),
        lambda: moment_lower(0.0, 0.0),
    ],
)
def test_refusals(refused):
    with pytest.raises(UsageError, match="need"):
        refused()


def wrong(factor_upper: float, d_shift: int):
    def bound(eigenvalues: np.ndarray) -> bool:
        t, d = traces(eigenvalues, 2), len(eigenvalues)
        upper = wolkowicz_styan(t[1], t[2], max(d - d_shift, 1)).upper
        return factor_upper * upper.hi >= eigenvalues.max() * (1 - 1e-9)

    return bound


BROKEN = {
    "d − 2 for d − 1": wrong(1.0, 1),
    "a percent low": wrong(0.99, 0),
    "m forgotten": lambda e: math.sqrt((len(e) - 1) * e.var()) >= e.max(),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    rng = np.random.default_rng(5)
    assert not all(breakage(KINDS["extremal"](rng, int(rng.integers(4, 40)))) for _ in range(100))
