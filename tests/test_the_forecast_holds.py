"""Promise: products and memory are as forecast within a factor of 1.5, and forecasting leaves its graphs. (15 s)

Seconds and six networks: ``python -m benchmarks forecast``.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.gate_subjects import mean_loss
from benchmarks.workloads import digits_mlp
from hessdiag import Problem
from hessdiag.analysis import Measurement, costs, needs
from hessdiag.analysis.costs import bytes_of, price
from hessdiag.engine.checks.facts import Finding
from hessdiag.engine.products import graphs
from hessdiag.settings import Settings

WITHIN = 1.5
ASKED = {
    "defaults": {},
    "quick": {"effort": "quick"},
    "thorough": {"effort": "thorough"},
    "lambda_max alone": {"quantities": ("lambda_max",)},
    "a digit more of lambda_max": {"quantities": ("lambda_max",), "accuracy": "lambda_max=1e-4"},
    "budget": {"budget": "30p"},
}


@functools.cache
def digits() -> Problem:
    """As a bare loss: its traces come from probes."""
    plain = digits_mlp()
    return Problem(plain.model.eval(), plain.data, loss=mean_loss)


def ready(**options) -> Measurement:
    return Measurement(digits(), Settings(samples=256, **options))


@functools.cache
def taken(name: str) -> int:
    return ready(**ASKED[name]).run().cost.products


def right(name: str) -> bool:
    return 1 / WITHIN <= ready(**ASKED[name]).foreseen.products / taken(name) <= WITHIN


@pytest.mark.parametrize("name", ASKED)
def test_products_are_as_forecast(name):
    assert right(name)


def built(monkeypatch) -> list[object]:
    made = []
    init = graphs.GradientGraph._build
    monkeypatch.setattr(graphs.GradientGraph, "_build", lambda self, *a: made.append(self) or init(self, *a))
    return made


def test_the_run_finds_the_graphs_of_the_forecast(monkeypatch):
    measurement = ready(method="retained_graph")
    made = built(monkeypatch)
    assert measurement.forecast().startswith("2,410 parameters, 256 samples in 8 batches: about ")
    assert len(made) == 8
    measurement.run()
    assert len(made) == 8


def test_memory_counts_graphs_basis_and_probes():
    operator = ready(method="retained_graph").operator
    each = price(operator)
    assert each.kept == operator.graphs.held > 0
    assert 0 < each.passing < each.kept
    vector = operator.size * operator.dtype.itemsize
    none, basis, probes = (bytes_of(operator, each, *number) for number in ((0, 0), (40, 0), (40, 8)))
    assert none > each.kept
    assert 40 <= (basis - none) / vector <= 60  # a step holds a vector, and a part of one beside it
    assert 8 <= (probes - basis) / vector <= 80  # a block of probes with its images
    operator.graphs.release()


def clock(monkeypatch, ours: float, others: float) -> None:
    """Every look at the time comes after a product of ``ours`` seconds, ``others`` more on the clock."""
    now = {"perf_counter": 0.0, "process_time": 0.0}

    def look(name: str, step: float) -> float:
        now[name] += step
        return now[name]

    fake = SimpleNamespace(
        perf_counter=lambda: look("perf_counter", ours + others), process_time=lambda: look("process_time", ours)
    )
    monkeypatch.setattr(costs, "time", fake)
    monkeypatch.setattr(
        graphs, "time", SimpleNamespace(perf_counter=lambda: 0.0)
    )  # building takes none, on any machine


def foreseen_seconds(monkeypatch) -> float:
    operator = ready().operator
    clock(monkeypatch, ours=0.25, others=0.5)
    return price(operator).seconds


def test_seconds_are_those_of_a_machine_that_does_nothing_else(monkeypatch):
    assert foreseen_seconds(monkeypatch) == pytest.approx(0.25)


def test_nothing_is_forecast_of_a_problem_with_a_fault():
    measurement = ready()
    fault = Finding("fault", "self-test", "u·Hv and v·Hu differ")
    measurement.checked = replace(measurement.checked, findings=(fault,))
    assert measurement.forecast().endswith("no forecast before that is mended")
    assert measurement.operator.products == 0


BROKEN = {
    "steps of the density": (needs, "TYPICAL_DENSITY", 150, "defaults"),
    "steps of the ends": (needs, "TYPICAL", {"lambda_max": 30, "lambda_min": 100}, "quick"),
    "steps of lambda_max": (needs, "TYPICAL", {"lambda_max": 3, "lambda_min": 38}, "lambda_max alone"),
    "what an accuracy costs": (needs, "DEEPER", 3.0, "thorough"),
}


@pytest.mark.parametrize(("place", "name", "value", "asked"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(place, name, value, asked, monkeypatch):
    monkeypatch.setattr(place, name, value)
    assert not right(asked)


def test_seconds_by_the_clock_would_be_noticed(monkeypatch):
    monkeypatch.setattr(costs, "min", lambda clock, _: clock, raising=False)
    assert foreseen_seconds(monkeypatch) > 0.5
