"""A Wolkowicz-Styan bound of the batch's Hessian and its gradient, for any network, from products."""

from __future__ import annotations

import math
from typing import Literal

import torch

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.training import dot
from hessdiag.regularizers.curvature_penalty import CurvaturePenalty

Bounded = Literal["upper", "spread"]
BOUNDS: dict[Bounded, Literal["ws_upper", "ws_spread"]] = {"upper": "ws_upper", "spread": "ws_spread"}


def bound_by_probes(
    penalty: CurvaturePenalty, batch: BatchLoss, bound: Bounded, probes: int
) -> tuple[Pieces, Pieces, float]:
    """∇L, the bound's gradient and the bound, with T₁ ≈ mean v·Hv and T₂ ≈ mean |Hv|² over random signs v.

    α ∇T₁ + β ∇T₂ with α, β at the estimates: per probe the gradient of v·H y at constant v and y = αv + 2βHv
    Cost: 1 pass with its graph kept; per probe 1 product and 1 third derivative.
    """
    curved = batch.curved()
    vectors = [penalty.signs(batch.params, draw) for draw in range(probes)]
    images = [curved.product(v) for v in vectors]
    first = sum(dot(v, w) for v, w in zip(vectors, images, strict=True)) / probes
    second = sum(dot(w, w) for w in images) / probes
    eps = max(torch.finfo(p.dtype).eps for p in batch.params)
    value, alpha, beta = derivatives(bound, first, second, sum(p.numel() for p in batch.params), eps)
    total = tuple(torch.zeros_like(p, requires_grad=False) for p in batch.params)
    for v, w in zip(vectors, images, strict=True):
        y = tuple(alpha * a + 2 * beta * b for a, b in zip(v, w, strict=True))
        part = penalty.form_gradient(batch, curved, v, y)
        total = tuple(t if d is None else t + d / probes for t, d in zip(total, part, strict=True))
    return curved.gradient, total, value


def derivatives(bound: Bounded, t1: float, t2: float, size: int, eps: float) -> tuple[float, float, float]:
    """The bound, and its derivatives α by T₁ and β by T₂.

    Args:
        bound: m + s √(P−1), or s √(2P).
        t1: tr H.
        t2: tr H².
        size: P.
        eps: relative rounding of the traces.
    """
    m, variance = t1 / size, t2 / size - (t1 / size) ** 2
    reach = math.sqrt(size - 1) if bound == "upper" else math.sqrt(2 * size)
    share = 1.0 if bound == "upper" else 0.0
    # below this s² is rounding, and s has its minimum where it is 0
    s = math.sqrt(variance) if variance > 64 * eps * t2 / size else 0.0
    by_t1, by_t2 = (-t1 / (size**2 * s), 1 / (2 * size * s)) if s else (0.0, 0.0)
    return share * m + reach * s, share / size + reach * by_t1, reach * by_t2
