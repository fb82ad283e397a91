"""Symmetric matrices as vectors of half the length with the same inner products."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def _half(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat indices of the upper triangle of a size x size matrix, and 1 on and √2 off the diagonal."""
    rows, columns = torch.triu_indices(size, size, device=device)
    scale = (2 - (rows == columns).double()).sqrt()
    return rows * size + columns, scale


def half(matrices: Tensor) -> Tensor:
    """Symmetric (n, k, k) as rows (n, k(k+1)/2) with the same inner products."""
    indices, scale = _half(matrices.shape[1], matrices.device)
    return matrices.flatten(1)[:, indices] * scale


def whole(rows: Tensor, size: int) -> Tensor:
    """The inverse of `half`."""
    indices, scale = _half(size, rows.device)
    flat = rows.new_zeros(len(rows), size * size)
    flat[:, indices] = rows / scale
    matrices = flat.view(len(rows), size, size)
    upper = matrices.triu(1)
    return matrices + upper.mT


def outer(rows: Tensor) -> Tensor:
    """`half` of v vᵀ for every row v: (n, k) to (n, k(k+1)/2)."""
    first, second = torch.triu_indices(rows.shape[1], rows.shape[1], device=rows.device)
    return rows[:, first] * rows[:, second] * _half(rows.shape[1], rows.device)[1]
