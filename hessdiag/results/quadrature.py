"""Gauss and Gauss-Radau quadrature from Lanczos coefficients (Golub and Welsch 1969; Golub and Meurant 2010).

The Lanczos run of a unit vector u is the Jacobi matrix of its spectral measure, tr-weighted by (u·uᵢ)². Gauss
nodes and weights give uᵀf(H)u; Radau with a node fixed at a brackets the measure of (−∞, a) rigorously:
by Chebyshev, Markov and Stieltjes it lies between the weights below a and those up to a.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, eigh_tridiagonal, solve_banded

Array = NDArray[np.float64]
Rule = tuple[Array, Array]  # nodes and weights

RUNAWAY = 1e10  # a Radau coefficient beyond this share of the spectrum stands for a node at infinity


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
