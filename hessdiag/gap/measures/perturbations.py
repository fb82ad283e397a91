"""Average sharpness: how much the loss rises under random perturbations of the weights, and noise stability.

Every mean is over 10 pairs w ± u, so 20 draws: in a pair the odd orders cancel, which leaves the variance of the
curvature alone (papers on noise stability optimization: without the pairs |g|² enters, hundreds of times as much
on a trained network). The draws are the same for every checkpoint of one seed, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from hessdiag.engine.landscape.landscape import Landscape
from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.registry import Reading, measure
from hessdiag.results.interval import mean_interval
from hessdiag.spectral.probes import stream

Law = Literal["normal", "uniform"]
PAIRS = 10  # 20 draws: Andriushchenko et al. 2023, section 4
CONFIDENCE = 0.95
CHUNK_BYTES = 64 * 2**20  # of directions held at once
RADII = (0.001, 0.005, 0.01, 0.02)  # standard deviations of NSO's own measurements, arXiv 2306.08553
NSO_SIGMA = 0.01  # NSO's own for CIFAR
ANDRIUSHCHENKO = "Andriushchenko et al. 2023 (arXiv 2302.07011), section 2"
NO_CLASSES = Refused("there are no integer classes, whose logits could be normalised")


def directions(checkpoint: Checkpoint, law: Law, number: int) -> Iterator[Tensor]:
    """Random vectors in rows (k, P), a chunk of them at a time: N(0, 1) or uniform on [-1, 1] per entry.

    Args:
        checkpoint: gives seed, layout, dtype and device.
        law: of an entry.
        number: how many in all; row i is the same whatever the number.
    """
    op, most = checkpoint.operator, max(1, CHUNK_BYTES // (8 * checkpoint.size))
    for begin in range(0, number, most):
        rows = [
            torch.cat(
                [
                    _entries(law, size, stream(checkpoint.seed, "perturbation", law, i, name))
                    for name, size in op.layout
                ]
            )
            for i in range(begin, min(begin + most, number))
        ]
        yield torch.stack(rows).to(op.device, op.dtype)


def rises(
    checkpoint: Checkpoint,
    scale: Tensor | float,
    *,
    law: Law = "normal",
    pairs: int = PAIRS,
    landscape: Landscape | None = None,
) -> NDArray[np.float64]:
    """(L(w + d) + L(w − d)) / 2 − L(w) for random d = scale · u, (pairs,).

    Cost: 2 · pairs + 1 forward passes.

    Args:
        checkpoint: at w.
        scale: standard deviation ("normal") or half width ("uniform") per entry, a number or (P,).
        law: of u.
        pairs: how many d.
        landscape: the checkpoint's own by default.
    """
    landscape = landscape or checkpoint.landscape
    here, found = landscape.loss(), []
    for rows in directions(checkpoint, law, pairs):
        moves = rows * scale
        both = landscape.mean(landscape.draws(torch.cat([moves, -moves])).losses)
        found.append(both.reshape(2, -1).mean(0) - here)
    return torch.cat(found).numpy()


def averaged(values: NDArray[np.float64], more: Mapping[str, float] | None = None) -> Reading | Refused:
    """The mean of independent draws with its 95 % interval; or why there is none."""
    if not np.isfinite(values).all():
        return Refused("the loss overflows under these perturbations")
    _, lo, hi = mean_interval(values, CONFIDENCE)
    return Reading(float(values.mean()), lo, hi, "draws", more=more or {})


def small_radius_limit(checkpoint: Checkpoint, variance: float) -> dict[str, float]:
    """{"half_trace": variance / 2 · tr H}, what the rise tends to for small radii; empty without a trace."""
    metric = checkpoint.analysis.metrics.get("trace") if checkpoint.analysis is not None else None
    return {} if metric is None else {"half_trace": variance / 2 * metric.value}


@measure(
    "average_sharpness",
    title="Average sharpness, Gaussian",
    family="sharpness",
    formula="E L(w + d) - L(w), d ~ N(0, rho² I), rho = 0.05",
    source=ANDRIUSHCHENKO,
    invariant=("permutation",),
    cost="21 forward passes",
)
def average_sharpness(checkpoint: Checkpoint, rho: float = 0.05) -> Reading | Refused:
    """S_avg with c = 1: E L(w + d) − L(w) for d ~ N(0, rho² I); rho²/2 · tr H for small rho.

    Source: Andriushchenko et al. 2023, section 2; rho at the lower end of their grid .05 to .4, as weights
    of about .1 are drowned by the rest of it. In law unmoved by permuting neurons, moved by any rescaling.
    Cost: 21 forward passes.
    """
    return averaged(rises(checkpoint, rho), small_radius_limit(checkpoint, rho**2))


@measure(
    "average_sharpness_box",
    title="Average sharpness, uniform in a box",
    family="sharpness",
    formula="E L(w + d) - L(w), d uniform on |d_i| <= rho, rho = 0.1",
    source=ANDRIUSHCHENKO,
    invariant=("permutation",),
    cost="21 forward passes",
)
def average_sharpness_box(checkpoint: Checkpoint, rho: float = 0.1) -> Reading | Refused:
    """The same for d uniform on the box |d_i| ≤ rho; rho²/6 · tr H for small rho.

    Source: as `average_sharpness`, whose box grid begins at .1. Unmoved in law by permuting neurons.
    Cost: 21 forward passes.
    """
    return averaged(rises(checkpoint, rho, law="uniform"), small_radius_limit(checkpoint, rho**2 / 3))


@measure(
    "average_sharpness_adaptive",
    title="Adaptive average sharpness, Gaussian",
    family="sharpness",
    formula="E L(w + d) - L(w), d_i ~ N(0, rho² w_i²), rho = 0.1",
    source=ANDRIUSHCHENKO,
    invariant=("layer rescaling", "neuron rescaling", "permutation"),
    cost="21 forward passes",
)
def average_sharpness_adaptive(checkpoint: Checkpoint, rho: float = 0.1) -> Reading | Refused:
    """S_avg with c = |w|: the noise is relative to each weight; rho²/2 · tr(diag(w²) H) for small rho.

    Source: Andriushchenko et al. 2023, section 2; rho from their grid .05 to .4. A rescaling of layers or neurons
    that keeps the function rescales the noise with it. Cost: 21 forward passes.
    """
    return averaged(rises(checkpoint, rho * checkpoint.theta.abs()))


@measure(
    "average_sharpness_adaptive_box",
    title="Adaptive average sharpness, uniform in a box",
    family="sharpness",
    formula="E L(w + d) - L(w), d_i uniform on |d_i| <= rho |w_i|, rho = 0.2",
    source=ANDRIUSHCHENKO,
    invariant=("layer rescaling", "neuron rescaling", "permutation"),
    cost="21 forward passes",
)
def average_sharpness_adaptive_box(checkpoint: Checkpoint, rho: float = 0.2) -> Reading | Refused:
    """The same for d uniform on |d_i| ≤ rho |w_i|; rho²/6 · tr(diag(w²) H) for small rho.

    Source: as `average_sharpness_adaptive`; rho from the grid .1 to .8. Cost: 21 forward passes.
    """
    return averaged(rises(checkpoint, rho * checkpoint.theta.abs(), law="uniform"))


@measure(
    "average_sharpness_normalized",
    title="Adaptive average sharpness on normalised logits",
    family="sharpness",
    formula="E L'(w + d) - L'(w), d_i ~ N(0, rho² w_i²), rho = 0.1; L' on centred logits of length 1",
    source=ANDRIUSHCHENKO,
    invariant=("layer rescaling", "neuron rescaling", "logit scaling", "permutation"),
    cost="22 forward passes",
)
def average_sharpness_normalized(checkpoint: Checkpoint, rho: float = 0.1) -> Reading | Refused:
    """`average_sharpness_adaptive` of the loss on logits that are centred and divided by their length.

    Source: Andriushchenko et al. 2023, section 2 (logit normalization). Scaling the whole output layer does not
    move it: the confidence bought by larger weights does not count. Cost: 22 forward passes.
    """
    if not checkpoint.landscape.positions:
        return NO_CLASSES
    return averaged(rises(checkpoint, rho * checkpoint.theta.abs(), landscape=checkpoint.normalized))


@measure(
    "noise_stability",
    title="Noise stability",
    family="sharpness",
    formula="E L(w + u) - L(w), u ~ N(0, sigma² I), sigma = 0.01; also 0.001, 0.005, 0.02",
    source="Zhang, Li and Ju (arXiv 2306.08553), measurements of noise stability",
    invariant=("permutation",),
    cost="84 forward passes",
)
def noise_stability(checkpoint: Checkpoint) -> Reading | Refused:
    """F(w) − L(w) of noise stability optimization at sigma = .01, the paper's for CIFAR, and at its other radii.

    ``more`` holds, per radius, the rise and, with an analysis at hand, its ratio to sigma²/2 · tr H: a ratio away
    from 1 says that the fourth order counts at this radius; or, at every radius, that kinks (ReLU) do.
    Cost: 21 forward passes per radius.
    """
    found = {sigma: rises(checkpoint, sigma) for sigma in RADII}
    reading = averaged(found[NSO_SIGMA])
    if isinstance(reading, Refused):
        return reading
    more: dict[str, float] = {}
    for sigma, values in found.items():
        more[f"rise_at_{sigma:g}"] = float(values.mean())
        for half in small_radius_limit(checkpoint, sigma**2).values():
            more[f"ratio_at_{sigma:g}"] = float(values.mean()) / half if half else float("nan")
    return Reading(
        reading.value, reading.lo, reading.hi, "draws", more={k: v for k, v in more.items() if np.isfinite(v)}
    )


def _entries(law: Law, size: int, generator: Generator) -> Tensor:
    if law == "normal":
        return torch.randn(size, generator=generator, dtype=torch.float64)
    return 2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1
