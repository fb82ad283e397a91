"""Real checkpoints: every quantity with its interval, and whether an independent truth lies in it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from benchmarks import ours
from benchmarks.judged import ROUNDING, SIGMAS
from benchmarks.tables import Row
from benchmarks.timing import cpu_seconds, gradient_seconds, one_thread
from benchmarks.truth import RESULTS, Fact, Truth, truth
from benchmarks.workloads import CHECKPOINT_WORKLOADS, WORKLOADS, Workload, selected
from hessdiag.files import write_whole
from hessdiag.present import png
from hessdiag.results import QUANTITIES, Analysis, Bound, Metric


def run(data: str | None, quick: bool = False, names: Sequence[str] = ()) -> list[Row]:
    """One row per checkpoint and quantity, and what the measurement cost."""
    one_thread()
    names = selected(names, data, quick, ("digits_mlp", *CHECKPOINT_WORKLOADS))
    return [row for name in names for row in judge(WORKLOADS[name], data, quick)]


def judge(workload: Workload, data: str | None, quick: bool = False) -> list[Row]:
    """A whole analysis against everything known of the workload."""
    known = truth(workload, data, keep=not quick)
    problem = workload.problem(data)
    samples = workload.sample_set(problem)
    seconds, analysis = cpu_seconds(lambda: ours.analysis(problem, workload, QUANTITIES))
    keep_picture(workload.name, analysis, quick)
    rows = [
        Row(workload.name, "hessdiag", name, metric.value, None, verdict(metric, fact_of(name, known, analysis)))
        for name, metric in analysis.metrics.items()
    ]
    gradient = gradient_seconds(problem, samples.batches)
    note = f"all quantities together (default settings), {analysis.cost.products} products, {seconds:.3g} CPU s"
    rows.append(Row(workload.name, "hessdiag", "whole analysis [gradients]", seconds / gradient, None, note))
    alone, one = cpu_seconds(lambda: ours.analysis(problem, workload, ("trace",)))
    method = one.metrics["trace"].provenance.method
    note = f"trace alone: {method}, {one.cost.products} products, {alone:.3g} CPU s, self-test included"
    rows.append(Row(workload.name, "hessdiag", "trace [gradients]", alone / gradient, None, note))
    return rows


def keep_picture(name: str, analysis: Analysis, quick: bool) -> None:
    """The density beside the tables, as the README shows it."""
    if not quick and analysis.spectrum is not None:
        write_whole(RESULTS / f"{name}-density.png", png(analysis.plot.density(), dpi=110))


def fact_of(name: str, known: Truth, analysis: Analysis) -> Fact | None:
    """The truth of a quantity, derived where it is a function of others; None where it is not known."""
    if name in known.facts:
        return known.facts[name]
    if name in ("ws_lower", "ws_upper"):
        return _wolkowicz_styan(name, known)
    if name == "negative_mass" and known.spectrum:
        below = -analysis.spectrum.resolution if analysis.spectrum is not None else 0.0
        share = bisect.bisect_left(known.spectrum, below) / len(known.spectrum)
        return Fact(share, 0.0, f"share of all eigenvalues below {below:.2g}")
    return None


def verdict(metric: Metric, fact: Fact | None) -> str:
    """Whether the interval holds the truth (for bounds: whether the bound is the right formula)."""
    interval = f"{metric.kind} [{metric.lo:.6g}, {metric.hi:.6g}]"
    if fact is None:
        return f"{interval}; truth not known"
    outside = max(metric.lo - fact.value, fact.value - metric.hi, 0.0)
    if outside <= ROUNDING * abs(fact.value):
        word = "holds"
    elif outside <= SIGMAS * fact.error:
        word = "cannot tell (within the truth's own error)"
    else:
        word = f"MISSES by {outside / abs(fact.value):.2g}"
    kind = "bound" if isinstance(metric, Bound) else "truth"
    off = metric.value / fact.value - 1
    return f"{interval} {word} {kind} {fact.value:.7g} ± {fact.error:.1g}; value off by {off:+.1e}"


def _wolkowicz_styan(name: str, known: Truth) -> Fact:
    """Outer bounds from trace and squares: λ_max is at most m + s·√(n−1), λ_min at least m − s·√(n−1)."""
    n = known.parameters
    trace, squares = known["trace"], known["frobenius_squared"]
    mean = trace.value / n
    spread = math.sqrt(squares.value / n - mean**2)
    reach = spread * math.sqrt(n - 1)
    error = 0.5 * squares.error / squares.value * reach + trace.error / n
    return Fact(mean + (reach if name == "ws_upper" else -reach), error, "from the true trace and squares")
