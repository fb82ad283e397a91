"""The curvature analysis as measures: raw, and against learning rate and size of the weights.

All but `filter_normalised_trace` are read off ``Checkpoint.analysis`` and cost nothing beyond it. None of the raw
ones survives a rescaling of the layers (Dinh et al. 2017). The true share of negative eigenvalues would, since
rescaling is a congruence (Sylvester); the share that a measurement can tell from zero need not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from hessdiag.engine.products.coordinates import Map
from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.weighted_trace import COST, weighted_trace
from hessdiag.gap.registry import Reading, measure
from hessdiag.results import Metric
from hessdiag.track.follow import rate_of

READ_OFF = "none beyond the curvature analysis"
NO_ANALYSIS = Refused("no curvature analysis was made of this checkpoint")


def metric_of(checkpoint: Checkpoint, name: str) -> Metric | Refused:
    """A number of the analysis; or why it is not there."""
    if checkpoint.analysis is None:
        return NO_ANALYSIS
    found = checkpoint.analysis.metrics.get(name)
    return found or Refused(f"the curvature analysis was made without {name}")


def reading_of(metric: Metric, scale: float = 1.0, note: str = "") -> Reading:
    """A number of the analysis times ``scale``, with its interval."""
    lo, hi = sorted((metric.lo * scale, metric.hi * scale))
    kinds: Mapping[str, Any] = {"exact": "exact", "probes": "draws"}
    return Reading(metric.value * scale, lo, hi, kinds.get(metric.kind, "interval"), note)


def _read(name: str) -> Callable[[Checkpoint], Reading | Refused]:
    def read(checkpoint: Checkpoint) -> Reading | Refused:
        metric = metric_of(checkpoint, name)
        return metric if isinstance(metric, Refused) else reading_of(metric)

    read.__name__ = name
    return read


RAW = {
    "lambda_max": ("Largest eigenvalue", "λ_max(H)", "Keskar et al. 2017", ()),
    "lambda_min": ("Smallest eigenvalue", "λ_min(H)", "", ()),
    "trace": ("Trace", "tr H = Σ λ_i", "Ju et al. 2022", ()),
    "effective_rank": ("Effective rank", "(tr H)² / tr H²", "", ()),
    "negative_mass": (
        "Share of negative eigenvalues",
        "#{λ_i < 0} / P",
        "Ghorbani et al. 2019",
        (),
    ),
    "ws_upper": ("Wolkowicz-Styan bound on λ_max", "m + s √(P−1)", "Wolkowicz & Styan 1980, Theorem 2.1", ()),
    "ws_lower": ("Wolkowicz-Styan bound on λ_min", "m − s √(P−1)", "Wolkowicz & Styan 1980, Theorem 2.1", ()),
}
for _name, (_title, _formula, _source, _kept) in RAW.items():
    measure(
        _name,
        title=_title,
        family="curvature",
        formula=_formula,
        source=_source or "definition",
        invariant=(*_kept, "permutation"),
        cost=READ_OFF,
    )(_read(_name))


@measure(
    "spectral_radius",
    title="Spectral radius",
    family="curvature",
    formula="ρ(H) = max |λ_i|",
    source="Kaur et al. 2022 (which says λ_max); Sandler et al. 2021",
    invariant=("permutation",),
    cost=READ_OFF,
)
def spectral_radius(checkpoint: Checkpoint) -> Reading | Refused:
    """ρ(H) = max(λ_max, −λ_min); its interval from both. No invariance but permutation. Cost: none."""
    top, bottom = metric_of(checkpoint, "lambda_max"), metric_of(checkpoint, "lambda_min")
    if isinstance(top, Refused):
        return top
    if isinstance(bottom, Refused):
        return bottom
    note = "the eigenvalue of largest modulus is negative" if -bottom.value > top.value else ""
    value = max(top.value, -bottom.value)
    lo, hi = max(top.lo, -bottom.hi, 0.0), max(top.hi, -bottom.lo, 0.0)
    return Reading(value, min(lo, value), max(hi, value), "interval", note)


@measure(
    "trace_per_example",
    title="Trace over the number of examples",
    family="curvature",
    formula="tr H / n",
    source="Ju et al. 2022: the generalization bound grows with √(tr H / n)",
    invariant=("permutation",),
    cost=READ_OFF,
)
def trace_per_example(checkpoint: Checkpoint) -> Reading | Refused:
    """Tr H / n, n the examples measured on. No invariance but permutation. Cost: none."""
    trace = metric_of(checkpoint, "trace")
    return trace if isinstance(trace, Refused) else reading_of(trace, 1 / checkpoint.examples)


@measure(
    "frobenius",
    title="Frobenius norm",
    family="curvature",
    formula="‖H‖_F = √(tr H²)",
    source="definition",
    invariant=("permutation",),
    cost=READ_OFF,
)
def frobenius(checkpoint: Checkpoint) -> Reading | Refused:
    """‖H‖_F, the root of the measured square. No invariance but permutation. Cost: none."""
    square = metric_of(checkpoint, "frobenius_squared")
    if isinstance(square, Refused):
        return square
    lo, value, hi = (math.sqrt(max(x, 0.0)) for x in (square.lo, square.value, square.hi))
    return Reading(value, lo, hi, reading_of(square).kind)


@measure(
    "ws_slack",
    title="Slack of the Wolkowicz-Styan bound",
    family="curvature",
    formula="(m + s √(P−1)) / λ_max",
    source="Wolkowicz & Styan 1980; about the root of how many eigenvalues carry ‖H‖_F",
    invariant=("permutation",),
    cost=READ_OFF,
)
def ws_slack(checkpoint: Checkpoint) -> Reading | Refused:
    """The bound over what it bounds, at least 1. No invariance but permutation. Cost: none."""
    upper, top = metric_of(checkpoint, "ws_upper"), metric_of(checkpoint, "lambda_max")
    if isinstance(upper, Refused):
        return upper
    if isinstance(top, Refused):
        return top
    if top.lo <= 0:
        return Refused(f"λ_max is {top.value:.3g}, not positive for certain: a ratio to it says nothing")
    value = upper.value / top.value
    return Reading(value, min(upper.lo / top.hi, value), max(upper.hi / top.lo, value), "interval")


@measure(
    "edge_of_stability",
    title="Sharpness against the edge of stability",
    family="curvature",
    formula="λ_max η/2; heavy ball λ_max η/(2+2β), Nesterov λ_max η(1+2β)/(2+2β)",
    source="Cohen et al. 2021, section 2 and appendix B",
    invariant=("permutation",),
    cost=READ_OFF,
)
def edge_of_stability(checkpoint: Checkpoint) -> Reading | Refused:
    """λ_max over the largest curvature at which the optimizer is stable: 1 at the edge.

    η, β and nesterov come from the checkpoint, else from ``Problem.meta`` ("lr", "momentum", "nesterov"): the same
    limit as along a trajectory (`rate_of`). No invariance but permutation. Cost: none.
    """
    rate = rate_of(None, checkpoint.facts, checkpoint.problem.meta)
    if rate is None:
        return Refused('the learning rate is not known: give Problem(meta={"lr": ...})')
    if isinstance(rate, Refused):
        return rate
    top = metric_of(checkpoint, "lambda_max")
    if isinstance(top, Refused):
        return top
    note = "a threshold for full-batch training only; between iterates it may be passed with BatchNorm"
    return reading_of(top, 1 / rate.limit, note)


@measure(
    "lambda_max_weights",
    title="Largest eigenvalue times squared weights",
    family="curvature",
    formula="λ_max ‖θ‖²",
    source="scale-free under θ → cθ with L(cθ) = L(θ) (BatchNorm); Wen et al. 2023",
    invariant=("permutation",),
    cost=READ_OFF,
)
def lambda_max_weights(checkpoint: Checkpoint) -> Reading | Refused:
    """λ_max ‖θ‖²: does not move when all weights are scaled together, but does per layer. Cost: none."""
    top = metric_of(checkpoint, "lambda_max")
    return top if isinstance(top, Refused) else reading_of(top, float(checkpoint.theta.double().square().sum()))


@measure(
    "filter_normalised_trace",
    title="Filter-normalised trace",
    family="curvature",
    formula="Σ_filters ‖w_f‖²/|f| · tr H_ff = E dᵀHd over filter-normalised directions d",
    source="Li et al. 2018, section 4 (directions; biases and BatchNorm left out as there)",
    invariant=("layer rescaling", "permutation"),
    cost=COST,
)
def filter_normalised_trace(checkpoint: Checkpoint) -> Reading | Refused:
    """Mean curvature along random directions whose filters are as long as the weights' own.

    A filter is a row of a linear layer or one output channel of a convolution. Invariant to the scale of layers:
    H_ff shrinks as ‖w_f‖² grows. Not to neurons', which reach into the next layer's filters.
    """
    maps: dict[str, Map] = {}
    for name, tensor in zip(checkpoint.operator.function.names, checkpoint.operator.function.theta, strict=True):
        if tensor.dim() >= 2:
            length = tensor.detach().flatten(1).double().square().mean(1).sqrt().to(tensor)
            maps[name] = partial(torch.mul, length.view(-1, *[1] * (tensor.dim() - 1)))
    if not maps:
        return Refused("no weight that counts is a matrix or a kernel: there are no filters")
    return weighted_trace(checkpoint, maps, "filter-normalised trace")
