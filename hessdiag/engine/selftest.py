"""Can the products be believed? Four numbers, taken before every measurement.

Symmetry and finite differences together caught all eight silent faults of autograd that were tried, neither
did alone. Differences are taken in float64 with steps small enough not to cross ReLU kinks, tensor by tensor,
so that a fault in a small tensor is not drowned by the others and can be named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.curvature import Curvature
from hessdiag.engine.functional import Functional
from hessdiag.engine.planner import AGREEMENT, Plan, trial_vectors
from hessdiag.engine.precision import in_double, narrowest
from hessdiag.engine.rounding import rounding_floor
from hessdiag.engine.slopes import gradient, slopes
from hessdiag.engine.suspects import half_precision, suspects
from hessdiag.engine.ways import WAYS
from hessdiag.results import SelfTest

LIMITS = {"repeatability": 1e-4, "symmetry": 1e-2, "finite_difference": 1e-2, "slope": 1e-2}
"""Above these a measurement is refused. Silent faults begin at 2e-2; healthy models stay below 1e-4, or below 2e-3
in float32 where every example is confident (first 16 images of a ResNet: symmetry 1.7e-3, differences 1.9e-3)."""
STEPS = (1e-5, 1e-7, 1e-9)  # relative to ‖θ‖; on a ResNet 1e-6 missed Hv by 61 %, 1e-9 agreed to 1e-7
SETTLED = 1e-5  # no further step is tried below: faults begin a thousand times higher
SINGLE_STEPS = (1e-2, 1e-3, 1e-4)  # where the model cannot run in float64
SINGLE_LIMIT = 5e-2
ROUNDED_STEPS = (1e-4, 1e-3, 1e-5, 1e-2)  # where it runs in float64 and casts to float32 inside
ROUNDED_SETTLED = 1e-3
LEAST_WEIGHT = 1e-2  # weights are this large, or steps of this scale are tried too: a model may sit at 0
NEGLIGIBLE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Curvature below this share of ‖gradient‖ / ‖θ‖ counts as none: it is the rounding of a Hessian that is 0."""


@dataclass(frozen=True)
class Fault:
    """A self-test number above its limit, with the likely cause and the way out."""

    name: str
    text: str


def self_test(operator: Curvature, plan: Plan) -> tuple[SelfTest, tuple[Fault, ...]]:
    """Measure the four numbers on up to 16 examples, and set ``operator.floor``.

    Cost: about 7 products and 6 to 14 gradients of 16 examples.

    Returns:
        The numbers, and the faults they prove; empty if the products can be believed.
    """
    function = operator.function
    piece = operator.function.place(operator.trial)
    u, v = trial_vectors(operator, 2)
    way = WAYS[operator.way]

    def product(row: Tensor) -> Tensor:
        return way(function, operator.kind, piece, row[None])[0]

    with function.measuring():
        dtype = narrowest(function, piece)
        hu, hv = product(u), product(v)
        scale = max(_norm(hv), faint(operator, piece) * _norm(v), 1e-300)
        symmetry = abs(_dot(function, u, hv) - _dot(function, v, hu))
        symmetry /= max(_norm(u) * max(_norm(hu), scale), 1e-300)
        symmetry *= math.sqrt(operator.size)  # of random vectors, a product's share along another is 1/√P
        del u, hu  # what is held here is held in float64 below
        torch.rand(1)  # moves the random stream on: noise inside the model must not repeat by chance
        repeatability = _norm(product(v) - hv) / scale
        difference = _differences(operator, v, hv)
        unit = torch.finfo(dtype if dtype.itemsize >= 4 else operator.dtype).eps
        others = (repeatability, symmetry, plan.agreement or 0.0)
        operator.floor = rounding_floor(operator, unit, v, hv, scale, *others)
    if operator.way == "finite_difference":
        operator.floor = max(operator.floor, difference.product)
    numbers = SelfTest(
        repeatability=repeatability,
        symmetry=symmetry,
        finite_difference=difference.product,
        slope=difference.slope,
        worst_tensor=difference.worst,
        precision=difference.precision,
        ways_agree=plan.agreement,
    )
    fault = _infinite(operator, hv) or _half(operator, dtype)
    return numbers, (fault,) if fault is not None else tuple(_faults(operator, numbers, plan))


def faint(operator: Curvature, piece: Any) -> float:
    """Curvature per length of a vector that is rounding, at the size of the gradient and of the weights."""
    theta = math.hypot(*(_norm(t.detach()) for t in operator.function.theta))
    scale = max(theta, LEAST_WEIGHT * math.sqrt(operator.size))
    return NEGLIGIBLE[operator.dtype] * _norm(gradient(operator.function, piece)) / scale


def _infinite(operator: Curvature, product: Tensor) -> Fault | None:
    pieces = zip(operator.function.names, operator.function.split(product), strict=True)
    bad = [name for name, piece in pieces if not bool(torch.isfinite(piece).all())]
    if not bad:
        return None
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    text = f"a product with the Hessian is NaN or infinite in {bad[0]}{more}: a second derivative is infinite "
    text += "here (sqrt, norm, power or log at 0): add a small constant inside, or leave tensors out with --params"
    return Fault("finite", text)


def _half(operator: Curvature, dtype: torch.dtype) -> Fault | None:
    if dtype.itemsize >= 4:
        return None
    return Fault("precision", half_precision(operator, dtype))


@dataclass(frozen=True)
class _Differences:
    product: float
    slope: float
    worst: str
    precision: str


def _differences(operator: Curvature, row: Tensor, product: Tensor) -> _Differences:
    """Product and gradient of up to 16 examples against differences, the best over a ladder of steps."""
    if operator.kind != "hessian":
        # G and R are no derivative of a gradient; H = G + R is what differences can check
        check = operator.sibling("hessian")
        product = WAYS[operator.way](check.function, "hessian", _piece(operator), row[None])[0]
    function, precision = in_double(operator), "float64"
    if function is None:
        function, precision = operator.function, str(operator.dtype).removeprefix("torch.")
    piece = function.place(operator.trial)
    slope = gradient(function, piece)
    slope_norm = _norm(slope)
    downhill = (slope / max(slope_norm, 1e-300)).to(operator.dtype)
    del slope
    length, least = _norm(row), faint(operator, _piece(operator))
    best = _Differences(math.inf, math.inf, "", precision)
    for h, settled in _steps(function, piece):
        if max(best.product, best.slope) <= settled:
            break
        up, down = (_slopes_at(function, piece, row, s * h / length) for s in (1, -1))
        error, worst = _worst_tensor(operator, product, up, down, length / (2 * h), least * length)
        del up, down
        if error < best.product:
            best = _Differences(error, best.slope, worst, precision)
        slope_error = _slope_error(function, piece, downhill, h, slope_norm)
        best = _Differences(best.product, min(best.slope, slope_error), best.worst, precision)
    return best


def _steps(function: Functional, piece: Any) -> Iterator[tuple[float, float]]:
    """Lengths of steps, each with the error at which it is not needed any more.

    The usual ones first; then, where these do not settle it, those for rounding that shows nowhere in the graph
    and for weights next to 0. A fault is off at every step, so that more steps never hide one.
    """
    scale = math.hypot(*(_norm(t.detach()) for t in function.theta))
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


def _slopes_at(function: Functional, piece: Any, direction: Tensor, step: float) -> tuple[Tensor, ...]:
    theta = function.shifted(direction, step)
    return slopes(function.total(theta, piece), theta)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _dot(function: Functional, a: Tensor, b: Tensor) -> float:
    """aᵀb in float64, a tensor at a time."""
    pairs = zip(function.split(a), function.split(b), strict=True)
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in pairs)


def _slope_error(function: Functional, piece: Any, direction: Tensor, h: float, expected: float) -> float:
    with torch.no_grad():
        up, down = (float(function.total(function.shifted(direction, s), piece)) for s in (h, -h))
    if expected == 0:
        return 0.0
    # a loss of size L is only known to L·eps: below that a slope cannot be refuted
    noise = 8 * torch.finfo(function.dtype).eps * max(abs(up), abs(down)) / h
    return abs((up - down) / (2 * h) - expected) / (expected + noise)


def _worst_tensor(
    operator: Curvature,
    product: Tensor,
    up: tuple[Tensor, ...],
    down: tuple[Tensor, ...],
    factor: float,
    least: float,
) -> tuple[float, str]:
    """Largest relative error over tensors; next to no curvature counts against the whole, or ``least``."""
    norms = []
    for mine, above, below in zip(operator.function.split(product), up, down, strict=True):
        theirs = (above - below).double() * factor
        norms.append((_norm(mine), _norm(theirs), _norm(mine.double() - theirs)))
    whole = math.hypot(*(theirs for _, theirs, _ in norms))
    worst, name = 0.0, operator.layout[0][0]
    for (label, size), (mine_norm, theirs_norm, off) in zip(operator.layout, norms, strict=True):
        share = max(0.02 * whole, least) * math.sqrt(size / operator.size)
        error = off / max(theirs_norm, mine_norm, share, 1e-300)
        if not error <= worst:
            worst, name = error, label
    return worst, name


def _piece(operator: Curvature) -> Any:
    return operator.function.place(operator.trial)


def _faults(operator: Curvature, numbers: SelfTest, plan: Plan) -> list[Fault]:
    faults = []
    limit = LIMITS["finite_difference"] if numbers.precision == "float64" else SINGLE_LIMIT
    if not numbers.repeatability <= LIMITS["repeatability"]:
        text = f"the same product twice differs by {numbers.repeatability:.2g}: the model draws random numbers "
        text += "(functional dropout, sampling, augmentation inside forward); switch that off in evaluation mode"
        faults.append(Fault("repeatability", text))
        return faults
    if not numbers.symmetry <= LIMITS["symmetry"]:
        text = f"u·Hv and v·Hu differ by {numbers.symmetry:.2g}: {suspects(operator)}"
        faults.append(Fault("symmetry", text))
    if not numbers.finite_difference <= limit:
        text = f"products miss differences of the gradient by {numbers.finite_difference:.2g}, worst in "
        faults.append(Fault("finite_difference", text + f"{numbers.worst_tensor}: {suspects(operator)}"))
    if not numbers.slope <= (LIMITS["slope"] if numbers.precision == "float64" else SINGLE_LIMIT):
        text = f"the gradient misses differences of the loss by {numbers.slope:.2g}: {suspects(operator)}"
        faults.append(Fault("slope", text))
    if plan.agreement is not None and plan.agreement > AGREEMENT[operator.dtype]:
        text = f"two exact ways of forming products differ by {plan.agreement:.2g}: {suspects(operator)}"
        faults.append(Fault("ways_agree", text))
    return faults
