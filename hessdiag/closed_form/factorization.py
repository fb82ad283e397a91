"""Deep matrix factorization: the Hessian's trace in closed form, and the regularizer its minimisation induces.

E(W) = W_L ⋯ W₁ with W_j of shape (d_j, d_{j−1}), measured by L(W) = (1/n) Σ (⟨Aᵢ, E(W)⟩ − bᵢ)². Setting of
Gatmiry, Li, Chuang, Reddi, Ma and Jegelka (arXiv 2306.13239, NeurIPS 2023); formulas derived here, not taken
from the text.
A loss with the factor 1/2 has half the trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hessdiag.errors import UsageError


def end_to_end(weights: Sequence[Tensor]) -> Tensor:
    """E(W) = W_L ⋯ W₁, of shape (d_L, d_0); ``weights`` = (W₁, ..., W_L).

    Raises:
        UsageError: no weights, or shapes that do not follow each other.
    """
    _refuse_misfit(weights)
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    return product


def factorization_loss(weights: Sequence[Tensor], measurements: Tensor, targets: Tensor) -> Tensor:
    """(1/n) Σ (⟨Aᵢ, E(W)⟩ − bᵢ)² with A (n, d_L, d_0) and b (n,); differentiable."""
    _refuse_measurements(weights, measurements)
    return (torch.einsum("nij,ij->n", measurements, end_to_end(weights)) - targets).square().mean()


def factorization_trace(weights: Sequence[Tensor], measurements: Tensor) -> Tensor:
    """The trace, tr ∇²L(W) = (2/n) Σⱼ Σᵢ ‖(W_L⋯W_{j+1})ᵀ Aᵢ (W_{j−1}⋯W₁)ᵀ‖_F².

    For any depth; a differentiable scalar.

    Exact everywhere, not only where the loss is zero: E is linear in every W_j, so the Hessian's diagonal has no
    residual term.

    Args:
        weights: (W₁, ..., W_L).
        measurements: A, (n, d_L, d_0).

    Raises:
        UsageError: shapes that do not fit.
    """
    _refuse_measurements(weights, measurements)
    left, right = _left_products(weights), _right_products(weights)
    parts = [
        (before.mT @ measurements @ after.mT).square().sum() for before, after in zip(left, right, strict=True)
    ]
    return 2 * torch.stack(parts).sum() / len(measurements)


def factorization_trace_gradient(weights: Sequence[Tensor], measurements: Tensor) -> tuple[Tensor, ...]:
    """The analytic gradient of `factorization_trace`, one tensor per W_j; cost about 3 traces."""
    _refuse_measurements(weights, measurements)
    left, right, scale = _left_products(weights), _right_products(weights), 4 / len(measurements)
    found = [torch.zeros_like(weight) for weight in weights]
    by_left, by_right = [], []
    for before, after in zip(left, right, strict=True):
        inner = before.mT @ measurements @ after.mT
        by_left.append(scale * (measurements @ after.mT @ inner.mT).sum(0))
        by_right.append(scale * (inner.mT @ before.mT @ measurements).sum(0))
    for j in range(len(weights) - 1):  # left[j] = left[j+1] W_{j+1}
        found[j + 1] += left[j + 1].mT @ by_left[j]
        by_left[j + 1] += by_left[j] @ weights[j + 1].mT
    for j in range(len(weights) - 1, 0, -1):  # right[j] = W_{j-1} right[j-1]
        found[j - 1] += by_right[j] @ right[j - 1].mT
        by_right[j - 1] += weights[j - 1].mT @ by_right[j]
    return tuple(found)


def isotropic_trace(weights: Sequence[Tensor]) -> Tensor:
    """R(W) = Σⱼ ‖W_L⋯W_{j+1}‖_F² ‖W_{j−1}⋯W₁‖_F²: half the trace for measurements with (1/n) Σ ⟨Aᵢ, X⟩² = ‖X‖_F².

    Under (1, δ)-RIP on rank-one X the true half trace is within a factor 1 ± δ of it. Differentiable.
    """
    _refuse_misfit(weights)
    pairs = zip(_left_products(weights), _right_products(weights), strict=True)
    return torch.stack([before.square().sum() * after.square().sum() for before, after in pairs]).sum()


def induced_regularizer(matrix: Tensor, depth: int) -> float:
    """F₀(M) = L (d₀ d_L)^{1/L} ‖M‖_*^{2(L−1)/L}: the least R(W) over all W of this depth with E(W) = M.

    Under (1, δ)-RIP, F(M) = min ½ tr ∇²L lies in [(1 − δ) F₀(M), (1 + δ) F₀(M)] for every depth L ≥ 2. Multiply by
    2 for the trace itself.

    Args:
        matrix: M, (d_L, d_0).
        depth: L.

    Raises:
        UsageError: depth below 2, or not a matrix.
    """
    _refuse_depth(matrix, depth)
    nuclear = float(torch.linalg.matrix_norm(matrix, "nuc"))
    return float(depth * matrix.numel() ** (1 / depth) * nuclear ** (2 * (depth - 1) / depth))


def induced_regularizer_depth_two(matrix: Tensor, measurements: Tensor) -> float:
    """F(M) = 2 ‖C₁^{1/2} M C₂^{1/2}‖_*, C₁ = mean AᵢAᵢᵀ, C₂ = mean AᵢᵀAᵢ: exact at depth 2 for any measurements.

    As Theorem 3.2 of Ding, Drusvyatskiy and Fazel (2022) has it, up to scale.
    """
    _refuse_depth(matrix, 2)
    outer = (measurements @ measurements.mT).mean(0)
    inner = (measurements.mT @ measurements).mean(0)
    return 2 * float(torch.linalg.matrix_norm(_root(outer) @ matrix @ _root(inner), "nuc"))


def flattest_factors(matrix: Tensor, depth: int, width: int | None = None) -> tuple[Tensor, ...]:
    """Weights with E(W) = M that attain R(W) = F₀(M).

    With M = P Σ Qᵀ and τ = F₀/L: W₁ = c₁ Σ^{1/2} Qᵀ, W_j = c_j I, W_L = c_L P Σ^{1/2}, c₁² = d₀ ‖M‖_*/τ,
    c_L² = d_L ‖M‖_*/τ, c_j² = ‖M‖_*²/τ.

    Args:
        matrix: M, (d_L, d_0).
        depth: L ≥ 2.
        width: of the hidden layers, at least min(d_0, d_L), which is the default.

    Raises:
        UsageError: depth below 2, or too narrow.
    """
    _refuse_depth(matrix, depth)
    P, sigma, Qt = torch.linalg.svd(matrix, full_matrices=False)
    rank, nuclear = len(sigma), float(sigma.sum())
    width = rank if width is None else width
    if width < rank:
        msg = f"width {width}: matrices of shape {tuple(matrix.shape)} need hidden layers of at least {rank}"
        raise UsageError(msg)
    tau = induced_regularizer(matrix, depth) / depth
    one, middle, last = (
        math.sqrt(x / tau) if tau > 0 else 0.0
        for x in (matrix.shape[1] * nuclear, nuclear**2, matrix.shape[0] * nuclear)
    )
    root = sigma.sqrt()
    first = torch.nn.functional.pad(one * root[:, None] * Qt, (0, 0, 0, width - rank))
    end = torch.nn.functional.pad(last * P * root, (0, width - rank))
    eye = torch.eye(width, dtype=matrix.dtype, device=matrix.device)
    # the padding must stay without weight: an identity there would cost trace
    eye[rank:] = 0
    # P and Qᵀ come from torch in column order, and nn.Parameter, safetensors and view() want rows
    return tuple(factor.contiguous() for factor in (first, *(middle * eye for _ in range(depth - 2)), end))


def _left_products(weights: Sequence[Tensor]) -> list[Tensor]:
    """W_L⋯W_{j+1} for every j; the identity for the last."""
    products = [_eye(weights[-1].shape[0], weights[-1])]
    for weight in reversed(weights[1:]):
        products.append(products[-1] @ weight)
    return products[::-1]


def _right_products(weights: Sequence[Tensor]) -> list[Tensor]:
    """W_{j−1}⋯W₁ for every j; the identity for the first."""
    products = [_eye(weights[0].shape[1], weights[0])]
    for weight in weights[:-1]:
        products.append(weight @ products[-1])
    return products


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _root(matrix: Tensor) -> Tensor:
    """Square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    return root


def _refuse_misfit(weights: Sequence[Tensor]) -> None:
    shapes = [tuple(weight.shape) for weight in weights]
    follows = all(len(s) == 2 for s in shapes)
    follows = follows and all(a[0] == b[1] for a, b in pairwise(shapes))
    if not shapes or not follows:
        msg = f"factors of shapes {shapes}: give W₁ (d₁, d₀), W₂ (d₂, d₁), ..., the first factor first"
        raise UsageError(msg)


def _refuse_measurements(weights: Sequence[Tensor], measurements: Tensor) -> None:
    _refuse_misfit(weights)
    ends = (weights[-1].shape[0], weights[0].shape[1])
    if measurements.dim() != 3 or measurements.shape[1:] != ends or len(measurements) == 0:
        msg = f"measurements of shape {tuple(measurements.shape)}: the factors need (n, {ends[0]}, {ends[1]})"
        raise UsageError(msg)


def _refuse_depth(matrix: Tensor, depth: int) -> None:
    if matrix.dim() != 2 or matrix.numel() == 0 or depth < 2:
        msg = f"depth {depth} of a matrix of shape {tuple(matrix.shape)}: a matrix and depth 2 or more are needed"
        raise UsageError(msg)
