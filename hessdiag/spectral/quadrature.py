"""Gauss and Gauss-Radau quadrature from Lanczos coefficients (Golub and Welsch 1969; Golub and Meurant 2010).

The Lanczos run of a unit vector u is the Jacobi matrix of its spectral measure, tr-weighted by (u·uᵢ)². Gauss
nodes and weights give uᵀf(H)u; Radau with a node fixed at a brackets the measure of (−∞, a) rigorously:
by Chebyshev, Markov and Stieltjes it lies between the weights below a and those up to a.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, eigh_tridiagonal, solve_banded
from torch import Tensor

from hessdiag.operator import SymmetricOperator
from hessdiag.spectral.inner import continue_basis, norms, project_out

Array = NDArray[np.float64]
Rule = tuple[Array, Array]  # nodes and weights

RUNAWAY = 1e10  # a Radau coefficient beyond this share of the spectrum stands for a node at infinity


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
    n, limit = starts.shape[0], min(steps, op.size)
    alphas, betas = np.zeros((n, limit)), np.zeros((n, limit))
    lengths = np.full(n, limit)
    kept = limit if reorthogonalize else 2
    basis = torch.empty((n, kept, op.size), dtype=op.dtype, device=op.device)
    basis[:, 0] = starts / norms(starts)[:, None].to(op.dtype)
    scale = np.zeros(n)
    breakdown = 4 * max(op.floor, 16 * torch.finfo(op.dtype).eps)
    alive = np.arange(n)
    for j in range(limit):
        # The whole basis so far, or just its last two vectors: the three-term recurrence.
        seen = (basis if len(alive) == n else basis[torch.from_numpy(alive)])[:, : min(j + 1, kept)]
        work = torch.cat([op.rows(part) for part in torch.split(seen[:, j % kept], op.block)])
        scale[alive] = np.maximum(scale[alive], norms(work).cpu().numpy())
        taken = continue_basis(work[:, None], seen) if reorthogonalize else project_out(work[:, None], seen)
        alphas[alive, j] = taken[:, 0, j % kept].cpu().numpy()
        length = norms(work)
        left = length.cpu().numpy()
        ended = (left <= breakdown * scale[alive]) | (j + 1 == op.size)
        betas[alive, j] = np.where(ended, 0.0, left)
        lengths[alive[ended]] = j + 1
        going = np.flatnonzero(~ended)
        alive = alive[going]
        if not len(alive):
            break
        if j + 1 < limit and op.left < len(alive):
            lengths[alive] = limit = j + 1
            break
        if j + 1 < limit:
            work.div_(length[:, None].to(op.dtype))
            basis[torch.from_numpy(alive), (j + 1) % kept] = work if len(going) == len(work) else work[going]
    return alphas[:, :limit], betas[:, :limit], lengths


def gauss(alphas: Array, betas: Array) -> tuple[Array, Array]:
    """Nodes, ascending, and weights summing to 1, of the Jacobi matrix with diagonal ``alphas`` (m,).

    Args:
        alphas: (m,).
        betas: off-diagonal, (m − 1,).
    """
    if len(alphas) == 1:
        return alphas.copy(), np.ones(1)
    nodes, vectors = eigh_tridiagonal(alphas, betas)
    return nodes, vectors[0] ** 2


def without(rule: Rule, values: Array) -> Rule:
    """A rule without the nodes that stand for ``values``, of mass 1."""
    nodes, weights = rule
    rest = np.ones(len(nodes), dtype=bool)
    for value in values:
        if rest.any():
            rest[np.argmin(np.where(rest, np.abs(nodes - value), np.inf))] = False
    total = float(weights[rest].sum())
    return nodes[rest], weights[rest] / total if total > 0 else weights[rest]


def average(first: Rule, second: Rule) -> Rule:
    """The mean of two rules: the nodes of both, ascending, each with half its weight."""
    if first is second:
        return first
    nodes = np.concatenate([first[0], second[0]])
    order = np.argsort(nodes)
    return nodes[order], np.concatenate([first[1], second[1]])[order] / 2


def share_below(alphas: Array, betas: Array, a: float, *, closed: bool) -> float:
    """A rigorous limit on the share of the measure below ``a``: at least (or, ``closed``, at most) this much.

    Args:
        alphas: (m,) of a run; m = 0 says nothing.
        betas: (m,) norms after each step; a last 0 means the quadrature is exact.
        a: where the measure is cut.
        closed: count the weight at ``a`` itself: the upper limit; else leave it out: the lower limit.
    """
    if not len(alphas):
        return float(closed)
    nodes, weights, fixed = _radau(alphas, betas, a)
    below = nodes < a
    if fixed is not None:
        below[fixed] = closed
    return float(min(weights[below].sum(), 1.0))


def _radau(alphas: Array, betas: Array, a: float) -> tuple[Array, Array, int | None]:
    """Radau nodes and weights with one node at ``a``, and its position (None: the rule is exact without it)."""
    m = len(alphas)
    if betas[-1] == 0:
        nodes, weights = gauss(alphas, betas[:-1])
        return nodes, weights, None
    banded = np.zeros((3, m))
    banded[0, 1:] = banded[2, :-1] = betas[:-1]
    banded[1] = alphas - a
    right = np.zeros(m)
    right[-1] = betas[-1] ** 2
    size = float(np.abs(alphas).max() + 2 * np.abs(betas).max())
    try:
        last = a + float(solve_banded((1, 1), banded, right)[-1])
    except LinAlgError:
        last = np.inf
    if not abs(last) < RUNAWAY * size:
        nodes, weights = gauss(alphas, betas[:-1])  # a is a Gauss node already, to rounding
    else:
        nodes, weights = gauss(np.append(alphas, last), betas)
    return nodes, weights, int(np.argmin(np.abs(nodes - a)))
