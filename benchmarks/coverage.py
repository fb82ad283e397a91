"""How often each interval holds the truth, over seeds, on the digits MLP whose whole Hessian is known."""

from __future__ import annotations

from collections import defaultdict

from benchmarks import ours
from benchmarks.checkpoints import fact_of
from benchmarks.tables import Row
from benchmarks.timing import one_thread
from benchmarks.truth import truth
from benchmarks.workloads import WORKLOADS

SEEDS = 200
ASKED = (
    "lambda_max",
    "lambda_min",
    "trace",
    "frobenius_squared",
    "ws_lower",
    "ws_upper",
    "effective_rank",
    "negative_mass",
)


def run(data: str | None = None, quick: bool = False) -> list[Row]:
    """The share of seeds whose interval holds the truth, one row per quantity."""
    one_thread()
    workload = WORKLOADS["digits_mlp"]
    known = truth(workload, data, keep=not quick)
    problem = workload.problem(data)
    held: dict[str, list[bool]] = defaultdict(list)
    widths: dict[str, float] = {}
    confidence: dict[str, float] = {}
    for seed in range(2 if quick else SEEDS):
        result = ours.analysis(problem, workload, ASKED, seed=seed)
        for name, metric in result.metrics.items():
            fact = fact_of(name, known, result)
            if fact is None:
                continue
            slack = 1e-5 * abs(fact.value)
            held[name].append(metric.lo - slack <= fact.value <= metric.hi + slack)
            widths[name] = (metric.hi - metric.lo) / abs(fact.value)
            confidence[name] = metric.confidence
    return [
        Row(
            workload.name,
            "hessdiag",
            f"{name}: share of intervals holding the truth",
            sum(flags) / len(flags),
            None,
            f"{len(flags)} seeds, stated {confidence[name]:g}, relative width {widths[name]:.2g}",
        )
        for name, flags in held.items()
    ]
