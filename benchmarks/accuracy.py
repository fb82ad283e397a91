"""The cost of a number to a true accuracy, each tool at the budget it needs: what `extremes` and `trace` print.

A tool's budget grows until its answer is right (against `benchmarks.truth`, not against its own stopping rule).
The cost reported is that of the first sufficient budget. Every tool gets the same model and the same samples, one
thread, and its fastest settings; knowing the sufficient budget beforehand is a present to peers.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.adapters import Case, classification, installed
from benchmarks.methods import METHODS, Answer, Method
from benchmarks.ours import ask as ask_hessdiag
from benchmarks.ours import frozen
from benchmarks.tables import Row
from benchmarks.timing import bounded_memory, cpu_seconds, gradient_seconds, one_thread, unit
from benchmarks.truth import Truth, truth
from benchmarks.workloads import PEER_WORKLOADS, WORKLOADS, Workload, selected
from hessdiag.errors import one_line
from hessdiag.problem import Problem

GOALS = {"lambda_max": 1e-3, "lambda_min": 1e-3, "trace": 1e-2, "frobenius": 2e-2}
SEEDS = 5
HOPELESS = 3.0  # goals: one answer of five so far off, and their rms is above the goal whatever the others are
ENOUGH = 40.0  # seconds at one budget beyond which the seeds so far must do, be it one
PATIENCE = 1500.0  # seconds spent on one method before it is given up
SHORT = 200.0  # the same, where the rest can be extrapolated


@dataclass(frozen=True)
class Cost:
    """What a method needed, or why it did not get there."""

    tool: str
    seconds: float | None
    products: int
    error: float  # as `off_by` counts, rms over seeds
    note: str


def table(
    quantities: Sequence[str], data: str | None, quick: bool, names: Sequence[str], device: str
) -> list[Row]:
    """All tools on the chosen workloads, by default all that the data allow."""
    one_thread()
    rows = []
    for name in selected(names, data, quick, PEER_WORKLOADS):
        workload = WORKLOADS[name]
        known = truth(workload, data, device, keep=not quick)
        problem = workload.problem(data, device)
        case, gradient = setting(workload, problem)
        for quantity in quantities:
            costs = [*peers(quantity, case, known, quick), ours(workload, problem, quantity, known)]
            rows += _rows(workload.name, quantity, costs, gradient, device)
    return rows


def setting(workload: Workload, problem: Problem) -> tuple[Case, float]:
    """What the peers are given, and the seconds of a gradient."""
    batches = workload.sample_set(problem).batches
    return classification(problem.model, batches), gradient_seconds(problem, batches)


def off_by(quantity: str, value: float, known: Truth) -> float:
    """The error as the goal counts it: λ_min by the spectral radius, ‖H‖_F itself and not its square."""
    if quantity == "frobenius":
        return math.sqrt(max(value, 0.0) / known["frobenius_squared"].value) - 1
    fact = known[quantity]
    if quantity == "lambda_min":
        return (value - fact.value) / max(abs(fact.value), abs(known["lambda_max"].value))
    return value / fact.value - 1


def peers(quantity: str, case: Case, known: Truth, quick: bool = False, *, race: bool = False) -> list[Cost]:
    """Every peer's methods for a quantity; in a race, one is given up when it can no longer be the fastest."""
    costs: list[Cost] = []
    for method in METHODS:
        if method.quantity == quantity:
            best = fastest(costs) if race else None
            limit = math.inf if best is None or best.seconds is None else best.seconds
            here = installed(method.tool)
            costs.append(_measure(method, case, known, quick, limit) if here else absent(method.name))
    return costs


def absent(name: str) -> Cost:
    return Cost(name, None, 0, math.inf, "not installed")


def crashed(name: str, error: Exception) -> Cost:
    return Cost(name, None, 0, math.inf, f"crash: {type(error).__name__}: {one_line(error, 90)}")


def within_math(method: Method, case: Case, budget: float, seed: int) -> Answer:
    """An answer, or a crash: fused attention has no double backward, and some take more memory than there is."""
    with sdpa_kernel(SDPBackend.MATH), bounded_memory():
        return method.ask(case, budget, seed)


def warm(method: Method, device: torch.device) -> None:
    """A first call on the smallest problem, so that no import is timed."""
    workload = WORKLOADS["digits_mlp"]
    problem = workload.problem(None, str(device))
    case = classification(problem.model, workload.sample_set(problem).batches)
    with suppress(Exception):  # if it fails, the call that is timed will say how
        within_math(method, case, method.budgets[0], 0)


def _measure(method: Method, case: Case, known: Truth, quick: bool, limit: float) -> Cost:
    goal = GOALS[method.quantity]
    warm(method, case.device)
    spent, last, told = 0.0, (0.0, 0, math.inf, 0.0), ""
    for budget in method.budgets[:2] if quick else method.budgets:
        errors: list[float] = []
        times: list[float] = []
        products = 0
        for seed in range(2 if quick else SEEDS):
            try:
                seconds, answer = cpu_seconds(lambda b=budget, s=seed: within_math(method, case, b, s))
            except Exception as error:  # a peer may fail in any way: the table says how
                return crashed(method.name, error)
            errors.append(off_by(method.quantity, answer.value, known))
            times.append(seconds)
            products = answer.products
            if sum(times) > ENOUGH or (abs(errors[-1]) > HOPELESS * goal and not method.averages):
                break
        error = math.sqrt(statistics.fmean(e * e for e in errors))
        last = (statistics.median(times), products, error, budget)
        spent += sum(times)
        told = f"{method.how} {budget:g}, {_seeds(len(times))}"
        if error <= goal:
            return Cost(method.name, last[0], last[1], error, told)
        if spent > (SHORT if method.averages else PATIENCE) or last[0] > limit:
            break
    if method.averages:
        factor = (last[2] / goal) ** 2
        note = f"extrapolated from {last[1]} to {last[1] * factor:.0f} products by 1/√n"
        return Cost(method.name, last[0] * factor, round(last[1] * factor), goal, note)
    why = "no longer the fastest" if last[0] > limit else "not reached"
    return Cost(method.name, None, last[1], last[2], f"{why}; {told}, {last[0]:.3g} s")


def ours(workload: Workload, problem: Problem, quantity: str, known: Truth) -> Cost:
    """hessdiag's one call for the quantity alone, at its defaults."""
    small = WORKLOADS["digits_mlp"]
    ask_hessdiag(small.problem(None), small, quantity, 0)
    fixed = frozen(problem, workload)
    times, checks, errors, products, how, stated = [], [], [], 0, "", 0.0
    for seed in range(SEEDS):
        try:
            seconds, found = cpu_seconds(lambda s=seed: ask_hessdiag(fixed, workload, quantity, s))
        except Exception as error:  # shown like a peer's
            return crashed("hessdiag", error)
        times.append(seconds)
        checks.append(found.preflight)
        errors.append(off_by(quantity, found.value, known))
        products, how = found.products, found.how
        stated = found.stderr / abs(found.value)
        if sum(times) > 2 * ENOUGH:
            break
    error = math.sqrt(statistics.fmean(e * e for e in errors))
    reached = error <= GOALS[quantity]
    part = statistics.median(checks) / statistics.median(times)
    how += f"; states a standard error of {stated:.2g}" if stated else ""
    note = f"{how}; {part:.0%} of it self-test and planning; {_seeds(len(times))}"
    return Cost("hessdiag", statistics.median(times) if reached else None, products, error, note)


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"


def fastest(costs: Sequence[Cost]) -> Cost | None:
    """The fastest of the correct."""
    return min((c for c in costs if c.seconds is not None), key=lambda c: c.seconds or 0.0, default=None)


def _rows(workload: str, quantity: str, costs: Sequence[Cost], gradient: float, device: str) -> list[Row]:
    best = fastest([cost for cost in costs if cost.tool != "hessdiag"])
    goal = f"{quantity} to {GOALS[quantity]:g}"
    rows = []
    for cost in costs:
        both = cost.seconds is not None and best is not None and best.seconds is not None
        ratio = cost.seconds / best.seconds if both else None  # type: ignore[operator, union-attr]
        told = described(cost)
        rows.append(Row(workload, cost.tool, f"{goal} [{unit(device)}]", cost.seconds, ratio, told))
        gradients = None if cost.seconds is None else cost.seconds / gradient
        rows.append(Row(workload, cost.tool, f"{goal} [gradients]", gradients, ratio, told))
    return rows


def described(cost: Cost) -> str:
    """Error, products and note, as far as there are any."""
    if math.isinf(cost.error):
        return cost.note
    return f"rms error {cost.error:.2g}, {cost.products} products; {cost.note}"
