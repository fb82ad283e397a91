"""How far the weights may move before accuracy falls by 0.1: on average over noise, and at the worst point found.

Bisection as in Jiang et al. 2020 (arXiv 1912.02178, appendix on sharpness measures): [0, 2], at most 15 halvings,
10 draws. σ is a standard deviation here; code in public use passes σ² where the generator wants σ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.ascent import STEPS, auto_pgd
from hessdiag.gap.measures.perturbations import CONFIDENCE, directions
from hessdiag.results.interval import mean_interval

DROP = 0.1  # of accuracy
DRAWS = 10
TOP = 2.0
HALVINGS = 15
DOUBLINGS = 8  # beyond 512 times its size no weight is left
CLOSE = 0.02  # relative width at which bisection ends
CLOSE_ENOUGH = 0.05  # the same for a search, whose own error is larger
RAY = 8  # fractions of a shift looked at together
SHORTEST = 1e-4
EPS = 1e-3  # keeps noise in zero weights: Jiang et al., equations 56 to 62
NO_ACCURACY = Refused("there are no integer classes: these measures ask how far accuracy falls")


@dataclass(frozen=True)
class Radius:
    """A tolerated size of perturbation.

    Attributes:
        value: the radius; of a worst-case search the smallest at which the drop was found, so an upper bound.
        lo: lower end of its 95 % interval, rounding of the bisection included; of a search 0.
        hi: upper end.
    """

    value: float
    lo: float
    hi: float


def noise_radius(checkpoint: Checkpoint, *, magnitude: bool) -> Radius | Refused:
    """Largest σ with mean accuracy at w + u of at least accuracy(w) − 0.1, u ~ N(0, σ² I).

    The 10 draws are scaled, not drawn anew, for every σ; in the last 2 % the mean is interpolated.
    The interval holds every σ at which the drop lies in the 95 % interval of the mean over draws: it covers if
    accuracy falls with σ. About 17 · 10 forward passes.

    Args:
        checkpoint: at w.
        magnitude: u_i ~ N(0, σ² w_i² + 0.001²) instead.

    Returns:
        The radius; or why there is none.
    """
    return checkpoint.once(f"noise radius {magnitude}", lambda: _noise_radius(checkpoint, magnitude))


def worst_radius(checkpoint: Checkpoint, *, magnitude: bool) -> Radius | Refused:
    """Smallest α for which a point with |u_i| ≤ α and accuracy below accuracy(w) − 0.1 was found.

    By auto-PGD on the loss, 20 steps, accuracy looked at after each; every point found is moved back towards w as
    far as it serves. A better search could only find a smaller α. About 100 gradients.

    Args:
        checkpoint: at w.
        magnitude: the box is |u_i| ≤ α |w_i| + 0.001 instead.

    Returns:
        The radius; or why there is none.
    """
    return checkpoint.once(f"worst radius {magnitude}", lambda: _worst_radius(checkpoint, magnitude))


def _noise_radius(checkpoint: Checkpoint, magnitude: bool) -> Radius | Refused:
    here = checkpoint.accuracy
    if here is None:
        return NO_ACCURACY

    @cache
    def ends(sigma: float) -> tuple[float, float, float]:
        hits = accuracies(checkpoint, sigma, DRAWS, magnitude=magnitude)
        _, lo, hi = mean_interval(hits, CONFIDENCE)
        return lo, float(hits.mean()), hi

    brackets = [bisect(lambda s, end=end: ends(s)[end] >= here - DROP) for end in range(3)]  # type: ignore[misc]
    if any(bracket is None for bracket in brackets):
        return Refused(f"accuracy ({here:.3g} here) does not fall by {DROP} however large the noise")
    lower, middle, upper = (bracket or (0.0, 0.0) for bracket in brackets)
    before, after = (ends(s)[1] if s else here for s in middle)
    share = (before - here + DROP) / (before - after) if before > after else 1.0
    value = middle[0] + share * (middle[1] - middle[0])
    return Radius(value, min(lower[0], value), max(upper[1], value))


def _worst_radius(checkpoint: Checkpoint, magnitude: bool) -> Radius | Refused:
    here = checkpoint.accuracy
    if here is None:
        return NO_ACCURACY
    target, low, high = here - DROP, 0.0, 0.0
    for doubling in range(DOUBLINGS):
        alpha = TOP * 2**doubling
        point = violating(checkpoint, alpha, target, magnitude=magnitude)
        if point is not None:
            high = alpha * shortest(checkpoint, point, target, low / alpha)
            break
        low = alpha
    if not high:
        return Refused(f"no point was found at which accuracy ({here:.3g} here) is lower by {DROP}")
    for _ in range(HALVINGS):
        if high - low <= CLOSE_ENOUGH * high:
            break
        # a point found is soon near the best one, so most of the way down would be tried in vain
        alpha = max((low + high) / 2, 0.75 * high)
        point = violating(checkpoint, alpha, target, magnitude=magnitude)
        if point is None:
            low = alpha
        else:
            high = alpha * shortest(checkpoint, point, target, low / alpha)
    return Radius(high, 0.0, high)


def accuracies(checkpoint: Checkpoint, sigma: float, draws: int, *, magnitude: bool) -> NDArray[np.float64]:
    """Accuracy at w + u for each draw of u, (draws,); as many forward passes."""
    scale: Tensor | float = sigma
    if magnitude:
        scale = (checkpoint.theta.double().square() * sigma**2 + EPS**2).sqrt().to(checkpoint.theta.dtype)
    found = []
    for rows in directions(checkpoint, "normal", draws):
        hits = checkpoint.landscape.draws(rows * scale).accuracy
        if hits is not None:
            found.append(hits)
    return torch.cat(found).numpy()


def violating(checkpoint: Checkpoint, alpha: float, target: float, *, magnitude: bool) -> Tensor | None:
    """A shift (P,) in the box of α with accuracy below ``target``, the first on an ascent of the loss; or None."""
    theta = checkpoint.theta.double()
    half = alpha * theta.abs() + EPS if magnitude else torch.full_like(theta, alpha)
    found: list[Tensor] = []

    def objective(points: Tensor) -> tuple[Tensor, Tensor]:
        shift = points[0] * half
        at = checkpoint.landscape.loss_and_gradient(shift)
        if at.accuracy is not None and at.accuracy < target:
            found.append(shift)
        loss = torch.full_like(half[:1], at.loss).nan_to_num(-math.inf, -math.inf)
        return loss, (at.gradient * half).nan_to_num(0.0, 0.0, 0.0)[None]

    def enough() -> bool:
        return bool(found)

    auto_pgd(objective, 1, checkpoint.size, 1.0, "linf", steps=STEPS, enough=enough, device=half.device)
    return found[0] if found else None


def shortest(checkpoint: Checkpoint, shift: Tensor, target: float, least: float) -> float:
    """Smallest fraction of ``shift`` tried, from ``least`` to 1, at which accuracy is below ``target``.

    A fraction t of a shift in the box of α lies in the box of tα, so this needs no gradients.

    Cost: 16 forward passes.
    """
    best = 1.0
    for space in (np.geomspace, np.linspace):
        fractions = space(max(least, SHORTEST), best, RAY + 1)[:-1]
        rows = torch.from_numpy(fractions).to(shift)[:, None] * shift
        accuracy = checkpoint.landscape.draws(rows).accuracy
        below = [] if accuracy is None else torch.nonzero(accuracy < target)[:, 0].tolist()
        if below:
            best = float(fractions[below[0]])
        if below and below[0]:
            least = float(fractions[below[0] - 1])
        elif not below:
            least = float(fractions[-1])
    return best


def bisect(tolerated: Callable[[float], bool]) -> tuple[float, float] | None:
    """(largest radius known to be tolerated, smallest known not to be), 2 % apart; None if all are tolerated.

    From [0, 2], doubled where 2 is tolerated; at most 15 halvings, more only while nothing is tolerated.
    """
    low, high = 0.0, TOP
    for _ in range(DOUBLINGS):
        if not tolerated(high):
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(HALVINGS):
        if high - low <= CLOSE * high:
            break
        middle = (low + high) / 2
        low, high = (middle, high) if tolerated(middle) else (low, middle)
    return low, high
