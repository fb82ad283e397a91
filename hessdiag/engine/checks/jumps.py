"""Checkpoints exactly on a kink: ReLU of exact zeros, as in residual networks that begin with blocks of zeros.

There the gradient jumps, differences of it do not converge, and the product is that of the piece which torch's
derivative takes. That is told apart from a wrong derivative by two things. A function that is smooth at the
checkpoint has one-sided differences that agree: then a product that misses them is wrong. And a wrong derivative
is wrong at other weights too: so product and differences are compared again a little away, off the kink.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessdiag.engine.checks.differences import LEAST_WEIGHT, LIMITS, Checked, Differences, differences
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import gradient
from hessdiag.engine.products.precision import narrowest

MOVE = 1e-3
"""Of a tensor's typical weight. The differences' steps are a million times shorter, so that none crosses one of
the many kinks that were left together."""
APART = (1e-7, 1e-9)  # steps at the checkpoint, relative to ‖θ‖
COARSE = (1e-2, 1e-3)  # the same where the function is rounded to single precision somewhere
SMALL = 1e-2  # of all weights' typical size: a tensor of smaller ones moves by that


def beside_a_kink(
    operator: Curvature, double: Functional | None, row: Tensor, found: Differences
) -> Differences | None:
    """The comparison with differences, a little away from the checkpoint, if it lies exactly on a kink.

    Costs a product and up to 20 gradients of 16 examples; only where the comparison at the checkpoint failed.

    Args:
        operator: whose products missed differences.
        double: the same function in float64, if there is one.
        row: the vector (P,) they missed them with.
        found: by how much.

    Returns:
        None if there is no kink that explains it.
    """
    if not _jumps(Checked(operator, double, row), found):
        return None
    beside = differences(Checked(operator, double, row, moved(operator)))
    return beside if beside.product_agrees and beside.gradient_agrees else None


def _jumps(here: Checked, found: Differences) -> bool:
    """Whether every tensor in which the product misses has a gradient that jumps or bends, and so has the loss."""
    function, names = here.function, here.function.names
    weights = math.hypot(*(float(t.detach().double().norm()) for t in function.theta))
    scale = max(weights, LEAST_WEIGHT * math.sqrt(function.size))
    fine = function.dtype == narrowest(function, here.piece) == torch.float64
    middle = gradient(function, here.piece)
    downhill = middle / max(float(middle.double().norm()), 1e-300)
    unit, product = here.row.to(function.dtype) / here.length, function.split(here.product)
    missing, bending, through = set(names), set[str](), set(names)
    before: tuple[Tensor, ...] | None = None
    for h in (step * scale for step in (APART if fine else COARSE)):
        up, down = (gradient(function, here.piece, function.shifted(unit, s * h)) for s in (1, -1))
        right, left = (
            function.split((one.double() - middle) * here.length / (s * h)) for s, one in ((1, up), (-1, down))
        )
        central = tuple((a + b) / 2 for a, b in zip(right, left, strict=True))
        missing &= _above(here.errors(product, central), names)
        bending |= _above(here.errors(right, left), names)
        bending |= set() if before is None else _above(here.errors(before, right), names)
        # a gradient that is another at this one point only is wrong there: the function has no kink
        through &= _above(here.errors(right, tuple(-piece for piece in left)), names)
        before = right
    if not found.gradient_agrees:
        up, down = (gradient(function, here.piece, function.shifted(downhill, s * h)) for s in (1, -1))
        if not _above(here.errors(function.split(up), function.split(down)), names):
            return False
    elif not missing:
        return False
    return missing <= bending & through


def _above(errors: list[float], names: tuple[str, ...]) -> set[str]:
    return {name for error, name in zip(errors, names, strict=True) if not error <= LIMITS["finite_difference"]}


def moved(operator: Curvature) -> tuple[Tensor, ...]:
    """The parameters, each moved at random by a thousandth of its tensor's typical size."""
    function = operator.function
    generator = torch.Generator().manual_seed(20_261_126)
    norms = [float(t.detach().double().norm()) for t in function.theta]
    typical = max(math.hypot(*norms) / math.sqrt(function.size), LEAST_WEIGHT * SMALL)
    moved = []
    for tensor, norm in zip(function.theta, norms, strict=True):
        size = MOVE * max(norm / math.sqrt(tensor.numel()), (typical if norm == 0 else SMALL * typical))
        draw = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        moved.append(torch.add(tensor.detach(), draw, alpha=size).requires_grad_())
    return tuple(moved)
