"""What the terms that regularizers add to the loss would be at this checkpoint, read off its analysis.

The strengths are the defaults of `hessdiag.regularizers`; ``more`` holds the term's share of the loss. SAM's and
NSO's own terms are `sam_sharpness` and `noise_stability`.
"""

from __future__ import annotations

from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.curvature import metric_of, spectral_radius
from hessdiag.gap.measures.perturbations import NSO_SIGMA
from hessdiag.gap.registry import Reading, measure
from hessdiag.results import Metric

MU = 0.01  # of SpectralRadius and HSR
TRACE_MU = 1e-3  # of TracePenalty


@measure(
    "nso_penalty",
    title="NSO's penalty, second order",
    family="curvature",
    formula="sigma²/2 tr H, sigma = 0.01",
    source="Zhang, Li and Ju (arXiv 2306.08553), section 1",
    invariant=("permutation",),
    cost="none beyond the analysis",
)
def nso_penalty(checkpoint: Checkpoint) -> Reading | Refused:
    """σ²/2 · tr H, what averaging over Gaussian noise adds to the loss, to second order. Cost: none of its own."""
    return _scaled(checkpoint, metric_of(checkpoint, "trace"), NSO_SIGMA**2 / 2)


@measure(
    "trace_penalty",
    title="Trace penalty",
    family="curvature",
    formula="mu tr H, mu = 0.001",
    source="Gatmiry et al. (arXiv 2306.13239), section 1",
    invariant=("permutation",),
    cost="none beyond the analysis",
)
def trace_penalty(checkpoint: Checkpoint) -> Reading | Refused:
    """μ tr H. Cost: none of its own."""
    return _scaled(checkpoint, metric_of(checkpoint, "trace"), TRACE_MU)


@measure(
    "hsr_penalty",
    title="Hessian spectral range penalty",
    family="curvature",
    formula="mu U, U the upper Wolkowicz-Styan bound, mu = 0.01",
    source="Omae et al. (arXiv 2606.28662), abstract",
    invariant=("permutation",),
    cost="none beyond the analysis",
)
def hsr_penalty(checkpoint: Checkpoint) -> Reading | Refused:
    """μ (m + s √(P − 1)) of the whole sample set. Cost: none of its own."""
    return _scaled(checkpoint, metric_of(checkpoint, "ws_upper"), MU)


@measure(
    "spectral_radius_penalty",
    title="Spectral radius penalty",
    family="curvature",
    formula="mu max(0, rho - K), rho = max |lambda_i|, mu = 0.01, K = 0",
    source="Sandler, Klabjan and Luo (arXiv 2102.11210), section 3",
    invariant=("permutation",),
    cost="none beyond the analysis",
)
def spectral_radius_penalty(checkpoint: Checkpoint) -> Reading | Refused:
    """μ ρ of the whole sample set; training penalises each batch's own, which is larger on average. Cost: none."""
    return _scaled(checkpoint, spectral_radius(checkpoint), MU)


def _scaled(checkpoint: Checkpoint, number: Metric | Reading | Refused, strength: float) -> Reading | Refused:
    if isinstance(number, Refused):
        return number
    value, lo, hi = strength * number.value, strength * number.lo, strength * number.hi
    loss = checkpoint.loss
    return Reading(value, lo, hi, "interval", more={"share_of_loss": value / loss} if loss > 0 else {})
