"""Activations with their first three derivatives: by formula where known, by the engine elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessdiag.engine.products.derivatives import Derivatives, derivatives
from hessdiag.errors import UsageError


@dataclass(frozen=True)
class Activation:
    """An elementwise function s.

    Attributes:
        name: for reports.
        at: a ↦ (s, s′, s″, s‴) at every element.
    """

    name: str
    at: Callable[[Tensor], Derivatives]


def tanh(a: Tensor) -> Derivatives:
    """1 − t², −2t(1 − t²), (1 − t²)(6t² − 2)."""
    t = torch.tanh(a)
    # 1 − t² loses its digits in saturation
    first = 1 / torch.cosh(a).square()
    return t, first, -2 * t * first, first * (6 * t * t - 2)


def sigmoid(a: Tensor) -> Derivatives:
    """With e = s(1 − s): e, e(1 − 2s), e(1 − 6e)."""
    s = torch.sigmoid(a)
    e = s * torch.sigmoid(-a)
    return s, e, e * (1 - 2 * s), e * (1 - 6 * e)


def softplus(a: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Derivatives:
    """Derivatives of log(1 + eᵝᵃ)/β; linear beyond the threshold, as torch has it."""
    s, e, e1, _ = sigmoid(beta * a)
    linear = beta * a > threshold
    value = nn.functional.softplus(a, beta, threshold)
    zero = torch.zeros_like(a)
    return (
        value,
        torch.where(linear, 1.0, s),
        torch.where(linear, zero, beta * e),
        torch.where(linear, zero, beta**2 * e1),
    )


def gelu(a: Tensor) -> Derivatives:
    """Of aΦ(a): Φ + aφ, φ(2 − a²), φ(a³ − 4a)."""
    density = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    mass = torch.special.ndtr(a)
    return nn.functional.gelu(a), mass + a * density, density * (2 - a * a), density * (a**3 - 4 * a)


def silu(a: Tensor) -> Derivatives:
    """Of as(a) with the sigmoid s: s + as′, 2s′ + as″, 3s″ + as‴."""
    s, s1, s2, s3 = sigmoid(a)
    return a * s, s + a * s1, 2 * s1 + a * s2, 3 * s2 + a * s3


def identity(a: Tensor) -> Derivatives:
    """1, 0, 0."""
    zero = torch.zeros_like(a)
    return a, torch.ones_like(a), zero, zero


def relu(a: Tensor) -> Derivatives:
    """Almost everywhere: [a > 0], 0, 0."""
    zero = torch.zeros_like(a)
    return a.clamp(min=0), (a > 0).to(a.dtype), zero, zero


KNOWN = {f.__name__: Activation(f.__name__, f) for f in (tanh, sigmoid, softplus, gelu, silu, relu, identity)}
"""Activations with formulas; names are those of ``torch.nn.functional``."""

_MODULES: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.Identity: "identity",
}


def activation(given: str | Activation | nn.Module | Callable[[Tensor], Tensor]) -> Activation:
    """An `Activation` from a name, a torch module or any elementwise torch function.

    Raises:
        UsageError: a name that is not known.
    """
    if isinstance(given, Activation):
        return given
    if isinstance(given, str):
        if given not in KNOWN:
            msg = f"activation {given!r}: known are {', '.join(KNOWN)}, or give an elementwise torch function"
            raise UsageError(msg)
        return KNOWN[given]
    if isinstance(given, nn.Module) and type(given) in _MODULES:
        return KNOWN[_MODULES[type(given)]]
    if type(given) is nn.Softplus:
        beta, threshold = float(given.beta), float(given.threshold)
        return Activation("softplus", lambda a: softplus(a, beta, threshold))
    if type(given) is nn.GELU and given.approximate == "none":
        return KNOWN["gelu"]
    name = getattr(given, "__name__", type(given).__name__)
    return Activation(name, lambda a: derivatives(given, a))


OTHERS = tuple(
    activation(f)
    for f in (
        nn.GELU(approximate="tanh"),
        nn.functional.elu,
        nn.functional.selu,
        nn.functional.mish,
        nn.functional.softsign,
        nn.functional.leaky_relu,
        nn.functional.logsigmoid,
        torch.sin,
        torch.erf,
        torch.atan,
    )
)
"""Further ones that a forward may apply as functions, by autograd."""
