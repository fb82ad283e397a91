"""How much memory is needed: for λ_max to a true 1e-3, and for one product in plain gradients' memory.

Every figure comes from a process of its own: the peak of resident memory (on a GPU, of allocated memory) above
what model, data and imports hold. The same batches for all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import products
from benchmarks.accuracy import GOALS, warm, within_math
from benchmarks.adapters import classification, installed
from benchmarks.methods import METHODS
from benchmarks.models import GPT
from benchmarks.ours import ask, frozen
from benchmarks.tables import Row
from benchmarks.timing import GIVING_BACK, gradient, one_thread, paired, peak_mib
from benchmarks.truth import truth
from benchmarks.workloads import MEMORY_WORKLOADS, WORKLOADS, Workload, selected
from hessdiag.engine.products.methods import METHODS as OURS
from hessdiag.errors import one_line

SWEEPS = {"hessdiag": None} | {m.name: m for m in METHODS if m.quantity == "lambda_max"}
SHALLOW = products.Subject("gpt, 2 layers", lambda: GPT(layers=2), products.characters, 16)
DEEP = products.Subject("gpt, 12 layers", lambda: GPT(width=128, layers=12), products.characters, 16)
TOOLS = ("hessdiag", *(f"hessdiag ({method})" for method in OURS), *products.PEERS)
PEAK, TIME = "peak of one product [gradients' memory]", "time of one product [gradients]"
ROUNDS = 3
NOISE = 1.0  # MiB: ratios of less mean nothing


def run(data: str | None, quick: bool = False, names: Sequence[str] = (), device: str = "cpu") -> list[Row]:
    """One row per workload and tool; then two rows, memory and time, per way and peer for the deep GPT."""
    names = selected(names, data, quick, (*MEMORY_WORKLOADS, DEEP.name))
    rows = [row for name in names if name in WORKLOADS for row in sweeps(WORKLOADS[name], data, device, quick)]
    if quick or DEEP.name in names:
        rows += deep(device, quick)
    return rows


def sweeps(workload: Workload, data: str | None, device: str, quick: bool) -> list[Row]:
    """Peaks of finding λ_max."""
    goal = GOALS["lambda_max"]
    known = truth(workload, data, device, keep=not quick)["lambda_max"].value
    tools = [name for name in SWEEPS if not quick or name.startswith(("hessdiag", "eigenthings"))]
    found = {name: _told("sweep", workload.name, name, repr(known), data or "", device) for name in tools}
    right = [f["MiB"] for name, f in found.items() if name != "hessdiag" and f.get("off", 1.0) <= goal]
    rows = []
    for name, told in found.items():
        value = told["MiB"] if told.get("off", 1.0) <= goal else None
        ratio = max(value, NOISE) / max(min(right), NOISE) if value is not None and right else None
        rows.append(Row(workload.name, name, f"peak of lambda_max to {goal:g} [MiB]", value, ratio, told["note"]))
    return rows


def deep(device: str, quick: bool) -> list[Row]:
    """Memory and time of one product on a deep network, graph included."""
    subject = SHALLOW if quick else DEEP
    names = ("hessdiag", "eigenthings") if quick else TOOLS
    problem = products.problem_of(subject, 1, device)
    measure = gradient(problem, problem.data["train"])
    measure()
    build, row = dict(products.tools(problem)), products.vectors(problem, 1)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = _told("product", name, device, "quick" if quick else "")
        if PEAK in found[name]:
            call = partial(_ready(build[name], row).sweep, row)
            found[name][TIME] = statistics.median(paired({name: call}, measure, ROUNDS)[name])
    rows = [products.attention(subject.name, measure)]
    for quantity in (PEAK, TIME):
        best = min(
            (f[quantity] for name, f in found.items() if name in products.PEERS and quantity in f), default=None
        )
        for name, told in found.items():
            value = told.get(quantity)
            ratio = value / best if value is not None and best else None
            rows.append(Row(subject.name, name, quantity, value, ratio, told["note"]))
    return rows


def _told(*words: str) -> dict[str, Any]:
    """What a process of its own prints; why there is nothing, if it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **GIVING_BACK})
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"note": f"crash: {one_line(last[0], 120)}"}
    return json.loads(done.stdout.splitlines()[-1])


def _sweep(workload: str, tool: str, known: str, data: str, device: str) -> dict[str, Any]:
    """In the child: the peak at the first budget that is right."""
    if tool != "hessdiag" and not installed(tool.split(" (")[0]):
        return {"note": "not installed"}
    chosen = WORKLOADS[workload]
    problem = chosen.problem(data or None, device)
    vector = sum(p.numel() * p.element_size() for p in problem.model.parameters()) / 2**20
    method = SWEEPS[tool]
    off = peak = float("inf")
    if method is None:
        small = WORKLOADS["digits_mlp"]
        ask(small.problem(None, device), small, "lambda_max", 0)
        fixed = frozen(problem, chosen)
        peak, found = peak_mib(lambda: ask(fixed, chosen, "lambda_max", 0))
        off, told = abs(found.value / float(known) - 1), found.how
        products_formed = found.products
    else:
        case = classification(problem.model, chosen.sample_set(problem).batches, whole=False)
        warm(method, case.device)
        for budget in method.budgets:
            peak, answer = peak_mib(lambda b=budget: within_math(method, case, b, 0))
            off, told = abs(answer.value / float(known) - 1), f"{method.how} {budget:g}"
            products_formed = answer.products
            if off <= GOALS["lambda_max"]:
                break
    note = f"{told}, {products_formed} products, off by {off:.1g}; {peak / vector:.3g} vectors of {vector:.3g} MiB"
    return {"MiB": peak, "off": off, "note": note}


def _product(tool: str, device: str, quick: str) -> dict[str, Any]:
    """In the child: memory of one product over that of a gradient, after a first one."""
    if tool in products.PEERS and not installed(tool):
        return {"note": "not installed"}
    problem = products.problem_of(SHALLOW if quick else DEEP, 1, device)
    measure = gradient(problem, problem.data["train"])
    measure()
    row = products.vectors(problem, 1)
    ready = _ready(dict(products.tools(problem))[tool], row)
    below = max(peak_mib(measure)[0] for _ in range(ROUNDS))
    above = max(peak_mib(partial(_freshly, ready, row))[0] for _ in range(ROUNDS))
    note = f"{ready.method()}{above:.3g} MiB where a gradient takes {below:.3g} MiB; {row.numel()} parameters"
    return {PEAK: above / below, "note": note}


def _ready(build: Callable[[], products.Tool], row: torch.Tensor) -> products.Tool:
    """A tool that has done all that is done once, and keeps nothing."""
    with sdpa_kernel(SDPBackend.MATH):
        tool = build()
    _freshly(tool, row)
    return tool


def _freshly(tool: products.Tool, row: torch.Tensor) -> None:
    """One product, and nothing kept afterwards."""
    tool.sweep(row)
    tool.forget()


if __name__ == "__main__":
    one_thread()
    answers = {"sweep": _sweep, "product": _product}[sys.argv[1]](*sys.argv[2:])
    sys.stdout.write(json.dumps(answers) + "\n")
