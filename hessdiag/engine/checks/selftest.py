"""Can the products be believed? Four numbers, taken before every measurement.

Symmetry and finite differences together caught all eight silent faults of autograd that were tried, neither
did alone. Differences are taken in float64 with steps small enough not to cross ReLU kinks, tensor by tensor,
so that a fault in a small tensor is not drowned by the others and can be named.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.engine.checks.differences import LIMITS, Checked, differences, faint, limit
from hessdiag.engine.checks.jumps import beside_a_kink
from hessdiag.engine.checks.planner import AGREEMENT, Plan, trial_vectors
from hessdiag.engine.checks.rounding import rounding_floor
from hessdiag.engine.checks.suspects import half_precision, suspects
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.memory import free_bytes, give_back
from hessdiag.engine.products.methods import METHODS
from hessdiag.engine.products.precision import in_double, narrowest
from hessdiag.engine.products.windows import distance, dot, norm
from hessdiag.errors import MeasurementError
from hessdiag.results import SelfTest

LARGE = 1 << 24  # parameters whose tensors must not stay with the process when they are freed
SELF_TEST, LARGEST = 20, 16  # bytes per parameter, and per number of the largest tensor, beside activations


@dataclass(frozen=True)
class Fault:
    """A self-test number above its limit, with the likely cause and the way out."""

    name: str
    text: str


def with_room(operator: Curvature) -> Curvature:
    """The operator, once freed memory is given back where it is large; refused where the machine would only swap.

    Raises:
        MeasurementError: what the self-test holds in float64, the most before a run, is not free.
    """
    if operator.size < LARGE:
        return operator
    give_back()
    needed = SELF_TEST * operator.size + LARGEST * max(size for _, size in operator.layout)
    free = free_bytes(operator.device)
    if needed > free:
        takes, are_free = (f"{count / 2**30:.1f} GiB" for count in (needed, free))
        msg = f"out of memory: the self-test of {operator.size:,} parameters takes about {takes}, and {are_free} "
        raise MeasurementError(msg + "are free: choose `params`")
    return operator


def self_test(operator: Curvature, plan: Plan) -> tuple[SelfTest, tuple[Fault, ...]]:
    """Measure the four numbers on up to 16 examples, and set ``operator.floor``.

    Cost: about 7 products and 6 to 14 gradients of 16 examples; twice that where the checkpoint lies on a kink.

    Returns:
        The numbers, and the faults they prove; empty if the products can be believed.
    """
    function = operator.function
    piece = operator.function.place(operator.trial)
    rows = trial_vectors(operator, 2)
    u, v = rows
    method = METHODS[operator.method]

    def product(row: Tensor) -> Tensor:
        return method(function, operator.kind, piece, row[None])[0]

    with function.measuring():
        dtype = narrowest(function, piece)
        hu, hv = product(u), product(v)
        scale = max(norm(hv), faint(operator, piece) * norm(v), 1e-300)
        symmetry = abs(_dot(function, u, hv) - _dot(function, v, hu))
        symmetry /= max(norm(u) * max(norm(hu), scale), 1e-300)
        symmetry *= math.sqrt(operator.size)  # of random vectors, a product's share along another is 1/√P
        v = v.clone()
        del u, hu, rows  # what is held here is held in float64 below
        torch.rand(1)  # moves the random stream on: noise inside the model must not repeat by chance
        repeatability = distance(product(v), hv) / scale
        double = in_double(operator)  # a copy of θ: it goes with this function
        difference, jump = differences(Checked(operator, double, v, product=hv)), None
        known = repeatability <= LIMITS["repeatability"] and bool(torch.isfinite(hv).all())
        if known and not (difference.product_agrees and difference.gradient_agrees):
            beside = beside_a_kink(operator, double, v, difference)
            difference, jump = (difference, None) if beside is None else (beside, difference.worst)
        unit = torch.finfo(dtype if dtype.itemsize >= 4 else operator.dtype).eps
        others = (repeatability, symmetry, plan.agreement or 0.0)
        operator.floor = rounding_floor(operator, double, unit, v, hv, scale, *others)
    if operator.method == "finite_difference":
        operator.floor = max(operator.floor, difference.product)
    numbers = SelfTest(
        repeatability=repeatability,
        symmetry=symmetry,
        finite_difference=difference.product,
        gradient_error=difference.gradient_error,
        worst_tensor=difference.worst,
        precision=difference.precision,
        methods_agree=plan.agreement,
        kink=jump,
    )
    fault = _infinite(operator, hv) or _half(operator, dtype)
    return numbers, (fault,) if fault is not None else tuple(_faults(operator, numbers, plan))


def _dot(function: Functional, a: Tensor, b: Tensor) -> float:
    """aᵀb in float64, a tensor at a time."""
    return math.fsum(dot(x, y) for x, y in zip(function.split(a), function.split(b), strict=True))


def _infinite(operator: Curvature, product: Tensor) -> Fault | None:
    pieces = zip(operator.function.names, operator.function.split(product), strict=True)
    bad = [name for name, piece in pieces if not bool(torch.isfinite(piece).all())]
    if not bad:
        return None
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    text = f"a product with the Hessian is NaN or infinite in {bad[0]}{more}: a second derivative is infinite "
    text += "here (sqrt, norm, power or log at 0): add a small constant inside, or leave tensors out with `params`"
    return Fault("finite", text)


def _half(operator: Curvature, dtype: torch.dtype) -> Fault | None:
    if dtype.itemsize >= 4:
        return None
    return Fault("precision", half_precision(operator, dtype))


def _faults(operator: Curvature, numbers: SelfTest, plan: Plan) -> list[Fault]:
    faults = []
    if not numbers.repeatability <= LIMITS["repeatability"]:
        text = f"the same product twice differs by {numbers.repeatability:.2g}: the model draws random numbers "
        text += "(functional dropout, sampling, augmentation inside forward); switch that off in evaluation mode"
        faults.append(Fault("repeatability", text))
        return faults
    if not numbers.symmetry <= LIMITS["symmetry"]:
        text = f"u·Hv and v·Hu differ by {numbers.symmetry:.2g}: {suspects(operator)}"
        faults.append(Fault("symmetry", text))
    if not numbers.finite_difference <= limit("finite_difference", numbers.precision):
        text = f"products miss differences of the gradient by {numbers.finite_difference:.2g}, worst in "
        faults.append(Fault("finite_difference", text + f"{numbers.worst_tensor}: {suspects(operator)}"))
    if not numbers.gradient_error <= limit("gradient", numbers.precision):
        text = f"the gradient misses differences of the loss by {numbers.gradient_error:.2g}: {suspects(operator)}"
        faults.append(Fault("gradient_error", text))
    if plan.agreement is not None and plan.agreement > AGREEMENT[operator.dtype]:
        text = f"two exact methods differ in their products by {plan.agreement:.2g}: {suspects(operator)}"
        faults.append(Fault("methods_agree", text))
    return faults
