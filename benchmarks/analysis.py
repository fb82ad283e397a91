"""What a whole analysis costs: hessdiag's one run against the sum of every part by the peer fastest at it.

The peers' parts are λ_max, λ_min, the trace to 1 %, ‖H‖_F to 2 % and a density of 8 probes x 40 steps; the
Wolkowicz-Styan bounds follow from them by formula. hessdiag is called at its defaults; beside each true error
stands the one it states, and beside each density the area between it and the true one. The last rows say how much
of hessdiag's run passes outside its engine, and outside the model's and autograd's passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import ours
from benchmarks.accuracy import (
    Cost,
    absent,
    crashed,
    described,
    fastest,
    peers,
    setting,
    warm,
    within_math,
)
from benchmarks.adapters import Case, installed
from benchmarks.density_truth import DensityTruth, density_truth
from benchmarks.judged import PARTS, judged
from benchmarks.methods import DENSITY_STEPS, METHODS, Method
from benchmarks.tables import Row
from benchmarks.timing import cpu_seconds, one_thread, unit
from benchmarks.truth import Truth, truth
from benchmarks.workloads import PEER_WORKLOADS, WORKLOADS, Workload, selected
from hessdiag.engine.products.functional import Functional
from hessdiag.problem import Problem
from hessdiag.results import QUANTITIES

PASSES = (
    (torch.autograd, "grad"),
    (torch.func, "vjp"),
    (torch.func, "jvp"),
    (Functional, "total"),
    (Functional, "outputs"),
)
FIRST_STEPS = 4  # tell whether a density can be the fastest
WHOLE = "whole analysis"


def run(data: str | None, quick: bool = False, names: Sequence[str] = (), device: str = "cpu") -> list[Row]:
    """Per workload: every part by every peer, their sum, hessdiag, and its time outside autograd."""
    one_thread()
    names = selected(names, data, quick, PEER_WORKLOADS)
    return [row for name in names for row in compare(WORKLOADS[name], data, quick, device)]


def compare(workload: Workload, data: str | None, quick: bool, device: str) -> list[Row]:
    """The rows of one workload."""
    known = truth(workload, data, device, keep=not quick)
    shape = density_truth(workload, data, known, keep=not quick)
    problem = workload.problem(data, device)
    case, gradient = setting(workload, problem)
    rows, best = [], {}
    for part in (*PARTS, "density"):
        costs = _densities(case, known, shape) if part == "density" else peers(part, case, known, quick, race=True)
        winner = fastest(costs)
        if winner is not None:
            best[part] = winner
        for cost in costs:
            ratio = cost.seconds / winner.seconds if winner and winner.seconds and cost.seconds else None
            rows.append(
                Row(workload.name, cost.tool, f"{part} [{unit(device)}]", cost.seconds, ratio, described(cost))
            )
    total = sum(cost.seconds or 0.0 for cost in best.values()) or None
    said = "; ".join(f"{part} by {cost.tool}" for part, cost in best.items())
    missing = [part for part in (*PARTS, "density") if part not in best]
    note = said + (f"; by no peer, hence left out: {', '.join(missing)}" if missing else "")
    mine, outside = _ours(workload, problem, known, shape)
    for tool, seconds, told in (("fastest peers", total, note), ("hessdiag", mine.seconds, mine.note)):
        ratio = seconds / total if seconds is not None and total else None
        rows.append(Row(workload.name, tool, f"{WHOLE} [{unit(device)}]", seconds, ratio, told))
        gradients = None if seconds is None else seconds / gradient
        rows.append(Row(workload.name, tool, f"{WHOLE} [gradients]", gradients, ratio, told))
    return [*rows, *outside]


def _ours(workload: Workload, problem: Problem, known: Truth, shape: DensityTruth) -> tuple[Cost, list[Row]]:
    small = WORKLOADS["digits_mlp"]
    ours.analysis(small.problem(None), small, QUANTITIES)  # no import is timed
    fixed = ours.frozen(problem, workload)
    planning, measurement = cpu_seconds(lambda: ours.prepared(fixed, workload, QUANTITIES, 0))
    before = measurement.operator.seconds
    with _differentiating() as spent:
        running, found = cpu_seconds(measurement.run)
    errors = ", ".join(f"{part} {one}" for part, one in judged(found, known, shape).items())
    checks = planning / (planning + running)
    note = f"{errors}; {found.cost.products} products; {checks:.0%} of it self-test and planning"
    rows = []
    for place, inside in (
        ("the engine", measurement.operator.seconds - before),
        ("forward and backward", spent[0]),
    ):
        told = f"{inside:.3g} of {found.cost.seconds:.3g} s of wall time after the self-test"
        share = 1 - inside / found.cost.seconds
        rows.append(Row(workload.name, "hessdiag", f"outside {place} [share of the run]", share, None, told))
    return Cost("hessdiag", planning + running, found.cost.products, math.inf, note), rows


@contextmanager
def _differentiating() -> Iterator[list[float]]:
    """Wall time inside the model's passes and autograd's; what is compiled into one passes for neither."""
    spent, within = [0.0], [False]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if within[0]:
                return function(*arguments, **options)
            within[0], begun = True, perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                within[0] = False
                spent[0] += perf_counter() - begun

        return call

    with ExitStack() as stack:
        for place, name in PASSES:
            stack.enter_context(patch.object(place, name, timed(getattr(place, name))))
        yield spent


def _densities(case: Case, known: Truth, shape: DensityTruth) -> list[Cost]:
    costs: list[Cost] = []
    for method in METHODS:
        if method.quantity == "density":
            best = fastest(costs)
            limit = math.inf if best is None or best.seconds is None else best.seconds
            costs.append(
                _density(method, case, known, shape, limit) if installed(method.tool) else absent(method.name)
            )
    return costs


def _density(method: Method, case: Case, known: Truth, shape: DensityTruth, limit: float) -> Cost:
    warm(method, case.device)
    try:
        if limit < math.inf:
            seconds, _ = cpu_seconds(lambda: within_math(method, case, FIRST_STEPS, 0))
            seconds *= DENSITY_STEPS / FIRST_STEPS
            if seconds > limit:
                return Cost(method.name, seconds, 0, math.inf, f"extrapolated from {FIRST_STEPS} steps")
        seconds, answer = cpu_seconds(lambda: within_math(method, case, DENSITY_STEPS, 0))
    except Exception as error:  # a peer may fail in any way: the table says how
        return crashed(method.name, error)
    off = abs(answer.value * known.parameters / known["trace"].value - 1)
    area = shape.off(np.array(answer.nodes), np.array(answer.weights))
    note = f"{answer.products} products; off by {area:.2g}, its mean eigenvalue by {off:.1g}"
    return Cost(method.name, seconds, answer.products, math.inf, note)
