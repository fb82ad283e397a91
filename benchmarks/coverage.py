"""How often each interval holds the truth, over 2,000 seeds, of whole analyses at the default settings.

Every analysis is the sweep that a user gets, on Hessians whose eigenvalues are all known: the digits MLP given as
a bare loss (so that its traces come from probes; float32), and two quadratic functions whose matrices are dense
(float64). Also with the 32 probes that checks and comparisons ask for. Estimators with fixed numbers of probes and
steps, and other spectra, are in ``tests/test_stderr_is_honest.py``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

from benchmarks.density_truth import DensityTruth
from benchmarks.gate_subjects import mean_loss
from benchmarks.tables import Row
from benchmarks.timing import one_thread
from benchmarks.truth import truth
from benchmarks.workloads import WORKLOADS
from hessdiag.analysis.spending import Spending
from hessdiag.analysis.sweep import Sweep
from hessdiag.engine.checks.preflight import preflight
from hessdiag.problem import Problem
from hessdiag.results import Metric
from hessdiag.samples import draw
from hessdiag.settings import PAIRED, Settings

SEEDS = 2000
LOW, HIGH = 0.93, 0.97  # what a 95% interval has to cover
CHANCE = 1e-3  # of calling a certificate wrong that fails as often as it says
SPECTRA = {
    "outliers and a bulk": np.r_[
        np.geomspace(0.5, 10, 8),
        0.05 * np.random.default_rng(1).normal(size=222),
        -0.2 * np.random.default_rng(2).random(70),
    ],
    "semicircle": 2 * np.random.default_rng(3).beta(1.5, 1.5, 300) - 0.7,
}
ASKED = {"defaults": {}, f"{PAIRED['probes']} probes": {"probes": PAIRED["probes"]}}


class Quadratic(nn.Module):
    """½ xᵀAx of a dense A with these eigenvalues."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        basis, _ = np.linalg.qr(np.random.default_rng(6).normal(size=(len(values), len(values))))
        self.x = nn.Parameter(torch.from_numpy(np.random.default_rng(7).normal(size=len(values))))
        self.register_buffer("A", torch.from_numpy(basis * np.sort(values) @ basis.T))

    def forward(self, _: Tensor) -> Tensor:
        return self.x @ self.A @ self.x / 2


def run(data: str | None = None, quick: bool = False) -> list[Row]:
    """The share of seeds whose interval holds the truth, one row per Hessian, settings and quantity."""
    one_thread()
    return [
        row
        for name, problem, values in subjects(data, quick)
        for asked, options in ASKED.items()
        for row in cover(f"{name}, {asked}", problem, values, Settings(**options), 2 if quick else SEEDS)
    ]


def subjects(data: str | None, quick: bool) -> Iterator[tuple[str, Problem, np.ndarray]]:
    """Names, problems and all eigenvalues."""
    workload = WORKLOADS["digits_mlp"]
    known = truth(workload, data, keep=not quick)
    plain = workload.problem(data)
    bare = replace(plain, data={"train": list(workload.sample_set(plain).batches)}, criterion=None, loss=mean_loss)
    yield "digits_mlp", bare, np.array(known.spectrum)
    for name, values in SPECTRA.items():
        model = Quadratic(values)
        batches = [(torch.zeros(1, 1, dtype=torch.float64),)]
        yield name, Problem(model, {"train": batches}, loss=lambda m, batch: m(batch[0])), np.sort(values)


def cover(name: str, problem: Problem, eigenvalues: np.ndarray, settings: Settings, seeds: int) -> list[Row]:
    """Rows of one Hessian and one set of settings."""
    checked = preflight(problem, draw(problem.data["train"], samples=None), opinion=False)
    op, begun = checked.operator, time.perf_counter()
    number = len(eigenvalues)
    shape = DensityTruth(eigenvalues, np.full(number, 1 / number), 0.0, "")
    held: dict[str, list[bool]] = defaultdict(list)
    widths: dict[str, list[float]] = defaultdict(list)
    last: dict[str, Metric] = {}
    before = op.products
    for seed in range(seeds):
        spending = Spending(None, op, checked.gradient_seconds, begun)
        found = Sweep(op, replace(settings, seed=seed), spending).run()
        last = found.metrics
        facts = facts_of(eigenvalues, found.spectrum.resolution if found.spectrum else 0.0)
        for quantity, metric in last.items():
            held[quantity].append(metric.lo <= facts[quantity] <= metric.hi)
            widths[quantity].append((metric.hi - metric.lo) / max(abs(metric.value), 1e-300))
        if found.spectrum is not None and found.spectrum.error is not None:
            held["density"].append(shape.off(*np.array(found.spectrum.merged()).T) <= found.spectrum.error)
            widths["density"].append(found.spectrum.error)
    op.graphs.release()
    each = f"{(op.products - before) / seeds:.0f} products each"
    rows = []
    for quantity, flags in held.items():
        share, width = sum(flags) / len(flags), np.median(widths[quantity])
        word = f"{judged(flags, last.get(quantity))}, width {width:.2g} of the value; {each}"
        rows.append(Row(name, "hessdiag", f"{quantity}: share of intervals holding the truth", share, None, word))
    return rows


def facts_of(values: np.ndarray, resolution: float = 0.0) -> Mapping[str, float]:
    """The truth of every quantity; eigenvalues within ``resolution`` of zero have no sign."""
    d, t1, t2 = len(values), float(values.sum()), float(np.square(values).sum())
    reach = float(np.sqrt((t2 / d - (t1 / d) ** 2) * (d - 1)))
    return {
        "lambda_max": float(values.max()),
        "lambda_min": float(values.min()),
        "trace": t1,
        "frobenius_squared": t2,
        "effective_rank": t1**2 / t2,
        "ws_upper": t1 / d + reach,
        "ws_lower": t1 / d - reach,
        "negative_mass": float((values < -resolution).mean()),
    }


def judged(flags: list[bool], metric: Metric | None) -> str:
    """Whether the share is what the interval states."""
    missed, number = len(flags) - sum(flags), len(flags)
    share = sum(flags) / number
    if metric is None:
        return f"{'as stated' if share >= LOW else 'NOT as stated'}; own error"
    stated = metric.confidence
    if metric.kind == "ritz":
        most = float(binom.ppf(1 - CHANCE, number, 1 - stated))
        word = f"misses {missed}, {'as stated' if missed <= most else 'MISSES more than stated'}"
    elif metric.kind == "bracket":  # at least as often as it says
        word = "as stated" if share >= LOW else "NOT as stated"
    else:
        word = "as stated" if LOW <= share <= HIGH or (stated == 1 and share == 1) else "NOT as stated"
    return f"{word}; {metric.kind}, stated {stated:g}"
