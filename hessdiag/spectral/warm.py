"""Starting Lanczos near an answer known before, without trusting it.

The run starts from r + c w: r uniform on the sphere, w a unit vector known before r was drawn. For a unit
eigenvector u the density of u·r is symmetric and falls away from zero (d ≥ 3), so no shift makes a small value
more likely: P(|u·r + c u·w| < δ) ≤ P(|u·r| < δ) (Anderson 1955, in one dimension). Divided by the length of the
start, the certificate therefore holds as before with 1/δ² replaced by ‖r + c w‖²/δ²: a wrong w costs a step or
two, and can hide nothing.

What it is worth: along SGD and gradient descent on the digits (8 checkpoints each, rtol 1e-3) λ_max settles
after 31 instead of 52 and 43 instead of 51 products in all. The certificate, which decides when a run stops,
gains nothing from knowing the answer: 418 against 401 and 447 against 437 products. A warm start improves what a
run cut short by ``max_steps`` knows; it does not make a certified one shorter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator import SymmetricOperator
from hessdiag.spectral.inner import LONG, norms
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.probes import sphere

SHARE = 1.0
"""c: three times as much, or ten, settles no sooner and costs the certificate 5 to 9% more products."""
ENDS = (1, 1)
"""Ritz vectors in w from the top and the bottom; four and two settle λ_max at 49 where these settle it at 31."""
SMALLEST = 3  # on a circle u·r is likeliest at ±1, and the inequality fails


@dataclass(frozen=True)
class Start:
    """Where a run starts, and what that costs its certificate.

    Attributes:
        vector: (d,) not normalised.
        stretch: ‖vector‖² over that of its random part, 1.0 for a random start.
    """

    vector: Tensor
    stretch: float = 1.0


@dataclass(frozen=True)
class Warm:
    """What an earlier run leaves for the next.

    Attributes:
        direction: (d,) unit vector, on the earlier run's device.
        turn: how many runs lie before; names the random part's stream, which must be new to ``direction``.
    """

    direction: Tensor
    turn: int


def ending(krylov: Krylov, turn: int) -> Warm:
    """The directions both ends of a run have found, as a start for the next."""
    k, (top, bottom) = krylov.size, ENDS
    which = sorted({*range(max(k - top, 0), k), *range(min(bottom, k))})
    rows = krylov.ritz_vectors(which)
    if krylov.basis.dtype == torch.float64 or rows.shape[1] <= LONG:
        return Warm(torch.nn.functional.normalize(rows.double().sum(0), dim=0).to(krylov.basis.dtype), turn)
    direction = rows.sum(0)  # any direction will do
    return Warm(direction.div_(float(norms(direction[None])[0])), turn)


def beginning(op: SymmetricOperator, seed: int, warm: Warm | None) -> Start:
    """A random start, or one that leans towards an earlier answer.

    Raises:
        UsageError: the earlier answer is of another size, or its turn is not after a first.
    """
    if warm is None:
        return Start(sphere(op, seed, "extremes", 0))
    if warm.direction.shape != (op.size,) or warm.turn < 1:
        msg = f"warm start of shape {tuple(warm.direction.shape)}, turn {warm.turn}: ({op.size},) and 1 or more"
        raise UsageError(msg)
    random = sphere(op, seed, "extremes", warm.turn)
    if op.size < SMALLEST:
        return Start(random)
    vector = random.double() + SHARE * warm.direction.to(op.device, torch.float64)
    return Start(vector, float(vector @ vector))
