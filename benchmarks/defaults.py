"""The headline: every tool called as its own README calls it, at its own defaults.

Per call its cost and, per number it answers, the true error, the error that the tool states itself, and whether
the truth lies within that. A crash is a row.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import ours
from benchmarks.accuracy import crashed, off_by, setting
from benchmarks.adapters import Case, Meter, TooLong, classification, installed
from benchmarks.density_truth import DensityTruth, density_truth
from benchmarks.judged import SIGMAS, Judged, judged
from benchmarks.readme_calls import CALLS, Call, Said
from benchmarks.tables import Row
from benchmarks.timing import bounded_memory, cpu_seconds, one_thread, unit
from benchmarks.truth import Truth, truth
from benchmarks.workloads import WORKLOADS, Workload, selected
from hessdiag.problem import Problem
from hessdiag.results import QUANTITIES, Analysis

HEADLINE = ("digits_mlp", "lightning_mlp", "lightning_mlp_10000", "gpt", "resnet20")
SEEDS, ENOUGH = 3, 10.0  # seeds, and CPU seconds beyond which fewer must do
PATIENCE = 100.0  # CPU seconds: a call that takes longer is ended, and its cost extrapolated
OURS: Mapping[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "analyze(problem)": (QUANTITIES, {}),
    'analyze(problem, effort="quick")': (QUANTITIES, {"effort": "quick"}),
    'analyze(problem, "lambda_max")': (("lambda_max",), {}),
}


@dataclass(frozen=True)
class Scene:
    """A workload with everything that its calls need."""

    workload: Workload
    problem: Problem
    case: Case
    gradient: float  # seconds
    known: Truth
    shape: DensityTruth
    device: str
    seeds: int


def run(data: str | None, quick: bool = False, names: Sequence[str] = (), device: str = "cpu") -> list[Row]:
    """Per workload, every call: one row of its cost, and one for each number that it answers."""
    one_thread()
    names = selected(names, data, quick, HEADLINE)
    return [row for name in names for row in compare(WORKLOADS[name], data, quick, device)]


def compare(workload: Workload, data: str | None, quick: bool, device: str) -> list[Row]:
    """The rows of one workload."""
    known = truth(workload, data, device, keep=not quick)
    shape = density_truth(workload, data, known, keep=not quick)
    problem = workload.problem(data, device)
    case, gradient = setting(workload, problem)
    scene = Scene(workload, problem, case, gradient, known, shape, device, 1 if quick else SEEDS)
    rows = []
    for call in CALLS:
        if installed(call.tool):
            rows += _theirs(scene, call)
        else:
            rows.append(Row(workload.name, f"{call.tool} ({call.text})", "cost", None, None, "not installed"))
    for text, (quantities, options) in OURS.items():
        rows += _ours(scene, text, quantities, options)
    return rows


def _theirs(scene: Scene, call: Call) -> list[Row]:
    tool, how = f"{call.tool} ({call.text})", ""
    _warm(call, scene.device)
    taken: list[tuple[float, int]] = []
    found: dict[str, list[Judged]] = defaultdict(list)
    for seed in range(scene.seeds):
        meter = Meter(PATIENCE)
        try:
            seconds, said = cpu_seconds(partial(_asked, call, scene.case, meter, seed))
        except TooLong:
            return [_extrapolated(scene, tool, call, meter)]
        except Exception as error:  # a peer may fail in any way: the table says how
            return [_row(scene, tool, None, crashed(tool, error).note)]
        taken.append((seconds, meter.products))
        for quantity, one in said.items():
            found[quantity].append(_judged(quantity, one, scene))
            how = one.how
        if sum(spent for spent, _ in taken) > ENOUGH:
            break
    return [_cost(scene, tool, taken), *(_error(scene, tool, name, ones, how) for name, ones in found.items())]


def _warm(call: Call, device: str) -> None:
    """A first call on the smallest problem, so that no import is timed; if it fails, the timed one says how."""
    workload = WORKLOADS["digits_mlp"]
    problem = workload.problem(None, device)
    case = classification(problem.model, workload.sample_set(problem).batches)
    with suppress(Exception):
        _asked(call, case, Meter(1.0), 0)


def _asked(call: Call, case: Case, meter: Meter, seed: int) -> Mapping[str, Said]:
    with sdpa_kernel(SDPBackend.MATH), bounded_memory():  # fused attention has no double backward
        return call.ask(case, meter, seed)


def _judged(quantity: str, said: Said, scene: Scene) -> Judged:
    if quantity == "density":
        return Judged(scene.shape.off(np.array(said.answer.nodes), np.array(said.answer.weights)), None, True)
    off = off_by(quantity, said.answer.value, scene.known)
    if said.stated is None:
        return Judged(off, None, True)
    fact = scene.known[quantity]
    stated, error = said.stated / abs(fact.value), SIGMAS * fact.error / abs(fact.value)
    return Judged(off, stated, abs(off) <= stated + error)


def _ours(scene: Scene, text: str, quantities: Sequence[str], options: Mapping[str, str]) -> list[Row]:
    small = WORKLOADS["digits_mlp"]
    ours.analysis(small.problem(None, scene.device), small, quantities, **options)
    fixed, tool = ours.frozen(scene.problem, scene.workload), f"hessdiag ({text})"
    taken: list[tuple[float, int]] = []
    found: dict[str, list[Judged]] = defaultdict(list)
    for seed in range(scene.seeds):
        seconds, one = cpu_seconds(partial(_analysis, fixed, scene.workload, quantities, seed, options))
        taken.append((seconds, one.cost.products))
        for quantity, judgement in judged(one, scene.known, scene.shape).items():
            found[quantity].append(judgement)
        if sum(spent for spent, _ in taken) > ENOUGH:
            break
    return [_cost(scene, tool, taken), *(_error(scene, tool, name, ones) for name, ones in found.items())]


def _analysis(
    problem: Problem, workload: Workload, quantities: Sequence[str], seed: int, options: Mapping[str, str]
) -> Analysis:
    return ours.prepared(problem, workload, quantities, seed, **options).run()


def _row(scene: Scene, tool: str, seconds: float | None, note: str) -> Row:
    return Row(scene.workload.name, tool, f"cost [{unit(scene.device)}]", seconds, None, note)


def _cost(scene: Scene, tool: str, taken: Sequence[tuple[float, int]]) -> Row:
    seconds = statistics.median(spent for spent, _ in taken)
    least, most = min(number for _, number in taken), max(number for _, number in taken)
    number = str(least) if least == most else f"{least} to {most}"
    seeds = f"{len(taken)} seeds" if len(taken) > 1 else "1 seed"
    return _row(scene, tool, seconds, f"{number} products, {seconds / scene.gradient:.3g} gradients; {seeds}")


def _extrapolated(scene: Scene, tool: str, call: Call, meter: Meter) -> Row:
    told = f"ended after {meter.products} products and {PATIENCE:g} s, not judged"
    if call.products is None or not meter.products:
        return _row(scene, tool, None, told)
    seconds = PATIENCE * call.products / meter.products
    note = f"{call.products} products, {seconds / scene.gradient:.3g} gradients, extrapolated: {told}"
    return _row(scene, tool, seconds, note)


def _error(scene: Scene, tool: str, quantity: str, ones: Sequence[Judged], how: str = "") -> Row:
    """The worst true error over seeds, beside what was stated."""
    told = [(one.stated, one.holds) for one in ones if one.stated is not None]
    text = "states no error"
    if told:
        missed = sum(not holds for _, holds in told)
        word = f"MISSES {missed} of {len(told)}" if missed else "holds"
        text = f"states {statistics.median(stated for stated, _ in told):.2g}{f' ({how})' * bool(how)}: {word}"
    worst = max(abs(one.off) for one in ones)
    return Row(scene.workload.name, tool, f"{quantity}: true error", worst, None, text)
