"""Searches for the worst point near a checkpoint: auto-PGD in a ball, for many batches at once, and L-BFGS-B."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize
from torch import Tensor

from hessdiag.engine.landscape.landscape import Landscape

Norm = Literal["l2", "linf"]
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
STEPS = 20  # Andriushchenko et al. 2023, appendix
MOMENTUM = 0.75
IMPROVING = 0.75  # share of steps that must improve between checkpoints, or the step is halved


def checkpoints(steps: int) -> tuple[int, ...]:
    """After which steps the step size is looked at again (Croce and Hein 2020, arXiv 2003.01690, section 3.2)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return tuple(dict.fromkeys(math.ceil(share * steps) for share in shares[1:] if share <= 1))


def inside(points: Tensor, radius: float, norm: Norm) -> Tensor:
    """Rows of ``points`` (b, P) projected onto the ball |e| ≤ radius around 0."""
    if norm == "linf":
        return points.clamp(-radius, radius)
    lengths = points.norm(dim=1, keepdim=True)
    projected: Tensor = points * (radius / lengths.clamp(min=radius))
    return projected


def steepest(gradients: Tensor, norm: Norm) -> Tensor:
    """Direction of unit length in which a function of these gradients (b, P) rises most; 0 for gradient 0."""
    if norm == "linf":
        return gradients.sign()
    unit: Tensor = torch.nn.functional.normalize(gradients, dim=1, eps=torch.finfo(gradients.dtype).tiny)
    return unit


@dataclass
class _State:
    point: Tensor  # (b, P)
    before: Tensor
    best: Tensor  # (b, P)
    best_value: Tensor  # (b,)
    best_grad: Tensor  # (b, P)
    step: Tensor  # (b, 1)
    improved: Tensor  # (b,), steps since the last checkpoint
    halved: Tensor  # (b,) bool, at the last checkpoint
    value_then: Tensor  # (b,), best at the last checkpoint


def auto_pgd(
    objective: Objective,
    rows: int,
    size: int,
    radius: float,
    norm: Norm,
    *,
    steps: int = STEPS,
    enough: Callable[[], bool] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Largest values found of ``rows`` functions in the ball |e| ≤ radius, each by its own ascent from 0, (rows,).

    Projected gradient ascent with momentum .75 and a step that starts at 2 · radius and is halved where fewer than
    75 % of the steps improved, or nothing did; it then goes on from the best point (Croce and Hein 2020). It
    starts at 0, so that nothing is drawn. A lower bound of the true maxima.

    Args:
        objective: of points (rows, P); gives values (rows,) and gradients (rows, P), float64.
        rows: number of functions.
        size: P.
        radius: of the ball.
        norm: of the ball.
        steps: of ascent; costs steps + 1 calls.
        enough: asked after every step whether to stop.
        device: of the points, values and gradients; nothing is copied from it.
    """
    zero = torch.zeros(rows, size, dtype=torch.float64, device=device)
    value, grad = objective(zero)
    none = torch.zeros(rows, dtype=torch.bool, device=device)
    step = torch.full((rows, 1), 2 * radius, dtype=torch.float64, device=device)
    s = _State(zero, zero, zero, value, grad, step, none.double(), none, value)
    looks, last = checkpoints(steps), 0
    for number in range(1, steps + 1):
        ahead = inside(s.point + s.step * steepest(grad, norm), radius, norm)
        if number > 1:
            ahead = inside(
                s.point + MOMENTUM * (ahead - s.point) + (1 - MOMENTUM) * (s.point - s.before), radius, norm
            )
        s.before, s.point = s.point, ahead
        before, (value, grad) = value, objective(ahead)
        s.improved += (value > before).double()
        better = value > s.best_value
        s.best_value = torch.where(better, value, s.best_value)
        s.best = torch.where(better[:, None], s.point, s.best)
        s.best_grad = torch.where(better[:, None], grad, s.best_grad)
        if enough is not None and enough():
            break
        if number in looks:
            value, grad = _look(s, number - last, value, grad)
            last = number
    return s.best_value


def _look(s: _State, since: int, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Halve the steps that did not do well and send those rows back to their best points."""
    halve = (s.improved < IMPROVING * since) | (~s.halved & (s.best_value <= s.value_then))
    s.step = torch.where(halve[:, None], s.step / 2, s.step)
    s.point = torch.where(halve[:, None], s.best, s.point)
    s.before = torch.where(halve[:, None], s.best, s.before)
    s.halved, s.value_then, s.improved = halve, s.best_value, torch.zeros_like(s.improved)
    return torch.where(halve, s.best_value, value), torch.where(halve[:, None], s.best_grad, grad)


def largest_in_box(landscape: Landscape, half: Tensor, iterations: int) -> float:
    """Largest mean loss found in the box |z_i| ≤ half_i around θ by L-BFGS-B; the true one may be larger.

    SciPy works on the host: a point and a gradient travel per evaluation.

    Cost: about one gradient and a half per iteration.
    """
    best = -math.inf

    def descend(z: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal best
        at = landscape.loss_and_gradient(torch.from_numpy(z))
        if not math.isfinite(at.loss):
            return math.inf, np.zeros_like(z)
        best = max(best, at.loss)
        return -at.loss, -at.gradient.cpu().numpy()

    edge = half.double().cpu().numpy()
    # tolerances of 0: as many iterations as asked, however flat it is
    options = {"maxiter": iterations, "ftol": 0.0, "gtol": 0.0}
    minimize(
        descend, np.zeros_like(edge), jac=True, method="L-BFGS-B", bounds=Bounds(-edge, edge), options=options
    )
    return best
