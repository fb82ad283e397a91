"""Products and gradients against differences, in float64 where the model allows it, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import gradient, gradients
from hessdiag.engine.products.methods import METHODS
from hessdiag.engine.products.precision import narrowest, norm

LIMITS = {"repeatability": 1e-4, "symmetry": 1e-2, "finite_difference": 1e-2, "gradient": 1e-2}
"""Above these a measurement is refused. Silent faults begin at 2e-2; healthy models stay below 1e-4, or below 2e-3
in float32 where every example is confident (first 16 images of a ResNet: symmetry 1.7e-3, differences 1.9e-3)."""
STEPS = (1e-8, 1e-7, 1e-9, 1e-5)
"""Relative to ‖θ‖, the likeliest to settle it first: on two ResNets 1e-8 agrees to 8e-6, 1e-6 misses Hv by 61 %
and more; smooth networks agree to 1e-6 at all of them."""
SETTLED = 1e-5  # no further step is tried below: faults begin a thousand times higher
SINGLE_STEPS = (1e-2, 1e-3, 1e-4)  # where the model cannot run in float64
SINGLE_LIMIT = 5e-2
ROUNDED_STEPS = (1e-4, 1e-3, 1e-5, 1e-2)  # where it casts to float32 inside, and no other way
ROUNDED_SETTLED = 1e-3
LEAST_WEIGHT = 1e-2  # weights are this large, or steps of this scale are tried too: a model may sit at 0
NEGLIGIBLE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Curvature below this share of ‖gradient‖ / ‖θ‖ counts as none: it is the rounding of a Hessian that is 0."""


def limit(name: str, precision: str) -> float:
    """The limit of "finite_difference" or "gradient", of differences taken in a precision."""
    return LIMITS[name] if precision == "float64" else SINGLE_LIMIT


@dataclass(frozen=True)
class Differences:
    """How far products and gradients are from differences, relative.

    Attributes:
        product: of the worst tensor.
        gradient_error: of the gradient, along itself.
        worst: that tensor's name.
        precision: dtype the differences were taken in.
    """

    product: float
    gradient_error: float
    worst: str
    precision: str

    @property
    def product_agrees(self) -> bool:
        """Whether products are within their limit."""
        return self.product <= limit("finite_difference", self.precision)

    @property
    def gradient_agrees(self) -> bool:
        """Whether the gradient is within its limit."""
        return self.gradient_error <= limit("gradient", self.precision)


class Checked:
    """The product of one vector, and the same function in float64 to take differences of.

    G and R are no derivative of a gradient: there H = G + R is what differences can check.

    Args:
        operator: whose products are checked, on its trial examples.
        double: the same function in float64 (`in_double`), if there is one.
        row: the vector (P,).
        theta: at which parameters; by default at the checkpoint.
        product: of the operator with the vector there, if known; used where it is the Hessian's.
    """

    def __init__(
        self,
        operator: Curvature,
        double: Functional | None,
        row: Tensor,
        theta: tuple[Tensor, ...] | None = None,
        product: Tensor | None = None,
    ) -> None:
        self.operator, self.row = operator, row
        measured = operator.function if theta is None else operator.function.at(theta)
        self.precision = "float64" if double is not None else str(operator.dtype).removeprefix("torch.")
        self.function = double or operator.function
        if theta is not None:
            self.function = self.function.at(theta)
        piece = operator.function.place(operator.trial)
        if product is None or operator.kind != "hessian":
            with measured.measuring():
                product = METHODS[operator.method](measured, "hessian", piece, row[None])[0]
        self.product = product
        self.piece = self.function.place(operator.trial)
        self.length = norm(row)
        self.least = faint(operator, piece) * self.length

    def gradients_at(self, step: float) -> tuple[Tensor, ...]:
        """The gradient at θ + step · the vector's direction."""
        theta = self.function.shifted(self.row, step / self.length)
        return gradients(self.function.total(theta, self.piece), theta)

    def errors(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> list[float]:
        """Relative differences, tensor by tensor; next to no curvature counts against the whole, or as none."""
        norms = [(norm(a), norm(b), norm(a.double() - b)) for a, b in zip(one, other, strict=True)]
        whole = math.hypot(*(size for _, size, _ in norms))
        errors = []
        for (a, b, off), tensor in zip(norms, self.function.theta, strict=True):
            share = max(0.02 * whole, self.least) * math.sqrt(tensor.numel() / self.function.size)
            errors.append(off / max(a, b, share, 1e-300))
        return errors


def differences(checked: Checked) -> Differences:
    """Product and gradient of up to 16 examples against differences, the best over a ladder of steps."""
    function, piece = checked.function, checked.piece
    grad = gradient(function, piece)
    gradient_norm = norm(grad)
    downhill = (grad / max(gradient_norm, 1e-300)).to(function.dtype)
    del grad
    best = Differences(math.inf, math.inf, "", checked.precision)
    for h, settled in _steps(function, piece):
        if max(best.product, best.gradient_error) <= settled:
            break
        up, down = (checked.gradients_at(s * h) for s in (1, -1))
        central = _over(up, down, 2 * h / checked.length)
        del up, down
        errors = checked.errors(function.split(checked.product), central)
        error, worst = _largest(errors, function.names)
        if error < best.product:
            best = Differences(error, best.gradient_error, worst, checked.precision)
        gradient_error = _gradient_error(function, piece, downhill, h, gradient_norm)
        best = Differences(best.product, min(best.gradient_error, gradient_error), best.worst, checked.precision)
    return best


def _largest(errors: list[float], names: tuple[str, ...]) -> tuple[float, str]:
    worst, name = 0.0, names[0]
    for error, label in zip(errors, names, strict=True):
        if not error <= worst:  # NaN is the worst
            worst, name = error, label
    return worst, name


def _over(up: tuple[Tensor, ...], down: tuple[Tensor, ...], step: float) -> tuple[Tensor, ...]:
    return tuple((above - below).double() / step for above, below in zip(up, down, strict=True))


def faint(operator: Curvature, piece: Any) -> float:
    """Curvature per length of a vector that is rounding, at the size of the gradient and of the weights."""
    theta = math.hypot(*(norm(t.detach()) for t in operator.function.theta))
    scale = max(theta, LEAST_WEIGHT * math.sqrt(operator.size))
    return NEGLIGIBLE[operator.dtype] * norm(gradient(operator.function, piece)) / scale


def _steps(function: Functional, piece: Any) -> Iterator[tuple[float, float]]:
    """Lengths of steps, each with the error at which it is not needed any more.

    The usual ones first; then, where these do not settle it, those for rounding that shows nowhere in the graph
    and for weights next to 0. A fault is off at every step, so that more steps never hide one.
    """
    scale = math.hypot(*(norm(t.detach()) for t in function.theta))
    least = LEAST_WEIGHT * math.sqrt(function.size)
    first: tuple[float, ...]
    if function.dtype != torch.float64:
        first, settled, enough = SINGLE_STEPS, SETTLED, SINGLE_LIMIT
    elif narrowest(function, piece) != torch.float64:
        first, settled, enough = ROUNDED_STEPS, ROUNDED_SETTLED, LIMITS["finite_difference"]
    else:
        first, settled, enough = STEPS, SETTLED, LIMITS["finite_difference"]
    if scale > 0:
        yield from ((step * scale, settled) for step in first)
        yield from ((step * scale, enough) for step in SINGLE_STEPS if step not in first)
    if scale < least:
        yield from ((step * least, enough) for step in first)


def _gradient_error(function: Functional, piece: Any, direction: Tensor, h: float, expected: float) -> float:
    with torch.no_grad():
        up, down = (float(function.total(function.shifted(direction, s), piece)) for s in (h, -h))
    if expected == 0:
        return 0.0
    # a loss of size L is only known to L·eps: below that a gradient cannot be refuted
    noise = 8 * torch.finfo(function.dtype).eps * max(abs(up), abs(down)) / h
    return abs((up - down) / (2 * h) - expected) / (expected + noise)
