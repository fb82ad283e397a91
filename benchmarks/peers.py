"""CPU time to a true accuracy: lambda_max to 1e-3 and the trace to 1 %, each tool at the budget it needs.

A tool's budget grows until its answer is right (against `benchmarks.truth`, not against its own stopping rule).
The cost reported is that of the first sufficient budget. Every tool gets the same model, the same samples in the
same batches, one thread, and its fastest settings; knowing the sufficient budget beforehand is a present to peers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.adapters import METHODS, Answer, Case, Method, classification, installed
from benchmarks.ours import ask as ask_hessdiag
from benchmarks.ours import frozen
from benchmarks.tables import Row
from benchmarks.timing import cpu_seconds, gradient_seconds, one_thread
from benchmarks.truth import Truth, truth
from benchmarks.workloads import PEER_WORKLOADS, WORKLOADS, Workload
from hessdiag.errors import one_line
from hessdiag.problem import Problem

GOALS = {"lambda_max": 1e-3, "trace": 1e-2}  # relative, rms over seeds
SEEDS = 5
ENOUGH = 40.0  # CPU seconds at one budget beyond which the seeds so far must do, be it one
PATIENCE = 200.0  # CPU seconds spent on one method before it is given up


@dataclass(frozen=True)
class Cost:
    """What a method needed, or why it did not get there."""

    tool: str
    seconds: float | None
    products: int
    error: float  # relative, rms over seeds
    note: str


def run(
    data: str | None, quick: bool = False, names: Sequence[str] = (), quantities: Sequence[str] = ()
) -> list[Row]:
    """The table of costs for the chosen workloads and quantities, by default all."""
    names = names or (("digits_mlp",) if quick or data is None else PEER_WORKLOADS)
    chosen = quantities or tuple(GOALS)
    return [row for name in names for row in compare(WORKLOADS[name], data, quick, chosen)]


def compare(
    workload: Workload, data: str | None, quick: bool = False, quantities: Sequence[str] = tuple(GOALS)
) -> list[Row]:
    """All tools on one workload."""
    one_thread()
    known = truth(workload, data, keep=not quick)
    problem = workload.problem(data)
    samples = workload.sample_set(problem)
    gradient = gradient_seconds(problem, samples.batches)
    case = classification(problem.model, samples.batches)
    rows = []
    for quantity in quantities:
        costs = [
            _measure(method, case, known, quick) if installed(method.tool) else _absent(method)
            for method in METHODS
            if method.quantity == quantity
        ]
        costs.append(_ours(workload, problem, quantity, known))
        rows += _rows(workload.name, quantity, costs, gradient)
    return rows


def _measure(method: Method, case: Case, known: Truth, quick: bool) -> Cost:
    goal, fact = GOALS[method.quantity], known[method.quantity]
    name = _name(method)
    _warm(method)
    spent, last, told = 0.0, (0.0, 0, math.inf, 0.0), ""
    for budget in method.budgets[:2] if quick else method.budgets:
        answers: list[Answer] = []
        times: list[float] = []
        for seed in range(2 if quick else SEEDS):
            try:
                seconds, answer = cpu_seconds(lambda b=budget, s=seed: _within_math(method, case, b, s))
            except Exception as error:  # a peer may fail in any way: the table says how
                return Cost(name, None, 0, math.inf, f"crash: {type(error).__name__}: {one_line(error, 90)}")
            answers.append(answer)
            times.append(seconds)
            if sum(times) > ENOUGH:
                break
        error = math.sqrt(statistics.fmean((a.value / fact.value - 1) ** 2 for a in answers))
        last = (statistics.median(times), answers[0].products, error, budget)
        spent += sum(times)
        told = f"{method.how} {budget:g}, {len(times)} seeds"
        if error <= goal:
            return Cost(name, last[0], last[1], error, told)
        if spent > PATIENCE:
            break
    if method.averages:
        factor = (last[2] / goal) ** 2
        note = f"extrapolated from {last[1]} to {last[1] * factor:.0f} products by 1/√n"
        return Cost(name, last[0] * factor, round(last[1] * factor), goal, note)
    return Cost(name, None, last[1], last[2], f"not reached; {told}, {last[0]:.3g} s")


def _warm(method: Method) -> None:
    """A first call on the smallest problem, so that no import is timed."""
    workload = WORKLOADS["digits_mlp"]
    problem = workload.problem(None)
    case = classification(problem.model, workload.sample_set(problem).batches)
    with suppress(Exception):  # if it fails, the call that is timed will say how
        _within_math(method, case, method.budgets[0], 0)


def _within_math(method: Method, case: Case, budget: float, seed: int) -> Answer:
    # the fused attention kernels have no double backward: every peer fails without this present
    with sdpa_kernel(SDPBackend.MATH):
        return method.ask(case, budget, seed)


def _absent(method: Method) -> Cost:
    return Cost(_name(method), None, 0, math.inf, "not installed")


def _name(method: Method) -> str:
    return f"{method.tool} ({method.how.split(',')[0]})"


def _ours(workload: Workload, problem: Problem, quantity: str, known: Truth) -> Cost:
    warm = WORKLOADS["digits_mlp"]
    ask_hessdiag(warm.problem(None), warm, quantity, 0)
    fixed = frozen(problem, workload)
    times, checks, errors, products, notes = [], [], [], 0, ""
    for seed in range(3):
        try:
            seconds, found = cpu_seconds(lambda s=seed: ask_hessdiag(fixed, workload, quantity, s))
        except Exception as error:  # shown like a peer's
            return Cost("hessdiag", None, 0, math.inf, f"crash: {type(error).__name__}: {one_line(error, 90)}")
        times.append(seconds)
        checks.append(found.preflight)
        errors.append(found.value / known[quantity].value - 1)
        products, notes = found.products, found.how
    error = math.sqrt(statistics.fmean(e * e for e in errors))
    reached = error <= GOALS[quantity]
    part = statistics.median(checks) / statistics.median(times)
    note = f"{notes}; {part:.0%} of it self-test and planning; {len(times)} seeds"
    return Cost("hessdiag", statistics.median(times) if reached else None, products, error, note)


def _rows(workload: str, quantity: str, costs: Sequence[Cost], gradient: float) -> list[Row]:
    peers = [c.seconds for c in costs if c.tool != "hessdiag" and c.seconds is not None]
    best = min(peers, default=None)
    goal = f"{quantity} to {GOALS[quantity]:g}"
    rows = []
    for cost in costs:
        ratio = cost.seconds / best if cost.seconds is not None and best is not None else None
        error = "" if math.isinf(cost.error) else f"rms error {cost.error:.2g}, {cost.products} products; "
        rows.append(Row(workload, cost.tool, f"{goal} [CPU s]", cost.seconds, ratio, error + cost.note))
        gradients = None if cost.seconds is None else cost.seconds / gradient
        rows.append(Row(workload, cost.tool, f"{goal} [gradients]", gradients, ratio, error + cost.note))
    return rows
