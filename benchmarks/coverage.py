"""How often each interval holds the truth, over 2,000 seeds, at the default settings, on a spectrum known in full.

The operator is the diagonal matrix of the true eigenvalues: probes and start vectors are uniform on the sphere, so
the distribution of every estimate is that of any matrix with the same eigenvalues, the network's own included.
Other spectra (semicircle, low rank) are in ``tests/test_stderr_is_honest.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch

from benchmarks.tables import Row
from benchmarks.timing import one_thread
from benchmarks.truth import truth
from benchmarks.workloads import WORKLOADS
from hessdiag.operator import ClosureOperator
from hessdiag.results import Metric
from hessdiag.settings import Settings
from hessdiag.spectral import (
    density,
    effective_rank_from,
    extremes,
    forms,
    frobenius_squared_from,
    negative_mass,
    trace_from,
    wolkowicz_styan,
)

SEEDS = 2000
LOW, HIGH = 0.93, 0.97  # what a 95% interval has to cover


def run(data: str | None = None, quick: bool = False) -> list[Row]:
    """The share of seeds whose interval holds the truth, one row per spectrum and quantity."""
    one_thread()
    known = truth(WORKLOADS["digits_mlp"], data, keep=not quick)
    return cover("digits_mlp", np.array(known.spectrum), 2 if quick else SEEDS)


def cover(name: str, eigenvalues: np.ndarray, seeds: int) -> list[Row]:
    """Rows of one spectrum."""
    facts = facts_of(eigenvalues)
    diagonal = torch.from_numpy(eigenvalues)[:, None]
    held: dict[str, list[bool]] = defaultdict(list)
    last: Mapping[str, Metric] = {}
    for seed in range(seeds):
        op = ClosureOperator(lambda block: diagonal * block, len(eigenvalues))
        last = sweep(op, seed)
        for quantity, metric in last.items():
            held[quantity].append(metric.lo <= facts[quantity] <= metric.hi)
    return [
        Row(
            name,
            "hessdiag",
            f"{quantity}: share of intervals holding the truth",
            share,
            None,
            judged(share, last[quantity]),
        )
        for quantity, flags in held.items()
        for share in [sum(flags) / len(flags)]
    ]


def sweep(op: ClosureOperator, seed: int) -> dict[str, Metric]:
    """Every estimate of one seed, as an analysis makes them."""
    s = Settings(seed=seed)
    ends = extremes(op, rtol=s.rtol, seed=seed, max_steps=s.max_steps)
    run = density(op, s.density_probes, s.steps, seed, ends.krylov)
    values = forms(op, ends.krylov, s.probes, seed)
    trace, square = trace_from(values), frobenius_squared_from(values)
    ws = wolkowicz_styan(trace, square, op.size)
    found = (ends.lambda_max, ends.lambda_min, trace, square, effective_rank_from(values), ws.upper, ws.lower)
    return {metric.quantity: metric for metric in (*found, negative_mass(run)) if metric is not None}


def facts_of(values: np.ndarray) -> dict[str, float]:
    """The truth of every quantity."""
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
        "negative_mass": float((values < 0).mean()),
    }


def judged(share: float, metric: Metric) -> str:
    """Whether the share is what the interval states."""
    width = (metric.hi - metric.lo) / max(abs(metric.value), 1e-300)
    if metric.kind in ("ritz", "bracket"):
        word = "never misses" if share == 1 else "MISSES"
    else:
        word = "as stated" if LOW <= share <= HIGH else "NOT as stated"
    return f"{word}; {metric.kind}, stated {metric.confidence:g}, width {width:.2g} of the value"
