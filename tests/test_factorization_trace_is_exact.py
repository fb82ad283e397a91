"""Promise: the deep factorization's trace, its gradient and the induced regularizer are exact. (5 s)"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hessdiag.closed_form import (
    end_to_end,
    factorization_loss,
    factorization_trace,
    factorization_trace_gradient,
    flattest_factors,
    induced_regularizer,
    induced_regularizer_depth_two,
    isotropic_trace,
)
from hessdiag.errors import UsageError
from tests.models import draws

WIDTHS = {1: (4, 3), 2: (4, 5, 3), 3: (4, 2, 5, 3), 4: (3, 4, 2, 3, 4)}  # narrow layers included


def case(depth: int, n: int = 6, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    R, widths = draws(seed), WIDTHS[depth]
    weights = [R(b, a) for a, b in pairwise(widths)]
    return weights, R(n, widths[-1], widths[0]), R(n)


def dense(weights: list[Tensor], A: Tensor, b: Tensor) -> Tensor:
    """The Hessian of the loss, written out with einsum over the entries of the product."""
    sizes = [w.numel() for w in weights]

    def loss(flat: Tensor) -> Tensor:
        product = torch.eye(weights[0].shape[1], dtype=flat.dtype)
        for piece, w in zip(torch.split(flat, sizes), weights, strict=True):
            product = piece.view_as(w) @ product
        return ((A * product).sum((1, 2)) - b).square().sum() / len(A)

    return torch.func.hessian(loss)(torch.cat([w.reshape(-1) for w in weights]))


@pytest.mark.parametrize("depth", WIDTHS)
def test_trace_is_the_dense_hessians_also_off_the_manifold(depth: int):
    for seed in range(4):
        weights, A, b = case(depth, seed=seed)
        assert float(factorization_loss(weights, A, b)) > 0.1
        true = float(dense(weights, A, b).trace())
        assert float(factorization_trace(weights, A)) == pytest.approx(true, rel=1e-12)
        fitted = torch.einsum("nij,ij->n", A, end_to_end(weights))
        assert float(dense(weights, A, fitted).trace()) == pytest.approx(true, rel=1e-12)


@pytest.mark.parametrize("depth", WIDTHS)
def test_gradient_is_autograds(depth: int):
    weights, A, _ = case(depth, seed=5)
    leaves = [w.clone().requires_grad_() for w in weights]
    value = factorization_trace(leaves, A)
    true = torch.autograd.grad(value, leaves, materialize_grads=True) if value.requires_grad else [0 * A[0]]
    for ours, theirs in zip(factorization_trace_gradient(weights, A), true, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-12 * float(value.detach())


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_gradient_is_the_difference_quotient_of_the_dense_trace(depth: int):
    weights, A, b = case(depth, seed=6)
    R, step = draws(7), 1e-5
    ways = [R(*w.shape) for w in weights]
    ends = [
        float(dense([w + s * step * v for w, v in zip(weights, ways, strict=True)], A, b).trace()) for s in (1, -1)
    ]
    along = sum(float((g * v).sum()) for g, v in zip(factorization_trace_gradient(weights, A), ways, strict=True))
    assert along == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def isometry(rows: int, columns: int) -> Tensor:
    """Measurements with (1/n) Σ ⟨Aᵢ, X⟩² = ‖X‖_F² exactly: δ = 0."""
    n = rows * columns
    return n**0.5 * torch.eye(n, dtype=torch.float64).view(n, rows, columns)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_isotropic_trace_is_half_the_trace_of_an_isometry(depth: int):
    weights, _, _ = case(depth)
    A = isometry(weights[-1].shape[0], weights[0].shape[1])
    assert float(factorization_trace(weights, A)) / 2 == pytest.approx(float(isotropic_trace(weights)), rel=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
@pytest.mark.parametrize("width", [None, 7])
def test_equality_construction(depth: int, width: int | None):
    M = draws(depth)(4, 3)
    weights = flattest_factors(M, depth, width)
    assert len(weights) == depth and torch.allclose(end_to_end(weights), M, rtol=0, atol=1e-13)
    assert float(isotropic_trace(weights)) == pytest.approx(induced_regularizer(M, depth), rel=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_nothing_with_the_same_product_is_flatter(depth: int):
    """W_{j+1} S, S⁻¹ W_j keep E: a thousand such moves, near and far, never go below F₀."""
    M = draws(11)(4, 3)
    least, R = induced_regularizer(M, depth), draws(12)
    for trial in range(1000):
        weights = list(flattest_factors(M, depth))
        for j in range(depth - 1):
            S = torch.eye(3, dtype=torch.float64) + 10 ** -(trial % 4) * R(3, 3)
            weights[j], weights[j + 1] = torch.linalg.solve(S, weights[j]), weights[j + 1] @ S
        assert float(isotropic_trace(weights)) >= least * (1 - 1e-9)


def test_depth_two_of_any_measurements():
    """An isometry gives F₀; elsewhere the construction through C₁, C₂ attains it and no rebalancing beats it."""
    R = draws(3)
    M = R(4, 3)
    assert induced_regularizer_depth_two(M, isometry(4, 3)) == pytest.approx(induced_regularizer(M, 2), rel=1e-12)
    A = R(9, 4, 3)
    root = [torch.linalg.cholesky((B @ B.mT).mean(0)) for B in (A, A.mT)]
    P, sigma, Qt = torch.linalg.svd(root[0].T @ M @ root[1], full_matrices=False)
    last = torch.linalg.solve(root[0].T, P * sigma.sqrt())
    first = torch.linalg.solve(root[1].T, (sigma.sqrt()[:, None] * Qt).T).T
    assert torch.allclose(last @ first, M)
    least = induced_regularizer_depth_two(M, A)
    assert float(factorization_trace((first, last), A)) / 2 == pytest.approx(least, rel=1e-10)
    for _ in range(300):
        S = torch.eye(3, dtype=torch.float64) + 0.3 * R(3, 3)
        moved = (torch.linalg.solve(S, first), last @ S)
        assert float(factorization_trace(moved, A)) / 2 >= least * (1 - 1e-9)


def test_zero_and_depth_one():
    zero = torch.zeros(3, 2, dtype=torch.float64)
    assert induced_regularizer(zero, 3) == 0 and all(bool((w == 0).all()) for w in flattest_factors(zero, 3))
    (W,), A, _ = case(1)
    assert float(factorization_trace((W,), A)) == pytest.approx(float(2 * A.square().sum() / len(A)), rel=1e-12)


REFUSED = {
    "no factors": lambda: end_to_end([]),
    "factors in the wrong order": lambda: end_to_end(case(2)[0][::-1]),
    "measurements transposed": lambda: factorization_trace(case(2)[0], case(2)[1].mT),
    "no measurements": lambda: factorization_trace(case(2)[0], case(2)[1][:0]),
    "depth one": lambda: induced_regularizer(torch.eye(2), 1),
    "too narrow": lambda: flattest_factors(torch.eye(3), 3, 2),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line(refused):
    with pytest.raises(UsageError) as caught:
        refused()
    assert "\n" not in str(caught.value)


def without_transpose(weights, A):
    left = weights[1].mT @ weights[1]
    return 2 * ((A @ weights[0].mT).square().sum() + (left @ left).square().sum()) / len(A)


BROKEN = {
    "the factor 1/2 in the loss": lambda w, A: factorization_trace(w, A) / 2,
    "the sum for the mean": lambda w, A: factorization_trace(w, A) * len(A),
    "the last layer only": lambda w, A: 2 * (A @ end_to_end(w[:-1]).mT).square().sum() / len(A),
    "measurements averaged before squaring": lambda w, A: factorization_trace(w, A.mean(0, keepdim=True)),
    "norms for products": lambda w, A: 2 * isotropic_trace(w),
    "a wrong outer product": without_transpose,
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    weights, A, b = case(2)
    assert abs(float(breakage(weights, A)) / float(dense(weights, A, b).trace()) - 1) > 1e-2
