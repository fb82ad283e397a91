"""Bytes per parameter at the peak of every stage of a measurement, above what was held when the stage began.

A process per network, stage after stage; few examples, so that vectors decide and activations do not. Alone:
``python -m benchmarks.memory_stages 1e6 1e7 1.2e8``.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from benchmarks.tables import Row
from benchmarks.timing import GIVING_BACK, one_thread, peak_mib
from hessdiag.analysis import Measurement
from hessdiag.analysis.run import take_run
from hessdiag.engine.checks.planner import choose, trial_vectors
from hessdiag.engine.checks.preflight import preflight
from hessdiag.engine.checks.selftest import self_test
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import one_line
from hessdiag.problem import Problem
from hessdiag.results import QUANTITIES
from hessdiag.samples import draw
from hessdiag.settings import Settings
from hessdiag.spectral import density, forms

SIZES = (1e6, 1e7)
EXAMPLES, LAYERS, INPUTS, CLASSES = 8, 4, 64, 10


def mlp(parameters: float) -> Problem:
    """About so many parameters in four hidden layers of one width, on a few random examples in two batches."""
    torch.manual_seed(0)
    width = max(8, round(math.sqrt(parameters / (LAYERS - 1))))
    widths = [INPUTS, *[width] * LAYERS]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, CLASSES))
    data = (torch.randn(EXAMPLES, INPUTS), torch.randint(CLASSES, (EXAMPLES,)))
    return Problem(model, {"train": data}, criterion="cross_entropy")


def stages(parameters: float) -> dict[str, float]:
    """Peak bytes per parameter of every stage."""
    problem = mlp(parameters)
    samples = draw(problem.data["train"], samples=EXAMPLES, seed=0, batch_size=EXAMPLES // 2)
    found: dict[str, float] = {}

    def stage(name: str, call: Callable[[], Any]) -> Any:
        peak, result = peak_mib(call)
        found[name] = peak * 2**20 / op.size
        return result

    op = Curvature(problem, samples)
    op.loss(), op.trial
    plan = stage("plan", lambda: choose(op, fixed=False))
    op.method = plan.method
    stage("self-test", lambda: self_test(op, plan))
    stage("gradient", op.gradient)
    row = trial_vectors(op, 1)
    stage("first product, graphs kept", lambda: op.rows(row))
    stage("product", lambda: op.rows(row))
    op.graphs.release()
    op = None
    op = stage_preflight(problem, samples, found)
    settings = Settings(quantities=("lambda_max",), max_steps=20)
    run = stage("extremes, 20 steps", lambda: _run(op, settings))
    stage("probes", lambda: forms(op, run, 8, 0))
    stage("density, 8 probes of 4 steps", lambda: density(op, 8, 4, 0, None))
    return found


def stage_preflight(problem: Problem, samples: Any, found: dict[str, float]) -> Curvature:
    """The operator after all that is done before the first product."""
    peak, checked = peak_mib(lambda: preflight(problem, samples))
    found["preflight, with theta"] = peak * 2**20 / checked.operator.size
    return checked.operator


def _run(op: Curvature, settings: Settings) -> Any:
    from hessdiag.analysis.found import Found

    found = Found(metrics={})
    take_run(op, settings, found, every=False, warm=None)
    return found.krylov


def run(data: str | None, quick: bool = False, sizes: Sequence[float] = ()) -> list[Row]:  # noqa: ARG001
    """One row per network and stage."""
    rows = []
    for size in sizes or (SIZES[:1] if quick else SIZES):
        command = [sys.executable, "-m", "benchmarks.memory_stages", "--one", repr(size)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **GIVING_BACK})
        name = f"MLP of {size:.3g} parameters"
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            rows.append(
                Row(name, "hessdiag", "bytes per parameter", None, None, f"crash: {one_line(last[0], 120)}")
            )
            continue
        told = json.loads(done.stdout.splitlines()[-1])
        rows += [Row(name, "hessdiag", f"{stage} [bytes/parameter]", told[stage], None, "") for stage in told]
    return rows


def _main(words: Sequence[str]) -> None:
    one_thread()
    if words[:1] == ["--one"]:
        small = mlp(1e4)  # no import is counted
        Measurement(small, Settings(quantities=QUANTITIES, samples=EXAMPLES, max_steps=20, probes=2)).run()
        sys.stdout.write(json.dumps(stages(float(words[1]))) + "\n")
        return
    from benchmarks.tables import report

    rows = run(None, sizes=[float(word) for word in words])
    sys.stdout.write(
        report("Bytes per parameter", "At the peak of a stage, above what was held before.", rows) + "\n"
    )


if __name__ == "__main__":
    _main(sys.argv[1:])
