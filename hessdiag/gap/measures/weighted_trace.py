"""tr(AᵀHA): the curvature along chosen directions, exact where the network is piecewise linear in the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hessdiag.engine.products.coordinates import Coordinates, Map
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.squares.curved import curved_tensors
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.registry import Reading
from hessdiag.results.interval import mean_interval
from hessdiag.settings import DEFAULT, PAIRED
from hessdiag.spectral.probes import rademacher

PROBES = PAIRED["probes"]
CONFIDENCE = DEFAULT.confidence
COST = f"C gradients for C outputs up to 32 an example; else {PROBES} products"


def weighted_trace(checkpoint: Checkpoint, maps: Mapping[str, Map], stream: str) -> Reading:
    """The trace of the Hessian seen through linear maps of some parameters.

    tr(AᵀGA) by per-example gradients, as the analysis takes tr(G), and probes on AᵀRA alone where a tensor is
    curved; with more than 32 outputs an example, or where examples cannot be taken apart, probes on AᵀHA.

    Args:
        checkpoint: on whose samples.
        maps: parameter name to a linear map that keeps its shape; A.
        stream: names the probes.
    """
    function = Coordinates(checkpoint.operator.function, maps)
    operator = _seen_through(checkpoint.operator, function)
    exact = None if operator.method == "finite_difference" else gauss_newton_trace(operator, seed=checkpoint.seed)
    if exact is None or isinstance(exact, Refused) or not exact.exact:
        return _probed(operator, checkpoint.seed, stream, 0.0)
    known = float(exact.draws.mean())
    bent = set(maps) & set(curved_tensors(checkpoint.operator)) if operator.kind == "hessian" else set()
    if not bent:
        return Reading(known, known, known, "exact")
    return _probed(operator.with_kind("residual"), checkpoint.seed, stream, known)


def _seen_through(old: Curvature, function: Coordinates) -> Curvature:
    new = Curvature(old.problem, old.samples, kind=old.kind, method=old.method, block=old.block, function=function)
    new.micro_batch, new.divisible, new.floor = old.micro_batch, old.divisible, old.floor
    return new


def _probed(operator: Curvature, seed: int, stream: str, known: float) -> Reading:
    """``known`` plus the mean of z·(operator z) over random signs."""
    with operator.recorded() as record:
        for begin in range(0, PROBES, operator.block):
            indices = range(begin, min(begin + operator.block, PROBES))
            operator.rows(torch.stack([rademacher(operator, seed, stream, i) for i in indices]))
    samples = known + torch.stack(record.tensors).sum(1).numpy()
    value = float(samples.mean())
    _, lo, hi = mean_interval(samples, CONFIDENCE)
    return Reading(value, min(lo, value), max(hi, value), "draws")
