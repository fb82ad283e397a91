"""Krylov-aware deflation: probes only see what the Lanczos run has not explained (Chen and Hallman 2023).

With HQ = QT + βqeₖᵀ, P = I − QQᵀ and z a vector of random signs, drawn after the run:

    tr H  = tr T + E[(Pz)ᵀH(Pz)]          tr H² = ‖T‖²_F + 2β² + E‖PHPz‖²

Both are unbiased given Q since E zzᵀ = I, and only the bulk is left to vary. Signs have the least variance of
all probes with independent entries (Hutchinson 1989): 2(‖PHP‖²_F − Σ (PHP)ᵢᵢ²); a vector uniform on the sphere of
the complement keeps the diagonal in. A Lanczos run on H from a start that is not of unit length has no mass of
one, so the density's starts are on that sphere (`unit_probes`): tr f(H) = tr QᵀfQ + (d−k) E[uᵀf(H)u].

The probes here are w = Pz/√(d−k): of length 1 on average, and as u they count (d − k) times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.errors import BudgetError
from hessdiag.operator import SymmetricOperator
from hessdiag.results.interval import PILOT, enough
from hessdiag.resume import once
from hessdiag.spectral.inner import WINDOW, dots, norms, overlaps, project_out, read
from hessdiag.spectral.krylov import Krylov, require_whole_vectors
from hessdiag.spectral.probes import rademacher, sphere

Array = NDArray[np.float64]

FEWEST = 2  # probes before an early end: one has no standard error

STREAM = "forms"
"""Name of the probes' stream; trace and Frobenius norm draw the same probes from it and share them."""


@dataclass(frozen=True, kw_only=True)
class Forms:
    """Quadratic forms of probes, as unbiased values.

    Attributes:
        trace: (n,) each an unbiased value of tr H; one exact value where ``exact``.
        squares: (n,) each an unbiased value of tr H².
        dimension: d.
        known_squares: the part of tr H² that the run knows; a lower limit of the whole.
        known: k, the directions explained without probes.
        products: spent on the probes and on the run that deflated them.
        floor: relative rounding of a product.
        exact: whether every direction was explored, so that nothing is random.
        seed: of the probes.
        dtype: of the products.
    """

    trace: Array
    squares: Array
    known_squares: float
    dimension: int
    known: int
    products: int
    floor: float
    exact: bool
    seed: int
    dtype: str

    @property
    def method(self) -> str:
        """In words, for the provenance."""
        if self.exact:
            return "every direction"
        return f"Hutchinson, {self.known} directions deflated" if self.known else "Hutchinson"


def forms(
    op: SymmetricOperator,
    krylov: Krylov | None,
    probes: int,
    seed: int,
    *,
    quantity: str = STREAM,
    first: int = 0,
    on_block: Callable[[Forms], None] | None = None,
) -> Forms:
    """Unbiased values of tr H and tr H² from the same products, one pair per probe.

    Args:
        op: H, d x d.
        krylov: the run to deflate with; None for none.
        probes: products to spend; where they cover the complement, a basis of it makes the result exact.
        seed: names the stream.
        quantity: names the stream.
        first: index of the first probe: probes before it were spent elsewhere.
        on_block: called with the forms so far after each block of products.

    Raises:
        BudgetError: no probe at all while directions are left.
    """
    known = krylov.size if krylov is not None else 0
    left = op.size - known
    if probes < 1 and left > 0:
        msg = f"probes={probes}: at least 1 is needed, 2 for a standard error"
        raise BudgetError(msg)
    exact = probes >= left and first == 0 and op.left >= left
    indices = range(first, first + probes)
    blocks = _basis(op, krylov, seed, quantity) if exact else _drawn(op, krylov, seed, quantity, indices, _signs)
    values = np.zeros((2, 0))
    for block in blocks:
        some = block if exact else block[: op.granted(len(block), max(FEWEST - values.shape[1], 0))]
        if not len(some):
            break
        values = np.concatenate(
            [values, once(op, f"{len(some)} probes", partial(_multiplied, op, krylov, some))], axis=1
        )
        if on_block is not None and not exact and values.shape[1] >= FEWEST:
            on_block(from_values(op, krylov, *values, seed=seed, exact=False, spent=values.shape[1]))
        if len(some) < len(block):
            break
    spent = values.shape[1]
    values = values.sum(axis=1, keepdims=True) if exact else values
    return from_values(op, krylov, *values, seed=seed, exact=exact, spent=spent)


def forms_to(op: SymmetricOperator, krylov: Krylov | None, probes: int, seed: int, rtol: float | None) -> Forms:
    """As many `forms` as the trace needs for a relative standard error of ``rtol``, with ``probes`` at most.

    Without ``rtol`` all of them; with it eight products of a stream of their own say how many (`enough`), where
    that leaves room for as many more.
    """
    left = op.size - (krylov.size if krylov is not None else 0)
    if rtol is None or probes <= 2 * PILOT or probes >= left:
        return forms(op, krylov, probes, seed)
    pilot = forms(op, krylov, PILOT, seed, quantity="pilot").trace
    number = enough(pilot, rtol * abs(float(pilot.mean())), probes - PILOT)
    values = forms(op, krylov, number, seed)
    return replace(values, products=values.products + PILOT)


def from_values(
    op: SymmetricOperator,
    krylov: Krylov | None,
    traces: Array,
    squares: Array,
    *,
    seed: int,
    exact: bool,
    spent: int,
) -> Forms:
    """`Forms` from wᵀHw and ‖PHw‖² of probes that count d − k times (or sums over a basis, where ``exact``)."""
    known = krylov.size if krylov is not None else 0
    trace, square = (float(np.trace(krylov.T)), _norm_squared(krylov)) if krylov is not None else (0.0, 0.0)
    factor = 1 if exact else op.size - known
    return Forms(
        trace=trace + factor * traces,
        squares=square + factor * squares,
        known_squares=square,
        dimension=op.size,
        known=known,
        products=spent + (krylov.products if krylov is not None else 0),
        floor=op.floor,
        exact=exact,
        seed=seed,
        dtype=str(op.dtype).removeprefix("torch."),
    )


def _multiplied(op: SymmetricOperator, krylov: Krylov | None, block: Tensor) -> Array:
    """wᵀHw and ‖PHw‖² of rows w of the complement, (2, n)."""
    images, total = op.multiplied(block)
    squares = norms(images).square()
    if krylov is not None:
        squares = squares - overlaps(images, krylov.basis).square().sum(dim=1)
    found = read(dots(block, images), squares.clamp(min=0), total.expand_as(squares))
    op.require_finite(float(found[2, 0]), images)
    return found[:2]


def unit_probes(
    op: SymmetricOperator, krylov: Krylov | None, probes: int, seed: int, quantity: str
) -> Iterator[Tensor]:
    """Unit probes from the complement of the run, in blocks (n, d) of at most ``op.block``: starts of runs.

    Uniform on its sphere, without a run signs over √d. Where ``probes`` covers the complement they are an
    orthonormal basis of it instead.
    """
    if probes >= op.size - (krylov.size if krylov is not None else 0):
        return _basis(op, krylov, seed, quantity)
    return _drawn(op, krylov, seed, quantity, range(probes), _signs if krylov is None else _on_the_sphere)


Draw = Callable[[SymmetricOperator, Krylov | None, int, str, range], Tensor]


def _drawn(
    op: SymmetricOperator, krylov: Krylov | None, seed: int, quantity: str, indices: range, draw: Draw
) -> Iterator[Tensor]:
    # Small probes are projected together, large ones one by one: float64 copies of a block can be gigabytes.
    group = max(1, min(op.block, WINDOW // op.size))
    for begin in range(0, len(indices), op.block):
        chosen = indices[begin : begin + op.block]
        parts = [draw(op, krylov, seed, quantity, chosen[i : i + group]) for i in range(0, len(chosen), group)]
        yield torch.cat(parts)


def _signs(op: SymmetricOperator, krylov: Krylov | None, seed: int, quantity: str, indices: range) -> Tensor:
    signs = torch.stack([rademacher(op, seed, quantity, i) for i in indices])
    if krylov is None:
        return signs.div_(math.sqrt(op.size))
    project_out(signs, krylov.basis)
    return signs.div_(math.sqrt(op.size - krylov.size))


def _on_the_sphere(
    op: SymmetricOperator, krylov: Krylov | None, seed: int, quantity: str, indices: range
) -> Tensor:
    work = torch.stack([sphere(op, seed, quantity, i) for i in indices])
    if krylov is not None:
        project_out(work, krylov.basis)
    return work.div_(norms(work)[:, None].to(op.dtype))


def _basis(op: SymmetricOperator, krylov: Krylov | None, seed: int, quantity: str) -> Iterator[Tensor]:
    yield from torch.split(_complement(op, krylov, seed, quantity), op.block)


def _complement(op: SymmetricOperator, krylov: Krylov | None, seed: int, quantity: str) -> Tensor:
    """An orthonormal basis of what the run has not explored, (d − k, d); only for small d − k."""
    require_whole_vectors(op)
    if krylov is None:
        return torch.eye(op.size, dtype=op.dtype, device=op.device)
    left = op.size - krylov.size
    if left == 0:
        return torch.empty((0, op.size), dtype=op.dtype, device=op.device)
    known = krylov.basis.double()
    work = torch.stack([sphere(op, seed, quantity, i).double() for i in range(left)])
    project_out(work, known)
    basis = torch.linalg.qr(work.T).Q.T.contiguous()
    project_out(basis, known)
    again: Tensor = torch.linalg.qr(basis.T).Q.T
    return again.to(op.dtype).contiguous()


def _norm_squared(krylov: Krylov) -> float:
    return float(np.square(krylov.T).sum()) + 2 * krylov.beta**2
