"""PAC-Bayes complexities of flatness and sharpness.

Equation numbers are those of Jiang et al. 2020 as enumerated in the public code of Dziugaite et al. 2020; m is the
number of training examples, ω of parameters, w₀ the initial weights. A complexity C is reported as √(C/m), with C
itself in ``more``. They are complexities, not certificates: σ is found on the training data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.tolerated import EPS, Radius, noise_radius, worst_radius
from hessdiag.gap.registry import Reading, measure

JIANG = "Jiang et al. 2020 (arXiv 1912.02178), equation"
NO_START = Refused("the initial weights are not given: distances from them are not known")
NOISE_COST = "about 200 forward passes, shared by the measures with this sigma"
WORST_COST = "about 100 gradients, shared by the measures with this alpha"
BETWEEN = 33  # points of sigma's interval at which a complexity that need not be monotone is looked at


@measure(
    "pac_bayes_init",
    title="PAC-Bayes, distance from the start",
    family="pac-bayes",
    formula="sqrt(C/m), C = |w - w0|²/(4 sigma²) + log(m/sigma) + 10",
    source=f"{JIANG} 48",
    invariant=("permutation",),
    cost=NOISE_COST,
)
def pac_bayes_init(checkpoint: Checkpoint) -> Reading | Refused:
    """(48): σ tolerates a mean drop of accuracy of 0.1 under N(0, σ² I). Cost: σ's, about 200 forward passes."""
    distance = distance_squared(checkpoint)
    return distance if isinstance(distance, Refused) else _flat(checkpoint, distance)


@measure(
    "pac_bayes_origin",
    title="PAC-Bayes, distance from the origin",
    family="pac-bayes",
    formula="sqrt(C/m), C = |w|²/(4 sigma²) + log(m/sigma) + 10",
    source=f"{JIANG} 49",
    invariant=("permutation",),
    cost=NOISE_COST,
)
def pac_bayes_origin(checkpoint: Checkpoint) -> Reading | Refused:
    """(49): as `pac_bayes_init` with |w| for |w − w₀|. Cost: σ's."""
    return _flat(checkpoint, square(checkpoint.theta))


@measure(
    "pac_bayes_flatness",
    title="PAC-Bayes flatness",
    family="pac-bayes",
    formula="sqrt(1/(m sigma²))",
    source=f"{JIANG} 53",
    invariant=("permutation",),
    cost=NOISE_COST,
)
def pac_bayes_flatness(checkpoint: Checkpoint) -> Reading | Refused:
    """(53): 1/σ². Cost: σ's."""
    return _over_radius(checkpoint, noise_radius(checkpoint, magnitude=False), lambda s: 1 / s**2)


@measure(
    "pac_bayes_sharpness_init",
    title="PAC-Bayes sharpness, distance from the start",
    family="pac-bayes",
    formula="sqrt(C/m), C = |w - w0|² log(2 omega)/(4 alpha²) + log(m/sigma) + 10",
    source=f"{JIANG} 51",
    invariant=("permutation",),
    cost=f"{WORST_COST}; {NOISE_COST}",
)
def pac_bayes_sharpness_init(checkpoint: Checkpoint) -> Reading | Refused:
    """(51): α is the smallest box |u_i| ≤ α with a point found where accuracy is lower by 0.1.

    Cost: α's and σ's.
    """
    distance = distance_squared(checkpoint)
    return distance if isinstance(distance, Refused) else _sharp(checkpoint, distance)


@measure(
    "pac_bayes_sharpness_origin",
    title="PAC-Bayes sharpness, distance from the origin",
    family="pac-bayes",
    formula="sqrt(C/m), C = |w|² log(2 omega)/(4 alpha²) + log(m/sigma) + 10",
    source=f"{JIANG} 52",
    invariant=("permutation",),
    cost=f"{WORST_COST}; {NOISE_COST}",
)
def pac_bayes_sharpness_origin(checkpoint: Checkpoint) -> Reading | Refused:
    """(52): as `pac_bayes_sharpness_init` with |w| for |w − w₀|. Cost: α's and σ's."""
    return _sharp(checkpoint, square(checkpoint.theta))


@measure(
    "pac_bayes_sharpness",
    title="PAC-Bayes worst-case flatness",
    family="pac-bayes",
    formula="sqrt(1/(m alpha²))",
    source=f"{JIANG} 54",
    invariant=("permutation",),
    cost=WORST_COST,
)
def pac_bayes_sharpness(checkpoint: Checkpoint) -> Reading | Refused:
    """(54): 1/α². Cost: α's, about 100 gradients."""
    return _over_alpha(checkpoint, worst_radius(checkpoint, magnitude=False))


@measure(
    "pac_bayes_magnitude_init",
    title="Magnitude-aware PAC-Bayes, distance from the start",
    family="pac-bayes",
    formula="sqrt(C/m), C = 1/4 sum log((e² + (s²+1)|w - w0|²/omega)/(e² + s² (w_i - w0_i)²)) + log(m/s) + 10",
    source=f"{JIANG} 56",
    invariant=("permutation",),
    cost=NOISE_COST,
)
def pac_bayes_magnitude_init(checkpoint: Checkpoint) -> Reading | Refused:
    """(56): s = σ' tolerates a drop of 0.1 under N(0, σ'² w_i² + e²), e = .001. Cost: σ's."""
    distance = distance_squared(checkpoint)
    return distance if isinstance(distance, Refused) else _magnitude(checkpoint, distance)


@measure(
    "pac_bayes_magnitude_origin",
    title="Magnitude-aware PAC-Bayes, distance from the origin",
    family="pac-bayes",
    formula="sqrt(C/m), C = 1/4 sum log((e² + (s²+1)|w|²/omega)/(e² + s² (w_i - w0_i)²)) + log(m/s) + 10",
    source=f"{JIANG} 57",
    invariant=("permutation",),
    cost=NOISE_COST,
)
def pac_bayes_magnitude_origin(checkpoint: Checkpoint) -> Reading | Refused:
    """(57): |w|² in the numerator, the distances from w₀ still below. Cost: σ's."""
    return _magnitude(checkpoint, square(checkpoint.theta))


@measure(
    "pac_bayes_magnitude_flatness",
    title="Magnitude-aware PAC-Bayes flatness",
    family="pac-bayes",
    formula="sqrt(1/(m s²)), noise N(0, s² w_i² + 0.001²)",
    source=f"{JIANG} 61",
    invariant=("permutation",),
    cost=NOISE_COST,
)
def pac_bayes_magnitude_flatness(checkpoint: Checkpoint) -> Reading | Refused:
    """(61): 1/σ'². Without the .001 a rescaling of layers would not move it; small weights feel it. Cost: σ's."""
    return _over_radius(checkpoint, noise_radius(checkpoint, magnitude=True), lambda s: 1 / s**2)


@measure(
    "pac_bayes_magnitude_sharpness",
    title="Magnitude-aware PAC-Bayes worst-case flatness",
    family="pac-bayes",
    formula="sqrt(1/(m a²)), box |u_i| <= a |w_i| + 0.001",
    source=f"{JIANG} 62; the best of the more than 40 measures there",
    invariant=("permutation",),
    cost=WORST_COST,
)
def pac_bayes_magnitude_sharpness(checkpoint: Checkpoint) -> Reading | Refused:
    """(62): 1/α'². Cost: α's."""
    return _over_alpha(checkpoint, worst_radius(checkpoint, magnitude=True))


def square(vector: Tensor) -> float:
    """|v|², summed in float64."""
    return float(vector.double().square().sum())


def distance_squared(checkpoint: Checkpoint) -> float | Refused:
    """|w − w₀|²."""
    return NO_START if checkpoint.start is None else square(checkpoint.theta.double() - checkpoint.start.double())


def _rest(checkpoint: Checkpoint, sigma: float) -> float:
    return math.log(checkpoint.training_size / sigma) + 10


def _flat(checkpoint: Checkpoint, square: float) -> Reading | Refused:
    return _over_radius(
        checkpoint,
        noise_radius(checkpoint, magnitude=False),
        lambda sigma: square / (4 * sigma**2) + _rest(checkpoint, sigma),
    )


def _magnitude(checkpoint: Checkpoint, square: float) -> Reading | Refused:
    start = checkpoint.start
    if start is None:
        return NO_START
    moved = (checkpoint.theta.double() - start.double()).square()

    def complexity(s: float) -> float:
        above = EPS**2 + (s**2 + 1) * square / checkpoint.size
        below = EPS**2 + s**2 * moved
        return float((math.log(above) - below.log()).sum()) / 4 + _rest(checkpoint, s)

    return _over_radius(checkpoint, noise_radius(checkpoint, magnitude=True), complexity)


def _sharp(checkpoint: Checkpoint, square: float) -> Reading | Refused:
    alpha, sigma = worst_radius(checkpoint, magnitude=False), noise_radius(checkpoint, magnitude=False)
    if isinstance(alpha, Refused):
        return alpha
    if isinstance(sigma, Refused):
        return sigma
    first = square * math.log(2 * checkpoint.size) / (4 * alpha.value**2)
    value, low = (_reported(checkpoint, first + _rest(checkpoint, s)) for s in (sigma.value, sigma.hi))
    more = {"complexity": first + _rest(checkpoint, sigma.value), "alpha": alpha.value, "sigma": sigma.value}
    return Reading(value, low, math.inf, "search", "alpha found by ascent; the true one is no larger", more)


def _over_alpha(checkpoint: Checkpoint, alpha: Radius | Refused) -> Reading | Refused:
    if isinstance(alpha, Refused):
        return alpha
    value = _reported(checkpoint, 1 / alpha.value**2)
    more = {"complexity": 1 / alpha.value**2, "alpha": alpha.value}
    return Reading(value, value, math.inf, "search", "alpha found by ascent; the true one is no larger", more)


def _over_radius(
    checkpoint: Checkpoint, sigma: Radius | Refused, complexity: Callable[[float], float]
) -> Reading | Refused:
    """√(C(σ)/m) with the range of C over σ's interval."""
    if isinstance(sigma, Refused):
        return sigma
    if sigma.lo <= 0:
        return Refused(
            f"accuracy falls by 0.1 or more, within its error, at any noise down to {sigma.hi:.2g}: no lower end"
        )
    inside = np.geomspace(sigma.lo, sigma.hi, BETWEEN)
    ends = [_reported(checkpoint, complexity(float(s))) for s in (*inside, sigma.value)]
    more = {"complexity": complexity(sigma.value), "sigma": sigma.value}
    return Reading(ends[-1], min(ends), max(ends), "draws", more=more)


def _reported(checkpoint: Checkpoint, complexity: float) -> float:
    # (57) can be negative: its order is kept
    return math.copysign(math.sqrt(abs(complexity) / checkpoint.training_size), complexity)
