"""hessdiag asked for one quantity, through its one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.timing import clock
from benchmarks.workloads import Workload
from hessdiag.analysis import Measurement
from hessdiag.problem import Problem
from hessdiag.results import Analysis
from hessdiag.settings import Settings


@dataclass(frozen=True)
class Found:
    """hessdiag's answer with its interval."""

    value: float
    lo: float
    hi: float
    products: int
    how: str
    preflight: float = 0.0  # seconds of self-test and planning, part of the whole
    stderr: float = 0.0  # as hessdiag states it


def analysis(
    problem: Problem, workload: Workload, quantities: Sequence[str], seed: int = 0, **options: Any
) -> Analysis:
    """The analysis of the workload's own sample set; ``seed`` changes the probes only."""
    return prepared(frozen(problem, workload), workload, quantities, seed, **options).run()


def ask(problem: Problem, workload: Workload, quantity: str, seed: int) -> Found:
    """One quantity of a frozen problem, at hessdiag's defaults."""
    start = clock()
    measurement = prepared(problem, workload, (quantity,), seed)
    preflight = clock() - start
    result = measurement.run()
    metric = result.metrics[quantity]
    how = metric.provenance.method.split(":")[0]
    stderr = getattr(metric, "stderr", 0.0)
    return Found(metric.value, metric.lo, metric.hi, result.cost.products, how, preflight, stderr)


def frozen(problem: Problem, workload: Workload) -> Problem:
    """The problem on the workload's own batches: an iterable of batches is taken in its own order."""
    return replace(problem, data={"train": list(workload.sample_set(problem).batches)})


def prepared(
    problem: Problem, workload: Workload, quantities: Sequence[str], seed: int, **options: Any
) -> Measurement:
    """hessdiag after its self-test and planning, with the workload's samples; ``problem`` is frozen."""
    settings = Settings(quantities=tuple(quantities), samples=workload.samples, seed=seed, **options)
    return Measurement(problem, settings)
