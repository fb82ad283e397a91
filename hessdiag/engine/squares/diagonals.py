"""The diagonal of G and of the Fisher matrices, exactly: squares of what each example pulls back.

G = (1/W) Σ_n J_nᵀ S_n J_n with S_n = Σ_c s_c u_c u_cᵀ has the diagonal (1/W) Σ_n Σ_c s_c (J_nᵀ u_c)²; a Fisher
matrix has the gradients of its terms in the place of √s_c u_c. H = G + R has the same diagonal in every tensor
with no block of R (`hessdiag.engine.squares.curved.curved_tensors`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.fisher import Fisher, gradients_of_terms, in_terms
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.stacking import vmapped
from hessdiag.engine.squares.gauss_newton import (
    EXACT_OUTPUTS,
    FAILURES,
    failed,
    kept_together,
    loss_curvature,
    outputs_per_example,
)
from hessdiag.engine.squares.pullbacks import CHUNK_BYTES
from hessdiag.errors import Refused
from hessdiag.samples import divide, map_tensors


def squares_diagonal(operator: Curvature) -> Tensor | Refused:
    """The diagonal of a Fisher matrix, or of G for any other kind, (P,) float64.

    Costs one forward pass and per example as many backward passes as it has outputs (a Fisher matrix: terms times
    draws), at most 32.

    Returns:
        The diagonal; or, where it cannot be had this way, one line saying why.
    """
    if why := kept_together(operator):
        return why
    try:
        with operator.timed():
            outputs = outputs_per_example(operator)
            if isinstance(outputs, Refused):
                return outputs
            return _sum(operator, outputs)
    except FAILURES as error:
        return failed(error)


def _sum(operator: Curvature, outputs: int) -> Tensor | Refused:
    function, total = operator.function, torch.zeros(operator.size, dtype=torch.float64, device=operator.device)
    noise = operator.noise if isinstance(operator, Fisher) else [None] * len(operator.batches)
    rows = max(1, int(CHUNK_BYTES / (operator.size * operator.dtype.itemsize)))
    if not isinstance(operator, Fisher) and outputs > EXACT_OUTPUTS:
        return Refused(f"{outputs} outputs per example, more than {EXACT_OUTPUTS}")
    for pair in zip(operator.batches, noise, strict=True):
        for piece, drawn in divide(pair, rows):
            with torch.no_grad():
                found = function.outputs(function.theta, piece)
            if isinstance(operator, Fisher):
                columns = _of_terms(function, found, piece, drawn)
                signs = torch.full(columns.shape[:2], 1 / operator.draws, dtype=torch.float64)
            else:
                signs, columns = loss_curvature(function, found.detach(), piece)
            if columns.shape[1] > EXACT_OUTPUTS:
                return Refused(f"{columns.shape[1]} terms per example, more than {EXACT_OUTPUTS}")
            total += _squares(function, piece, signs.to(operator.device), columns)
    return total / operator.total_weight


def _of_terms(function: Functional, outputs: Tensor, piece: Any, noise: Tensor | None) -> Tensor:
    """The gradients of an example's terms by all of its outputs, (n, draws x terms, ...)."""
    leaf = outputs.detach().requires_grad_()
    f = in_terms(function.problem, leaf, piece)
    gradients = gradients_of_terms(function, outputs, piece, noise)
    each = len(f) // len(outputs)
    columns = []
    for draw in gradients:
        for place in range(each):
            chosen = torch.zeros_like(f)
            chosen[place::each] = draw[place::each]
            columns.append(torch.autograd.grad(f, leaf, chosen, retain_graph=True)[0])
    return torch.stack(columns, dim=1)


def _squares(function: Functional, piece: Any, signs: Tensor, columns: Tensor) -> Tensor:
    """Σ_n Σ_c s_c (J_nᵀ u_c)², (P,) float64."""
    theta = tuple(tensor.detach() for tensor in function.theta)

    def one(example: Any, some: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        row = map_tensors(example, lambda leaf: leaf[None])
        pullback = torch.func.vjp(lambda *t: function.outputs(t, row)[0], *theta)[1]
        total = [torch.zeros_like(t, dtype=torch.float64) for t in theta]
        for column, weight in zip(some, weights, strict=True):
            squares = [weight * gradient.double().square() for gradient in pullback(column)]
            total = [before + more for before, more in zip(total, squares, strict=True)]
        return tuple(total)

    return function.flat(tuple(part.sum(0) for part in vmapped(one, piece, columns, signs)))
