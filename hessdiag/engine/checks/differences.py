"""Products and gradients against differences, in float64 where the model allows it, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.checks.shifts import shifted
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import each_gradient, gradient
from hessdiag.engine.products.methods import METHODS
from hessdiag.engine.products.precision import narrowest
from hessdiag.engine.products.windows import WINDOW, distance, norm, together, windows

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
PARTS = 4  # of a long gradient, each of two more gradients of 16 examples, and a fourth of the memory
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
        # a long θ in float64 is held once
        self.in_place = double not in (None, operator.function) and theta is None and operator.size > WINDOW
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

    def missed(self, step: float) -> list[float]:
        """By how much the product misses the central difference of the gradient: `errors`.

        Of the two gradients one is held, of a long vector in parts, and the other comes a tensor at a time.
        """
        function, product = self.function, self.function.split(self.product)
        norms = [(0.0, 0.0, 0.0)] * len(product)
        up: dict[int, Tensor] = {}

        def look(index: int, down: Tensor) -> None:
            found = []
            for one, above, below in windows(product[index], up.pop(index), down):
                central = (above - below).double().div_(2 * step / self.length)
                found.append((norm(one), norm(central), distance(one, central)))
            a, b, off = (together(parts) for parts in zip(*found, strict=True))
            norms[index] = a, b, off

        for part in self._parts():
            for sign, take in ((1, up.__setitem__), (-1, look)):
                with self.at(self.row, sign * step / self.length) as theta:
                    each_gradient(function.total(theta, self.piece), theta, take, part)
        return self._relative(norms)

    def _parts(self) -> list[list[int]]:
        """Tensors whose gradients are held together: all, or `PARTS` parts of about one size."""
        sizes = [tensor.numel() for tensor in self.function.theta]
        parts: list[list[int]] = [[]]
        for index, size in enumerate(sizes):
            if self.in_place and parts[-1] and sum(sizes[i] for i in parts[-1]) + size > sum(sizes) / PARTS:
                parts.append([])
            parts[-1].append(index)
        return parts

    def at(self, direction: Tensor, step: float) -> AbstractContextManager[tuple[Tensor, ...]]:
        """θ + step · direction."""
        return shifted(self.function, direction, step, in_place=self.in_place)

    def errors(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> list[float]:
        """Relative differences, tensor by tensor; next to no curvature counts against the whole, or as none."""
        return self._relative([(norm(a), norm(b), distance(a, b)) for a, b in zip(one, other, strict=True)])

    def _relative(self, norms: list[tuple[float, float, float]]) -> list[float]:
        whole = math.hypot(*(size for _, size, _ in norms))
        errors = []
        for (a, b, off), tensor in zip(norms, self.function.theta, strict=True):
            share = max(0.02 * whole, self.least) * math.sqrt(tensor.numel() / self.function.size)
            errors.append(off / max(a, b, share, 1e-300))
        return errors


def differences(checked: Checked) -> Differences:
    """Product and gradient of up to 16 examples against differences, the best over a ladder of steps."""
    function, piece = checked.function, checked.piece
    best = Differences(math.inf, math.inf, "", checked.precision)
    downhill: Tensor | None = None
    for h, settled in _steps(function, piece):
        if max(best.product, best.gradient_error) <= settled:
            break
        error, worst = _largest(checked.missed(h), function.names)
        if error < best.product:
            best = Differences(error, best.gradient_error, worst, checked.precision)
        if downhill is None:
            downhill, length = _downhill(function, piece)
        gradient_error = _gradient_error(checked, downhill, h, length)
        downhill = downhill if function.size <= WINDOW else None  # a long one is rather computed again than held
        best = Differences(best.product, min(best.gradient_error, gradient_error), best.worst, checked.precision)
    return best


def _largest(errors: list[float], names: tuple[str, ...]) -> tuple[float, str]:
    worst, name = 0.0, names[0]
    for error, label in zip(errors, names, strict=True):
        if not error <= worst:  # NaN is the worst
            worst, name = error, label
    return worst, name


def _downhill(function: Functional, piece: Any) -> tuple[Tensor, float]:
    """The direction of the gradient, and its length."""
    if function.size <= WINDOW:
        grad = gradient(function, piece)
        length = norm(grad)
        return grad.div_(max(length, 1e-300)), length
    direction = torch.empty(function.size, device=function.device)  # any direction about downhill will do
    pieces, norms = function.split(direction), dict[int, float]()

    def look(index: int, found: Tensor) -> None:
        norms[index] = norm(found)
        pieces[index].copy_(found)

    each_gradient(function.total(function.theta, piece), function.theta, look)
    length = together(norms.values())
    return direction.div_(max(length, 1e-300)), length


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


def _gradient_error(checked: Checked, direction: Tensor, h: float, expected: float) -> float:
    losses = []
    for step in (h, -h):
        with torch.no_grad(), checked.at(direction, step) as theta:
            losses.append(float(checked.function.total(theta, checked.piece)))
    if expected == 0:
        return 0.0
    up, down = losses
    # a loss of size L is only known to L·eps: below that a gradient cannot be refuted
    noise = 8 * torch.finfo(checked.function.dtype).eps * max(abs(up), abs(down)) / h
    return abs((up - down) / (2 * h) - expected) / (expected + noise)
