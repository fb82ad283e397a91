"""Several eigenpairs, and a proof that none is missing: Lanczos runs on what the pairs found so far leave.

One Lanczos run shows one vector of each eigenvalue, however often it occurs. So after the wanted pairs Q of a
first run, another run starts in their complement (P = I − QQᵀ, from a fresh random vector): it either finds a
value that belongs among the wanted ones, which joins them, or its certificate says that PHP has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor

from hessdiag.operator import SymmetricOperator
from hessdiag.spectral.certificate import certificate
from hessdiag.spectral.inner import norms, overlaps, project_out, rotate
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.lanczos import Lanczos
from hessdiag.spectral.probes import sphere

Array = NDArray[np.float64]

LOST = 0.5  # of a Ritz vector's length: with more of it inside the known space it is no new vector


class Complement(SymmetricOperator):
    """PHP for P = I − QQᵀ; a product costs one of H."""

    def __init__(self, op: SymmetricOperator, basis: Tensor) -> None:
        super().__init__(op.size, dtype=op.dtype, device=op.device, layout=op.layout, shapes=op.shapes)
        self.op, self.basis, self.floor, self.block, self.room = op, basis, op.floor, op.block, op.room

    def multiply(self, rows: Tensor) -> Tensor:
        """Products of the operator between projections away from the basis: P H P."""
        if not len(self.basis):
            return self.op.rows(rows)
        inside = rows.clone()
        project_out(inside, self.basis)
        image = self.op.rows(inside)
        project_out(image, self.basis)
        return image


@dataclass
class Subspace:
    """Ritz pairs by fresh products, and what is known of the complement.

    Attributes:
        op: H, d x d.
        vectors: (m, d) unit rows y.
        images: (m, d) their products Hy.
        values: (m,) float64, θ = y·Hy, ascending.
        lower: no eigenvalue of PHP lies below; ``upper``: none above.
        scale: the largest ‖Hq‖ met.
    """

    op: SymmetricOperator
    vectors: Tensor
    images: Tensor
    values: Array = field(default_factory=lambda: np.zeros(0))
    lower: float = -math.inf
    upper: float = math.inf
    scale: float = 0.0

    @classmethod
    def empty(cls, op: SymmetricOperator) -> Subspace:
        """No pair yet."""
        nothing = torch.empty((0, op.size), dtype=op.dtype, device=op.device)
        return cls(op, nothing, nothing)

    def add(self, rows: Tensor) -> None:
        """Take unit rows in, with a fresh product each, and turn all into Ritz pairs."""
        if len(self.vectors):
            project_out(rows, self.vectors)
            kept = norms(rows) > LOST
            rows = rows[kept]
        rows = torch.linalg.qr(rows.T.double()).Q.T.to(self.op.dtype).contiguous()
        images = [self.op.rows(part) for part in torch.split(rows, self.op.block)] if len(rows) else []
        vectors, products = torch.cat([self.vectors, rows]), torch.cat([self.images, *images])
        projected = overlaps(vectors, products).cpu().numpy()
        # generalized, since rows of single precision are orthonormal to 1e-7 only
        self.values, turn = eigh((projected + projected.T) / 2, overlaps(vectors, vectors).cpu().numpy())
        weights = torch.from_numpy(turn.T.copy()).to(vectors.device)
        self.vectors, self.images = torch.empty_like(vectors), torch.empty_like(products)
        rotate(vectors, weights, self.vectors)
        rotate(products, weights, self.images)
        self.scale = max(self.scale, float(norms(self.images).max()))

    @property
    def residuals(self) -> Tensor:
        """Hy − θy, (m, d)."""
        return self.images - torch.from_numpy(self.values).to(self.vectors)[:, None] * self.vectors

    def coupling(self) -> float:
        """‖PHQ‖: how far the pairs' space is from an invariant one."""
        rows = self.residuals
        return math.sqrt(max(float(torch.linalg.eigvalsh(overlaps(rows, rows))[-1]), 0.0))


@dataclass(frozen=True)
class Search:
    """What is looked for.

    Attributes:
        number: k.
        which: "LA", "SA" or "LM".
        rtol: residual of a wanted pair, of the spectral radius; and how far a missing value may reach beyond them.
        failure: probability, per side, that the certificate is wrong.
        most: products to spend at most.
        capacity: most basis vectors of a run.
        seed: names the streams of the starts.
    """

    number: int
    which: str
    rtol: float
    failure: float
    most: int
    capacity: int
    seed: int

    def rank(self, values: Array) -> Array:
        """What the wanted values have most of."""
        return {"LA": values, "SA": -values, "LM": np.abs(values)}[self.which]

    def best(self, values: Array) -> NDArray[np.int64]:
        """Positions of the wanted values among these, first one first; fewer where there are fewer."""
        return np.argsort(-self.rank(values), kind="stable")[: self.number]

    def ends(self) -> tuple[int, ...]:
        """Signs of the sides that a missing value could lie on."""
        return {"LA": (1,), "SA": (-1,), "LM": (1, -1)}[self.which]


def search(op: SymmetricOperator, wanted: Search) -> tuple[Subspace, bool]:
    """Run after run, until nothing can be missing or the products are spent.

    Returns:
        The pairs, and whether everything asked for is certified.
    """
    known, begin, number = Subspace.empty(op), op.products, 0
    while True:
        left = wanted.most - (op.products - begin) - wanted.number
        if number and (left < 1 or op.stopped):
            return known, False
        krylov, done = _run(known, wanted, number, left)
        number += 1
        if done:
            return known, True
        fresh = _joining(known, krylov, wanted)
        if len(fresh):
            known.add(krylov.ritz_vectors(fresh))


def _run(known: Subspace, wanted: Search, number: int, most: int) -> tuple[Krylov, bool]:
    """One run in the complement: until values that join have converged, or none can be missing."""
    op = Complement(known.op, known.vectors)
    start = sphere(op, wanted.seed, "eigenpairs", number)[None]
    if len(known.vectors):
        project_out(start, known.vectors)
    run = Lanczos(op, start[0], min(wanted.capacity, most), wanted.seed)
    failure, next_look = wanted.failure / 2 ** (number + 1), 2
    for step in range(1, most + 1):
        run.step()
        last = step == most or run.exhausted or op.stopped
        if step < next_look and not last:
            continue
        next_look = step + max(2, step // 8)
        krylov = run.krylov()
        known.scale = max(known.scale, krylov.scale)
        joining = _joining(known, krylov, wanted)
        allowed = wanted.rtol * known.scale
        if not joining and len(known.values) >= wanted.number:
            _certify(known, krylov, wanted.ends(), failure)
            if _beyond(known, wanted) <= allowed:
                return krylov, True
        elif len(known.values) + krylov.size >= wanted.number and _settled(krylov, joining, allowed):
            break
        if last:
            _certify(known, krylov, wanted.ends(), failure)
            break
    return run.krylov(), False


def _joining(known: Subspace, krylov: Krylov, wanted: Search) -> list[int]:
    """Positions of the run's Ritz values that belong among the wanted ones, clearly beyond the last known."""
    together = np.concatenate([known.values, krylov.ritz_values])
    places = [int(i) - len(known.values) for i in wanted.best(together) if i >= len(known.values)]
    if len(known.values) < wanted.number:
        return places
    last = wanted.rank(known.values)[wanted.best(known.values)[-1]]
    slack = wanted.rtol * known.scale
    return [place for place in places if wanted.rank(krylov.ritz_values[[place]])[0] > last + slack]


def _settled(krylov: Krylov, places: Sequence[int], allowed: float) -> bool:
    return float(krylov.beta * np.abs(krylov.ritz[1][-1, list(places)]).max()) <= allowed


def _certify(known: Subspace, krylov: Krylov, ends: Sequence[int], failure: float) -> None:
    """Narrow the limits of the complement: what holds for it holds when further pairs leave it."""
    dimension = known.op.size - len(known.vectors)
    for sign in ends:
        ritz = float(krylov.ritz_values[-1 if sign > 0 else 0])
        bound = certificate(krylov.cycles, ritz, sign, dimension=dimension, failure=failure)
        if sign > 0:
            known.upper = min(known.upper, bound)
        else:
            known.lower = max(known.lower, bound)


def _beyond(known: Subspace, wanted: Search) -> float:
    """How far a missing value may reach beyond the last of the wanted ones."""
    last = wanted.rank(known.values)[wanted.best(known.values)[-1]]
    return max(sign * (known.upper if sign > 0 else known.lower) for sign in wanted.ends()) - float(last)
