"""The largest or smallest eigenvalues with their vectors: verified one by one, and certified to be all of them.

How they are found is in `hessdiag.spectral.subspace`, what is said of them in `hessdiag.spectral.ranked`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np

from hessdiag.engine.products.memory import free_bytes
from hessdiag.errors import UsageError
from hessdiag.operator import SymmetricOperator, as_operator
from hessdiag.results import Provenance
from hessdiag.spectral.extremes import FAILURE
from hessdiag.spectral.krylov import whole as every_direction
from hessdiag.spectral.ranked import Eigenpairs, ranked
from hessdiag.spectral.subspace import Search, Subspace, search

Which = Literal["LA", "SA", "LM"]

PRODUCTS, MORE = 160, 20
"""Most products: 160 as for the extremes, and 20 for each pair. Of the demo network 5 take 27, 20 take 88."""
SHARE = 0.5  # of the free memory, for the vectors


def eigenpairs(
    operator: Any,
    k: int = 5,
    *,
    which: Which = "LA",
    rtol: float = 1e-3,
    seed: int = 0,
    max_products: int | None = None,
    max_basis: int | None = None,
    failure: float = FAILURE,
) -> Eigenpairs:
    """Find k eigenvalues of an operator with their vectors, and certify that none is missing.

    Args:
        operator: anything `as_operator` takes; H, d x d.
        k: how many.
        which: "LA" the largest, "SA" the smallest, "LM" those of largest |λ|, as SciPy names them.
        rtol: residual of a pair, relative to the spectral radius, and how far a value that was missed may reach
            beyond the last (1e-3, as for the extremes). Values are then right to about its square over the gaps.
        seed: names the streams of the random starts.
        max_products: to spend at most; None: 160 and 20 for each pair. What is missing then is a warning.
        max_basis: most vectors of a run, at least 4 k + 6; None: as many as half of the free memory holds.
        failure: probability, per side, that the certificate is wrong.

    Returns:
        Eigenpairs. Cost on the demo network: 27 products for 5 pairs, 88 for 20. Where d is no more than
            ``max_products``, d products and k fresh ones: every eigenvalue is known.

    Raises:
        UsageError: ``k`` outside 1 to d, more vectors than the memory or ``max_products`` allows, or an argument
            outside what is allowed here.

    Example:
        >>> import torch, hessdiag
        >>> pairs = hessdiag.eigenpairs(torch.diag(torch.tensor([3.0, 2.0, 2.0, -5.0])), k=3)
        >>> [round(float(value), 4) for value in pairs.values], pairs.clusters
        ([3.0, 2.0, 2.0], ((1, 2),))
    """
    op = as_operator(operator)
    most = PRODUCTS + MORE * k if max_products is None else max_products
    _require(op, k, which, rtol, failure, most)
    before, whole = op.products, op.size <= most
    capacity = op.size if whole else _capacity(op, k, most, max_basis)
    wanted = Search(k, which, rtol, failure, most, capacity, seed)
    found, settled = (_all(op, wanted), True) if whole else search(op, wanted)
    settings = {"k": k, "which": which, "rtol": rtol, "seed": seed, "max_products": most, "failure": failure}
    provenance = Provenance(
        method="every direction" if whole else "Lanczos in the complement of the pairs found",
        settings=settings,
        products=op.products - before,
        dtype=str(op.dtype).removeprefix("torch."),
    )
    return ranked(found, wanted, provenance, whole=whole, settled=settled)


def _require(op: SymmetricOperator, k: int, which: str, rtol: float, failure: float, most: int) -> None:
    if not 1 <= k <= op.size:
        msg = f"k={k}: this operator has {op.size:,} eigenvalues, 1 to {op.size:,} can be asked for"
        raise UsageError(msg)
    if which not in get_args(Which):
        msg = f"which={which!r}: must be 'LA' (largest), 'SA' (smallest) or 'LM' (largest |λ|)"
        raise UsageError(msg)
    if not (0 < rtol < 1 and 0 < failure < 1):
        msg = f"rtol={rtol}, failure={failure}: each must lie between 0 and 1"
        raise UsageError(msg)
    if op.size > most < 2 * k + 10:
        msg = f"k={k} within max_products={most}: at least 2 k + 10 = {2 * k + 10} are needed"
        raise UsageError(msg)


def _capacity(op: SymmetricOperator, k: int, most: int, max_basis: int | None) -> int:
    """Basis vectors of a run; beside them 2 k are held."""
    least = min(4 * k + 6, most)
    if max_basis is not None and max_basis < least:
        msg = f"max_basis={max_basis}: k={k} needs at least 4 k + 6 = {4 * k + 6}"
        raise UsageError(msg)
    bytes_each = op.size * op.dtype.itemsize
    room = int(SHARE * free_bytes(op.device)) // bytes_each - 2 * k
    if max_basis is None and room < least:
        needed = (least + 2 * k) * bytes_each / 2**30
        msg = (
            f"k={k}: {least + 2 * k} vectors of {op.size:,} numbers take {needed:.3g} GiB, more than half of the "
        )
        raise UsageError(msg + f"free memory: fewer pairs, or max_basis={least} to use more of it")
    return min(most, room if max_basis is None else max_basis)


def _all(op: SymmetricOperator, wanted: Search) -> Subspace:
    """The wanted pairs out of the whole matrix."""
    krylov = every_direction(op)
    best = wanted.best(krylov.ritz_values)
    found = Subspace.empty(op)
    found.scale = krylov.scale
    found.add(krylov.ritz_vectors(best.tolist()))
    rest = np.delete(krylov.ritz_values, best)
    found.lower = float(rest.min()) if len(rest) else math.inf
    found.upper = float(rest.max()) if len(rest) else -math.inf
    return found
