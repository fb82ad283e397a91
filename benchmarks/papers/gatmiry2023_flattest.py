"""The flattest factors under a constraint on their product, and the window that the theorem puts them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from hessdiag.closed_form import end_to_end, factorization_trace, induced_regularizer

FEASIBLE = 1e-6  # of the constraint, relative
STILL = 1e-6  # relative change of the trace from one round of the solver to the next


@dataclass(frozen=True)
class Flattest:
    """What the solver found.

    Attributes:
        product: E(W).
        half_trace: ½ tr ∇²L.
        residual: of the constraint, relative.
        converged: whether the criterion was met, and not the count of rounds.
    """

    product: Tensor
    half_trace: float
    residual: float
    converged: bool

    def over_f0(self, depth: int) -> float:
        """½ tr ∇²L over F₀ of the same product: the ratio that the theorem bounds."""
        return self.half_trace / induced_regularizer(self.product, depth)


def flattest(
    A: Tensor, residual: Callable[[Tensor], Tensor], start: Sequence[Tensor], rounds: int = 60
) -> Flattest:
    """Least ½ tr ∇²L subject to residual(E(W)) = 0, by an augmented Lagrangian with L-BFGS inside.

    A local minimum, as gradient descent would find; the trace has no other known for Gaussian measurements.

    Args:
        A: measurements, (n, d, d).
        residual: of the product, divided by its scale.
        start: factors (W₁, ..., W_L), which set the depth and the widths.
        rounds: at most.
    """
    shapes = [w.shape for w in start]
    sizes = [w.numel() for w in start]
    x = torch.cat([w.detach().reshape(-1) for w in start]).double().numpy()

    def factors(flat: Tensor) -> list[Tensor]:
        return [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]

    def lagrangian(values: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(values).requires_grad_()
        weights = factors(flat)
        c = residual(end_to_end(weights))
        value = factorization_trace(weights, A) / 2 + dual @ c + weight / 2 * c @ c
        (slope,) = torch.autograd.grad(value, flat)
        return float(value.detach()), slope.numpy()

    with torch.no_grad():
        c = residual(end_to_end(factors(torch.from_numpy(x))))
        scale = float(factorization_trace(factors(torch.from_numpy(x)), A)) / 2
    dual, weight, before, violated = torch.zeros_like(c), 10.0 * scale, float("inf"), float("inf")
    converged = False
    for _ in range(rounds):
        x = minimize(
            lagrangian,
            x,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 3000, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-9 * scale},
        ).x
        with torch.no_grad():
            weights = factors(torch.from_numpy(x))
            c = residual(end_to_end(weights))
            half = float(factorization_trace(weights, A)) / 2
        size = float(c.norm())
        if size < FEASIBLE and abs(half - before) < STILL * half:
            converged = True
            break
        dual = dual + weight * c
        if size > violated / 4:
            weight *= 4
        before, violated = half, size
    return Flattest(end_to_end(weights), half, size, converged)


def window(A: Tensor, starts: int = 64, sweeps: int = 60, seed: int = 0) -> tuple[float, float]:
    """Least and largest (1/n) Σ ⟨Aᵢ, X⟩² / ‖X‖_F² found over rank-one X: 1 ∓ δ of the theorem.

    Found, not proven: the true window can be wider, so a trace inside this one is inside the true one.
    """
    rng = torch.Generator().manual_seed(seed)
    found = []
    for end in (0, -1):
        v = torch.randn(starts, A.shape[2], generator=rng, dtype=A.dtype)
        v = v / v.norm(dim=1, keepdim=True)
        for _ in range(sweeps):
            v, _ = _best(torch.einsum("nij,sj->sni", A, v), end)
            v, values = _best(torch.einsum("nij,si->snj", A, v), end)
        found.append(float(values.min() if end == 0 else values.max()))
    return found[0], found[1]


def _best(rows: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """The unit vector at an end of the spectrum of (1/n) Σ rows rowsᵀ, for each start, and its eigenvalue."""
    values, vectors = torch.linalg.eigh(rows.mT @ rows / rows.shape[1])
    return vectors[:, :, end], values[:, end]
