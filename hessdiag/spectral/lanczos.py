"""Lanczos with full reorthogonalization, bounded memory (thick restart) and honest breakdown.

A run satisfies ``H Q = Q T + beta q eₖᵀ`` to the rounding of the products. Full reorthogonalization keeps
ghosts away: copies of converged eigenvalues that pass every residual test (Paige 1971). When the basis is
full, Ritz vectors from both ends are kept and T becomes an arrowhead (Wu and Simon 2000).

Where nothing is left of a product (`BREAKDOWN`), the subspace is invariant, and one start vector has shown all
that it can: one eigenvector of each eigenvalue. Directions that it did not see are left, so the run goes on from
a fresh random vector of the complement, with a zero in T, until the products are spent or the basis is complete.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator import SymmetricOperator, as_operator
from hessdiag.resume import once
from hessdiag.spectral.basis import Rows, Storage, begin, hold, row
from hessdiag.spectral.inner import continue_basis, norms, project_out, rotate
from hessdiag.spectral.krylov import BREAKDOWN, Cycle, Krylov
from hessdiag.spectral.probes import sphere

Array = NDArray[np.float64]

SMALLEST_BASIS = 6  # two Ritz vectors at one end, one at the other, the residual, and room to step


class Lanczos:
    """A Lanczos run that grows one product at a time; `krylov` is what it has so far.

    Args:
        op: the operator.
        start: (d,) first vector, any length but zero.
        capacity: most basis vectors held; one row more is allocated for the residual.
        seed: names the stream of the fresh vectors after breakdowns.

    Attributes:
        exhausted: whether the basis is complete.
        faint: whether a residual was ever as small as the operator's own rounding.

    Raises:
        UsageError: a zero start, or room for fewer than ``SMALLEST_BASIS`` vectors where d is larger.
    """

    def __init__(
        self,
        op: SymmetricOperator,
        start: Tensor,
        capacity: int,
        seed: int = 0,
        storage: Storage | None = None,
    ) -> None:
        self.capacity = min(capacity, op.size)
        self.seed = seed
        length = float(norms(start[None])[0])
        if not length > 0:
            msg = "the start vector of a Lanczos run is zero: give one that is not, or none for a random one"
            raise UsageError(msg)
        self.op = op
        self.size = 0
        self.products = 0
        self.scale = 0.0
        self.beta = 0.0
        self.exhausted = False
        self.faint = False
        self.cycles = [Cycle()]
        self.T: Array = np.zeros((self.capacity, self.capacity))
        self._rows = (storage or Storage()).rows(self.capacity + 1, op.width, op.dtype, op.device)
        begin(self._rows, start, length)
        self.rounding = torch.finfo(op.dtype).eps

    def step(self) -> None:
        """Spend one product; nothing happens once the basis is complete."""
        if self.exhausted:
            return
        if self.size == self.capacity:
            self._restart()
        j = self.size
        alpha, self.beta, length = once(self.op, "step", partial(self._follow, j), place=self._rows[j + 1 : j + 2])
        self.products += 1
        self.scale = max(self.scale, length)
        self.T[j, j] = alpha
        self.size = j + 1
        self.cycles[-1].alphas.append(alpha)
        self.cycles[-1].betas.append(max(self.beta, self.rounding * self.scale))
        self.faint |= self.beta <= self.op.floor * self.scale
        if self.size == self.op.size:
            self.exhausted, self.beta = True, 0.0
        elif self.beta <= BREAKDOWN * self.rounding * self.scale:
            self._begin_afresh()
        elif self.size < self.capacity:
            self.T[j + 1, j] = self.T[j, j + 1] = self.beta

    def _follow(self, j: int) -> tuple[float, float, float]:
        """Put what follows vector j into the next row: its part along j, the rest, and the product's length."""
        work, total = self.op.multiplied(self._rows[j][None])
        found = continue_basis(work, self._rows[: j + 1], total)
        self.op.require_finite(found.total, work)
        if isinstance(self._rows, Rows):
            self._rows.account(found.taken[0, :j].cpu().numpy() - self.T[:j, j])
        beta = float(found.betas[0])
        if beta > 0:
            hold(self._rows, j + 1, work[0], beta)
        return float(found.alphas[0]), beta, float(found.lengths[0])

    def _begin_afresh(self) -> None:
        """Go on from a vector uniform on the sphere of the complement; what is left of the last one is dropped."""
        self.beta = 0.0
        number = sum(cycle.fresh > 0 for cycle in self.cycles)
        place = self._rows[self.size : self.size + 1]
        once(self.op, "fresh", partial(self._draw, number), place=place)
        self.cycles.append(Cycle(fresh=self.op.size - self.size))

    def _draw(self, number: int) -> None:
        fresh = sphere(self.op, self.seed, "fresh", number)[None]
        project_out(fresh, self._rows[: self.size])
        fresh /= float(norms(fresh)[0])
        project_out(fresh, self._rows[: self.size])  # little is left of it where the basis is almost complete
        hold(self._rows, self.size, fresh[0], float(norms(fresh)[0]))

    def ritz_values(self) -> Array:
        """Eigenvalues of T so far, ascending."""
        if len(self.cycles) == 1:
            cycle = self.cycles[0]
            return np.asarray(eigvalsh_tridiagonal(cycle.alphas, cycle.betas[:-1]))
        return np.asarray(np.linalg.eigvalsh(self.T[: self.size, : self.size]))

    def krylov(self) -> Krylov:
        """The run so far; its tensors are views of the run's memory."""
        k = self.size
        return Krylov(
            basis=self._rows[:k],
            T=self.T[:k, :k].copy(),
            beta=self.beta,
            residual=None if self.exhausted else row(self._rows, k),
            lost=self._rows.error if isinstance(self._rows, Rows) else 0.0,
            cycles=tuple(Cycle(c.thetas, c.sigmas, c.fresh, list(c.alphas), list(c.betas)) for c in self.cycles),
            products=self.products,
            scale=self.scale,
            semidefinite=self.op.semidefinite,
            whole=None if self.op.width == self.op.size else self.op.size,
        )

    def _restart(self) -> None:
        """Keep half the room for Ritz vectors, as many from each end: both extremes are wanted."""
        m = self.capacity
        top, bottom = (m // 2 + 1) // 2, m // 4
        values, vectors = np.linalg.eigh(self.T)
        kept = [*range(bottom), *range(m - top, m)]
        sigmas = self.beta * vectors[m - 1, kept]
        self.size = n = len(kept)
        form = partial(self._rotate, vectors[:, kept], values[kept])
        once(self.op, "restart", form, place=self._rows[: n + 1], anew=True)
        self.T[:] = 0.0
        self.T[range(n), range(n)] = values[kept]
        self.T[:n, n] = self.T[n, :n] = sigmas
        self.cycles.append(Cycle(tuple(values[kept].tolist()), tuple(sigmas.tolist())))

    def _rotate(self, vectors: Array, thetas: Array) -> None:
        m, n = vectors.shape
        weights = torch.from_numpy(vectors.T.copy()).to(self.op.device)
        if isinstance(self._rows, Rows):
            self._rows[:m].rotate(weights, [self.scale + abs(theta) for theta in thetas])
            self._rows.moved(m, n)
        else:
            rotate(self._rows[:m], weights, self._rows[:n])
            self._rows[n] = self._rows[m]


def lanczos(
    operator: Any,
    *,
    steps: int,
    start: Tensor | None = None,
    seed: int = 0,
    max_basis: int | None = None,
    storage: Storage | None = None,
) -> Krylov:
    """Run ``steps`` steps of Lanczos, fewer if they cover every direction.

    Args:
        operator: anything `as_operator` takes; H, d x d.
        steps: products to spend, at least 1; fewer where the operator says stop.
        start: (d,) first vector; None draws it uniformly on the sphere.
        seed: names the streams of the random start, and of those after breakdowns.
        max_basis: most vectors held; None holds all. Memory: (max_basis + 1) d numbers.
        storage: how they are held; None: in the operator's dtype, on its device.

    Raises:
        UsageError: no step, a zero start, or a basis of fewer than ``SMALLEST_BASIS`` vectors.

    >>> import hessdiag, torch
    >>> hessdiag.lanczos(torch.diag(torch.arange(100.0)), steps=5)
    <Krylov: 5 of 100 dimensions, 5 products>
    """
    op = as_operator(operator)
    first = sphere(op, seed, "lanczos", 0) if start is None else start
    run = Lanczos(op, first, basis_size(op, steps, max_basis), seed, storage)
    for _ in range(steps):
        run.step()
        if op.stopped:
            break
    return run.krylov()


def basis_size(op: SymmetricOperator, steps: int, max_basis: int | None) -> int:
    """The basis a run of ``steps`` needs or may have.

    Raises:
        UsageError: no step, or a basis of fewer than ``SMALLEST_BASIS`` vectors.
    """
    if steps < 1:
        msg = f"steps={steps}: a Lanczos run needs at least 1"
        raise UsageError(msg)
    room = steps if max_basis is None else min(steps, max_basis)
    if room < min(SMALLEST_BASIS, steps, op.size):
        msg = f"max_basis={max_basis}: a restarted run needs at least {SMALLEST_BASIS}"
        raise UsageError(msg)
    return room
