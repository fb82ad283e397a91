"""Lanczos runs of several starts side by side."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.operator import SymmetricOperator
from hessdiag.spectral.inner import continue_basis, norms, vectors_of

Array = NDArray[np.float64]


def lanczos_block(
    op: SymmetricOperator, starts: Tensor, steps: int, *, reorthogonalize: bool = True
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Independent Lanczos runs in lockstep, so that their products travel in blocks.

    Args:
        op: H, d x d.
        starts: (n, d) rows, any length but zero.
        steps: products per run.
        reorthogonalize: keep and use every run's basis, n · steps · d numbers; else the three-term recurrence,
            whose ghosts split weights but move no mass (Greenbaum 1989).

    Returns:
        alphas (n, m), betas (n, m) and lengths (n,): run i has ``lengths[i]`` steps; ``betas[i, j]`` is the norm
        left after step j, 0 where its subspace became invariant. Cost: n · steps products, fewer after breakdown
        and where the operator says stop.
    """
    with vectors_of(op):
        return _lanczos_block(op, starts, steps, reorthogonalize=reorthogonalize)


def _lanczos_block(
    op: SymmetricOperator, starts: Tensor, steps: int, *, reorthogonalize: bool
) -> tuple[Array, Array, NDArray[np.int64]]:
    n, limit = starts.shape[0], min(steps, op.size)
    alphas, betas = np.zeros((n, limit)), np.zeros((n, limit))
    lengths = np.full(n, limit)
    kept = limit if reorthogonalize else 2
    basis = torch.empty((n, kept, op.width), dtype=op.dtype, device=op.device)
    basis[:, 0] = starts / norms(starts)[:, None].to(op.dtype)
    scale = np.zeros(n)
    breakdown = 4 * max(op.floor, 16 * torch.finfo(op.dtype).eps)
    alive = np.arange(n)
    for j in range(limit):
        # The whole basis so far, or just its last two vectors: the three-term recurrence.
        seen = (basis if len(alive) == n else basis[torch.from_numpy(alive)])[:, : min(j + 1, kept)]
        parts, totals = zip(*map(op.multiplied, torch.split(seen[:, j % kept], op.block)), strict=True)
        work = torch.cat(parts)
        found = continue_basis(work[:, None], seen, sum(totals), place=j % kept, near=reorthogonalize)
        op.require_finite(found.total, work)
        scale[alive] = np.maximum(scale[alive], found.lengths)
        alphas[alive, j] = found.alphas
        ended = (found.betas <= breakdown * scale[alive]) | (j + 1 == op.size)
        betas[alive, j] = np.where(ended, 0.0, found.betas)
        lengths[alive[ended]] = j + 1
        going = np.flatnonzero(~ended)
        alive = alive[going]
        if not len(alive):
            break
        if j + 1 < limit and op.left < len(alive):
            lengths[alive] = limit = j + 1
            break
        if j + 1 < limit:
            work.div_(found.left[:, None].to(op.dtype))
            follow = basis[:, (j + 1) % kept]
            if len(alive) == n:
                follow.copy_(work)
            else:
                follow[torch.from_numpy(alive)] = work if len(going) == len(work) else work[going]
    return alphas[:, :limit], betas[:, :limit], lengths
