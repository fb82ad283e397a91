"""Inner products and projections of blocks of rows, accumulated in float64.

The basis stays in the operator's dtype; only a window of columns is widened at a time, so a float32 basis
of 100 vectors does not need another 200 vectors' memory to be used exactly. Projections on a float32 basis and
norms multiply in float32 and add up pieces of 1,024 columns in float64: right to 1e-7 of a vector's length, as
the basis itself is, in a tenth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.operator import SymmetricOperator, full_precision
from hessdiag.spectral.basis import Rows

Basis = Tensor | Rows  # of a Lanczos run, (m, d) orthonormal

Array = NDArray[np.float64]

WINDOW = 1 << 17  # float64 elements widened at once: 1 MiB stays in the cache, 32 MiB took 1.5 times as long
LONG = 1 << 20  # numbers that are widened at once where a window is not needed for speed
SMALL = 8 * 1024  # columns that float32 may add up by itself: an optimal kernel keeps many partial sums
PIECE = 1024  # columns whose products are added up in float32
TWICE_BELOW = 0.5  # of a row's length
_ADDED: list[Callable[[Tensor], Tensor] | None] = []


@contextmanager
def vectors_of(op: SymmetricOperator) -> Iterator[None]:
    """Rows are vectors of this operator, of which ranks may hold a part each: sums over entries are over all."""
    _ADDED.append(op.added)
    try:
        yield
    finally:
        _ADDED.pop()


def _over_all(total: Tensor) -> Tensor:
    added = _ADDED[-1] if _ADDED else None
    return total if added is None else added(total)


def _lengths(own: Tensor) -> Tensor:
    """Of whole rows, from those of the parts."""
    return _over_all(own.square()).sqrt() if _ADDED and _ADDED[-1] is not None else own


def norms(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, (..., n, d) to (..., n) in float64."""
    whole = rows.shape[-1] // PIECE * PIECE
    if rows.dtype == torch.float64 or not whole:
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
        return _lengths(lengths)
    # float64 accumulators for every element take eight times as long
    pieces = torch.linalg.vector_norm(rows[..., :whole].reshape(*rows.shape[:-1], -1, PIECE), dim=-1)
    rest = torch.linalg.vector_norm(rows[..., whole:], dim=-1, keepdim=True)
    together: Tensor = torch.linalg.vector_norm(torch.cat([pieces, rest], dim=-1), dim=-1, dtype=torch.float64)
    return _lengths(together)


def read(*columns: Tensor) -> Array:
    """Columns of one length from a device, in one copy for which the host waits once, (columns, n) float64."""
    return torch.stack([column.reshape(-1).double() for column in columns]).cpu().numpy()


def project_out(work: Tensor, basis: Basis) -> Tensor:
    """Take the span of orthonormal rows ``basis`` out of ``work``, in place.

    A second pass where the first took more than half of a row's length: it leaves what the first pass's rounding
    put back ("twice is enough", Daniel et al. 1976, Giraud et al. 2005).

    Args:
        work: (n, d) or (b, n, d) in the basis's dtype, overwritten.
        basis: (m, d) or (b, m, d) orthonormal rows.

    Returns:
        The coefficients taken out, (..., n, m) in float64.
    """
    before = norms(work)
    total = _taken(work, basis)
    much = (norms(work) < TWICE_BELOW * before).any()
    if much.device.type != "cpu":  # a second pass that takes nothing costs less than to wait for the answer
        total += _taken(work, basis, much)
    elif much:
        total += _taken(work, basis)
    return total


class Continued(NamedTuple):
    """What is left of n products, and its numbers on the host, for which it waited once."""

    lengths: Array  # (n,) of the products
    alphas: Array  # (n,) parts along the vectors that were multiplied
    betas: Array  # (n,) lengths of what is left
    left: Tensor  # (n,) the same on the device
    taken: Tensor  # (..., n, m) parts along all rows, on the device
    total: float  # of the products, as `SymmetricOperator.require_finite` takes it


def continue_basis(work: Tensor, basis: Basis, total: Tensor, *, place: int = -1, near: bool = True) -> Continued:
    """`project_out` for ``work`` = H times a row of the basis, with the numbers that a Lanczos step needs.

    Such a product lies along the last two rows and the next one, to rounding: with those two taken out first, one
    pass over the whole basis is enough, except after a restart.

    Args:
        work: (1, d) or (n, 1, d), overwritten with what is left.
        basis: (m, d) or (n, m, d) orthonormal rows.
        total: sum of the products, to be read with the rest.
        place: of the row that was multiplied.
        near: whether to take the last two rows out first; ``place`` is then the last.
    """
    lengths = norms(work)
    first = _taken(work, basis[-2:] if isinstance(basis, Rows) else basis[..., -2:, :]) if near else None
    before = norms(work) if near else lengths
    taken = _taken(work, basis)
    left = norms(work)

    def alphas() -> Tensor:
        return taken[..., place] if first is None else taken[..., place] + first[..., -1]

    if not near and work.device.type != "cpu":  # as in `project_out`
        taken = taken + _taken(work, basis, (left < TWICE_BELOW * before).any())
        before = left = norms(work)
    found = read(lengths, alphas(), left, before, total.expand_as(left))
    if (found[2] < TWICE_BELOW * found[3]).any():
        taken = taken + _taken(work, basis)
        left = norms(work)
        found[1:3] = read(alphas(), left)
    if first is not None:
        taken[..., -first.shape[-1] :] += first
    return Continued(found[0], found[1], found[2], left.reshape(-1), taken, float(found[4, :1].sum()))


@full_precision()
def _taken(work: Tensor, basis: Basis, whether: Tensor | None = None) -> Tensor:
    coefficients = overlaps(work, basis)
    if whether is not None:
        coefficients *= whether
    if isinstance(basis, Rows):
        for part, rows in basis.parts():
            work[:, part].addmm_(coefficients.to(work.dtype), rows, alpha=-1)
        return coefficients
    subtract = work.addmm_ if work.dim() == 2 else work.baddbmm_
    subtract(coefficients.to(work.dtype), basis, alpha=-1)
    return coefficients


@full_precision()
def overlaps(a: Basis, b: Basis) -> Tensor:
    """Inner products of rows of one dtype, multiplied in it, pieces of `PIECE` columns added up in float64."""
    return _over_all(_overlaps(a, b))


def _overlaps(a: Basis, b: Basis) -> Tensor:
    if isinstance(b, Rows):
        total = torch.zeros((len(a), len(b)), dtype=torch.float64, device=b.device)
        for part, rows in b.parts():
            total += _overlaps(rows if a is b else a[:, part].contiguous(), rows)
        return total
    assert isinstance(a, Tensor)
    if b.dtype == torch.float64 or b.shape[-1] <= SMALL:
        return (a @ b.mT).double()
    if b.dim() > 2:  # pieces of one matrix are views, those of several are copies
        return torch.stack([_overlaps(x, y) for x, y in zip(a, b, strict=True)])
    whole = b.shape[-1] // PIECE * PIECE
    left, right = (x[:, :whole].view(len(x), -1, PIECE).transpose(0, 1) for x in (a, b))
    pieces: Tensor = left @ right.mT
    return pieces.sum(0, dtype=torch.float64) + (a[:, whole:] @ b[:, whole:].mT)


def rotate(basis: Basis, weights: Tensor, out: Tensor) -> None:
    """Write ``weights`` (n, m) times ``basis`` (m, d) into ``out`` (n, d), which may be rows of ``basis``."""
    if isinstance(basis, Rows):
        for part, rows in basis.parts():
            out[..., part] = (weights @ rows.double()).to(out.dtype)
        return
    for part in windows(basis):
        out[..., part] = (weights @ basis[..., part].double()).to(out.dtype)


def windows(basis: Tensor) -> Iterator[slice]:
    """Column slices of ``basis`` that are small enough to widen."""
    size = basis.shape[-1]
    vectors = max(1, basis.shape[:-1].numel())
    width = size if basis.dtype == torch.float64 else max(4096, WINDOW // vectors)
    for begin in range(0, size, max(1, width)):
        yield slice(begin, min(size, begin + width))


def combined(first: Tensor, other: Tensor, weight: float) -> Iterator[Tensor]:
    """Vectors ``first`` + weight · ``other`` in float64, in pieces: one where they are short."""
    for part, more in zip(torch.split(first, LONG), torch.split(other, LONG), strict=True):
        yield part.double() + weight * more.double()


def length_of(pieces: Iterator[Tensor]) -> float:
    """Euclidean norm of the vector in these pieces."""
    lengths = [float(torch.linalg.vector_norm(piece)) for piece in pieces]
    own = lengths[0] if len(lengths) == 1 else math.hypot(*lengths)
    return float(_lengths(torch.tensor([own], dtype=torch.float64))[0])


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row of ``a`` with the same row of ``b``, (n, d) twice to (n,) in float64."""
    total = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    for part in windows(b):
        total += (a[:, part].double() * b[:, part].double()).sum(dim=1)
    return _over_all(total)
