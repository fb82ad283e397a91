"""What a Lanczos run has found: an orthonormal basis, the projected matrix, and the recurrences behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator import SymmetricOperator
from hessdiag.resume import once
from hessdiag.spectral.basis import Rows, row
from hessdiag.spectral.inner import Basis, overlaps, rotate

Array = NDArray[np.float64]

BREAKDOWN = 4.0
"""Units of rounding, of ‖H‖, below which a residual is dropped. Rounding above that may be followed: it is a
direction like any other, and T is right to rounding there too. A higher limit drops directions: H = c I + Δuuᵀ
leaves Δ/√d after a step, which is 18 units for Δ/c = 1e-3 and d = 200,000 in float32."""


@dataclass
class Cycle:
    """The recurrence between two restarts: all that a certificate needs to know of a run.

    The cycle starts from Ritz vectors yᵢ with ``H yᵢ = thetas[i] yᵢ + sigmas[i] q`` (none in the first
    cycle) and a vector q; each step adds one ``alphas`` and one ``betas`` (the norm of what follows).

    Attributes:
        thetas: Ritz values kept by the restart before it.
        sigmas: how they couple to q.
        fresh: dimension of the complement from which q was drawn after a breakdown; 0 where q continues the run.
        alphas: diagonal of T.
        betas: norms of what each step left; after a breakdown of what was dropped, and at least its rounding.
    """

    thetas: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    fresh: int = 0
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, repr=False)
class Krylov:
    """An orthonormal basis Q and T = QᵀHQ with ``H Q = Q T + beta residual eₖᵀ``.

    Attributes:
        basis: (k, d) orthonormal rows in the operator's dtype.
        T: (k, k) float64; tridiagonal, after a restart an arrowhead followed by a tridiagonal.
        beta: norm of what leaves the subspace; 0.0 where nothing does.
        residual: (d,) the next basis vector, as it is held (`next` widens it); None where the basis is complete.
        cycles: the recurrences of the run, first cycle first.
        products: spent on the run.
        scale: the largest ‖Hq‖ met: at most ‖H‖, and the size to which rounding is relative.
        semidefinite: whether H is known to have no negative eigenvalue: Ritz values below zero are rounding.
        lost: norm of what the relation above misses because of how the basis is held (`hessdiag.spectral.basis`).
        whole: d, where ranks hold a part of every vector; None where all entries are here.
    """

    basis: Basis
    T: Array
    beta: float
    residual: Basis | None
    cycles: tuple[Cycle, ...]
    products: int
    scale: float
    semidefinite: bool = False
    lost: float = 0.0
    whole: int | None = None

    def __repr__(self) -> str:
        """Its size and its cost."""
        taken = len(self.basis)
        return f"<Krylov: {taken:,} of {self.dimension:,} dimensions, {self.products:,} products>"

    @property
    def dimension(self) -> int:
        """d, that of the matrix."""
        return int(self.basis.shape[1]) if self.whole is None else self.whole

    @property
    def size(self) -> int:
        """k, the dimension of the subspace."""
        return int(self.T.shape[0])

    @property
    def exhausted(self) -> bool:
        """Whether every direction is explored: T is H in another basis."""
        return self.residual is None

    @property
    def next(self) -> Tensor:
        """The residual as a vector (d,); only where there is one."""
        assert self.residual is not None
        vector: Tensor = self.residual[0] if isinstance(self.residual, Rows) else self.residual
        return vector

    @property
    def restarted(self) -> bool:
        """Whether vectors were let go: the basis is no longer the vectors that were multiplied."""
        return any(cycle.thetas for cycle in self.cycles)

    @property
    def breakdowns(self) -> int:
        """How often the run went on from a fresh random vector."""
        return sum(cycle.fresh > 0 for cycle in self.cycles)

    @property
    def smallest_part(self) -> int:
        """The fewest leading vectors that are a run of their own: no less than the last restart kept, and one."""
        return next((len(cycle.thetas) for cycle in reversed(self.cycles) if cycle.thetas), 0) + 1

    def floor(self, op: SymmetricOperator) -> float:
        """Rounding of one product, absolute: relative to ‖H‖ as far as it was met, in products and in values."""
        return op.floor * max(self.scale, float(np.abs(self.ritz_values).max()))

    def margin(self, op: SymmetricOperator) -> float:
        """Rounding of the run: T belongs to H + E with ‖E‖ at most this, residuals that were dropped included."""
        dropped = BREAKDOWN * torch.finfo(op.dtype).eps * self.scale
        return self.floor(op) * math.sqrt(self.size) + 2 * dropped * math.sqrt(self.breakdowns) + self.lost

    @property
    def alphas(self) -> tuple[float, ...]:
        """Diagonal of the first, unrestarted cycle."""
        return tuple(self.cycles[0].alphas)

    @property
    def betas(self) -> tuple[float, ...]:
        """Norms after each step of the first, unrestarted cycle; as many as ``alphas``."""
        return tuple(self.cycles[0].betas)

    @cached_property
    def ritz(self) -> tuple[Array, Array]:
        """Ritz values, ascending, and the eigenvectors of T as columns (k, k)."""
        values, vectors = np.linalg.eigh(self.T)
        return values.clip(min=0.0) if self.semidefinite else values, vectors

    @property
    def ritz_values(self) -> Array:
        """Eigenvalues of T, ascending, (k,)."""
        return self.ritz[0]

    @cached_property
    def orthogonality(self) -> float:
        """Largest entry of ``|Q Qᵀ − I|``; ghosts appear when it passes the square root of rounding."""
        products = overlaps(self.basis, self.basis)
        return float((products - torch.eye(self.size, dtype=torch.float64, device=products.device)).abs().max())

    def ritz_vectors(self, which: Sequence[int]) -> Tensor:
        """Unit Ritz vectors for the given positions in ``ritz_values``, (len, d) rows."""
        out = torch.empty((len(which), self.basis.shape[1]), dtype=self.basis.dtype, device=self.basis.device)
        weights = torch.from_numpy(self.ritz[1][:, list(which)].T.copy()).to(self.basis.device)
        rotate(self.basis, weights, out)
        return out

    def leading(self, size: int) -> Krylov:
        """The first ``size`` vectors as a run of their own (views, no copies).

        Raises:
            UsageError: ``size`` cuts through the Ritz vectors of the last restart, or is out of range.
        """
        if size == self.size:
            return self
        smallest = self.smallest_part
        if not smallest <= size < self.size:
            msg = f"leading({size}): it must be {smallest} to {self.size}, the size of the run"
            raise UsageError(msg)
        return Krylov(
            basis=self.basis[:size],
            T=self.T[:size, :size],
            beta=float(self.T[size, size - 1]),
            residual=row(self.basis, size),
            lost=self.lost,
            cycles=self.cycles,
            products=self.products,
            scale=self.scale,
            semidefinite=self.semidefinite,
            whole=self.whole,
        )


def whole(op: SymmetricOperator) -> Krylov:
    """H itself as a run that explored every direction: the unit vectors are its basis.

    Cost: d products; ``T`` is d x d in float64 on the host, so only for small d.
    """
    require_whole_vectors(op)
    dense = once(op, "every direction", op.dense).to("cpu", torch.float64)
    return Krylov(
        basis=torch.eye(op.size, dtype=op.dtype, device=op.device),
        T=((dense + dense.T) / 2).numpy(),
        beta=0.0,
        residual=None,
        cycles=(Cycle(),),
        products=op.size,
        scale=float(torch.linalg.vector_norm(dense, dim=1).max()),
        semidefinite=op.semidefinite,
    )


def require_whole_vectors(op: SymmetricOperator) -> None:
    """Refuse to explore every direction with vectors that ranks share.

    Raises:
        UsageError: they do.
    """
    if op.width != op.size:
        msg = f"`shard_vectors`: all {op.size:,} directions would be multiplied, which is for small matrices: "
        raise UsageError(msg + "leave it away")
