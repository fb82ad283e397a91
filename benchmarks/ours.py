"""hessdiag asked for one quantity, through its one call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    preflight: float = 0.0  # CPU seconds of self-test and planning, part of the whole


def analysis(
    problem: Problem, workload: Workload, quantities: Sequence[str], seed: int = 0, **options: int
) -> Analysis:
    """The analysis of the workload's own sample set; ``seed`` changes the probes only."""
    return _prepared(frozen(problem, workload), workload, quantities, seed, **options).run()


def ask(problem: Problem, workload: Workload, quantity: str, seed: int) -> Found:
    """One quantity of a frozen problem, at hessdiag's defaults."""
    start = time.process_time()
    measurement = _prepared(problem, workload, (quantity,), seed)
    preflight = time.process_time() - start
    result = measurement.run()
    metric = result.metrics[quantity]
    how = metric.provenance.method.split(":")[0]
    return Found(metric.value, metric.lo, metric.hi, result.cost.products, how, preflight)


def frozen(problem: Problem, workload: Workload) -> Problem:
    """The problem on the workload's own batches: an iterable of batches is taken in its own order."""
    return replace(problem, data={"train": list(workload.sample_set(problem).batches)})


def _prepared(
    problem: Problem, workload: Workload, quantities: Sequence[str], seed: int, **options: int
) -> Measurement:
    settings = Settings(quantities=tuple(quantities), samples=workload.samples, seed=seed, **options)
    return Measurement(problem, settings)
