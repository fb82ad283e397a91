"""A Wolkowicz-Styan bound of the batch's Hessian and its gradient, for any network, from products."""

from __future__ import annotations

import math
from typing import Literal

import torch

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.training import dot
from hessdiag.regularizers.curvature_penalty import CurvaturePenalty
from hessdiag.spectral.moments import ws_derivatives

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
    size = sum(p.numel() for p in batch.params)
    mean, spread = (1.0, math.sqrt(size - 1)) if bound == "upper" else (0.0, math.sqrt(2 * size))
    value, alpha, beta = ws_derivatives(first, second, size, mean=mean, spread=spread, rounding=64 * eps)
    total = tuple(torch.zeros_like(p, requires_grad=False) for p in batch.params)
    for v, w in zip(vectors, images, strict=True):
        y = tuple(alpha * a + 2 * beta * b for a, b in zip(v, w, strict=True))
        part = penalty.form_gradient(batch, curved, v, y)
        total = tuple(t if d is None else t + d / probes for t, d in zip(total, part, strict=True))
    return curved.gradient, total, value
