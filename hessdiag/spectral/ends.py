"""Ends of a spectrum as they are reported: checked by fresh products, with an interval around each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from hessdiag.operator import SymmetricOperator
from hessdiag.results import Convergence, Provenance, RitzValue
from hessdiag.resume import once
from hessdiag.spectral.certificate import Side
from hessdiag.spectral.inner import combined, dots, length_of, norms
from hessdiag.spectral.krylov import Krylov


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """What one run knows of the ends of the spectrum.

    Attributes:
        lambda_max: None where it was not asked for; so too ``lambda_min``.
        top: the largest eigenvalues, descending, each within ``residual + floor`` of a true one. An
            eigenvalue of multiplicity m shows once, unless the run met a breakdown.
        krylov: the run, for deflation and the density.
        convergence: how Ritz values and certificates moved.
        warnings: what fell short of the tolerance, and what would mend it.
    """

    lambda_max: RitzValue | None
    lambda_min: RitzValue | None
    top: tuple[RitzValue, ...]
    krylov: Krylov
    convergence: Convergence
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """How a run was made, and what it says of where no eigenvalue is, with the probability of being wrong."""

    method: str
    settings: Mapping[str, int | float | str]
    failure: float
    lower: float
    upper: float


def report(
    op: SymmetricOperator, krylov: Krylov, known: Known, which: Sequence[Side], top: int, spent: int
) -> Extremes:
    """Verify with fresh products and put intervals around what they say."""
    before = op.products
    largest, smallest = _verify(op, krylov, which, top)
    provenance = Provenance(
        method=known.method,
        settings=known.settings,
        products=spent + op.products - before,
        dtype=str(op.dtype).removeprefix("torch."),
    )
    floor, margin = krylov.floor(op), krylov.margin(op)

    def ritz(quantity: str, pair: tuple[float, float], lo: float, hi: float, failure: float) -> RitzValue:
        return RitzValue(
            quantity=quantity,
            value=pair[0],
            lo=lo,
            hi=hi,
            kind="ritz",
            confidence=1.0 if krylov.exhausted else 1.0 - failure,
            provenance=provenance,
            residual=pair[1],
            floor=floor,
        )

    def highest(pair: tuple[float, float]) -> RitzValue:
        return ritz("lambda_max", pair, pair[0] - floor, max(known.upper, pair[0]) + margin, known.failure)

    def lowest(pair: tuple[float, float]) -> RitzValue:
        low, value, high = min(known.lower, pair[0]) - margin, pair[0], pair[0] + floor
        if op.semidefinite:  # what is below zero is rounding
            low, value, high = max(low, 0.0), max(value, 0.0), max(high, 0.0)
        return ritz("lambda_min", (value, pair[1]), low, high, known.failure)

    return Extremes(
        lambda_max=highest(largest[0]) if largest else None,
        lambda_min=lowest(smallest[0]) if smallest else None,
        top=tuple(ritz("eigenvalue", (v, r), v - r - floor, v + r + floor, 0.0) for v, r in largest),
        krylov=krylov,
        convergence=Convergence(),
    )


def extremes_of(
    op: SymmetricOperator, krylov: Krylov, *, which: Sequence[Side] = ("max", "min"), top: int = 1
) -> Extremes:
    """The ends of a spectrum of which every direction is explored; cost: a fresh product per reported eigenvalue.

    Args:
        op: the operator.
        krylov: a complete run (`hessdiag.spectral.krylov.whole`).
        which: sides to report.
        top: how many of the largest eigenvalues.
    """
    values = krylov.ritz_values
    known = Known("every direction", {}, 0.0, float(values[0]), float(values[-1]))
    return report(op, krylov, known, which, top, krylov.products)


def _verify(
    op: SymmetricOperator, krylov: Krylov, which: Sequence[Side], top: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Fresh products of the Ritz vectors wanted: (Rayleigh quotient, residual) of the top, and of the bottom."""
    k = krylov.size
    largest = list(range(k - 1, max(k - 1 - top, -1), -1)) if "max" in which else []
    smallest = [0] if "min" in which else []
    pairs: list[tuple[float, float]] = []
    positions = largest + smallest
    for begin in range(0, len(positions), op.block):
        vectors = krylov.ritz_vectors(positions[begin : begin + op.block])
        pairs += once(op, f"{len(vectors)} ends", partial(_checked, op, vectors))
    return sorted(pairs[: len(largest)], reverse=True), pairs[len(largest) :]


def _checked(op: SymmetricOperator, vectors: Tensor) -> list[tuple[float, float]]:
    return rayleigh(vectors, op.rows(vectors))


def rayleigh(vectors: Tensor, images: Tensor) -> list[tuple[float, float]]:
    """(θ, ‖Hy − θy‖) of each row y with its product Hy, in float64."""
    pairs = []
    for vector, image in zip(vectors, images, strict=True):
        length = float(norms(vector[None])[0])
        theta = float(dots(vector[None], image[None])[0]) / length**2
        pairs.append((theta, length_of(combined(image, vector, -theta)) / length))
    return pairs
