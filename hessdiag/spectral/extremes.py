"""Both ends of the spectrum, each bounded on both sides, from one Lanczos run.

Inner side: the Rayleigh quotient of a *fresh* product; the recurrence's own residual falls to 1e-23 in
float32, which is fiction. Outer side: the Lanczos certificate (`hessdiag.spectral.certificate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator import SymmetricOperator, as_operator
from hessdiag.results import Convergence, Provenance, RitzValue
from hessdiag.spectral.certificate import Side, Watch
from hessdiag.spectral.inner import dots, norms
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.lanczos import Lanczos, basis_size
from hessdiag.spectral.warm import Warm, beginning

MAX_STEPS = 160
"""Trained spectra need 15 (lambda_max alone) to 50; a semicircle, the hardest, 140 at d = 3,000, more beyond."""


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


def extremes(
    operator: Any,
    *,
    rtol: float = 1e-3,
    which: Sequence[Side] = ("max", "min"),
    top: int = 1,
    seed: int = 0,
    max_steps: int = MAX_STEPS,
    max_basis: int | None = None,
    failure: float = 1e-6,
    warm: Warm | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
) -> Extremes:
    """Find lambda_max, lambda_min and the largest eigenvalues, each with a two-sided interval.

    The run stops when the certificate of lambda_max lies within ``rtol`` of its value, that of lambda_min
    within ``rtol`` of the spectral radius, and the residual of every ``top`` value within ``rtol`` of the
    radius. Lambda_min of a trained network is a few percent of lambda_max, at the edge of a dense bulk:
    measured on spectra of 100,000 eigenvalues, this rule costs 40 products (lambda_max alone 15), and a
    tolerance relative to lambda_min itself would cost hundreds.

    Args:
        operator: anything `as_operator` takes; H, d x d.
        rtol: relative width of the interval to reach.
        which: sides to certify.
        top: how many of the largest eigenvalues to verify.
        seed: names the stream of the start vector.
        max_steps: products to spend at most; what is missing then is a warning, and a wider interval.
        max_basis: most vectors held (thick restart); None holds all.
        failure: probability, per side, that the outer end of the interval is wrong.
        warm: an earlier run's answer to start near (`hessdiag.spectral.warm`); never trusted alone.
        on_step: called after each product with (products, largest, smallest Ritz value).

    Returns:
        Extremes; ``confidence`` of each is ``1 - failure``, or 1.0 where every dimension was explored.
        Cost: the steps, plus one fresh product per reported eigenvalue.

    Raises:
        UsageError: an argument outside what is allowed here.
    """
    op = as_operator(operator)
    _require(rtol, which, top, failure)
    before = op.products
    start = beginning(op, seed, warm)
    run = Lanczos(op, start.vector, basis_size(op, max_steps, max_basis), seed)
    watch = Watch(run, which, failure, start.stretch)
    _grow(watch, rtol, top, max_steps, on_step)
    settings = {"rtol": rtol, "seed": seed, "max_steps": max_steps, "failure": failure}
    settings |= {} if warm is None else {"warm": warm.turn}
    known = _Known("Lanczos", settings, failure, watch.lower, watch.upper)
    found = _report(op, run.krylov(), known, which, top, op.products - before)
    loose = _unsettled(found.top, rtol, found.krylov.margin(op))
    warnings = (*_missing(watch, rtol, top), *_ghosts(found.krylov), *loose)
    return replace(found, convergence=watch.convergence(), warnings=warnings)


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
    known = _Known("every direction", {}, 0.0, float(values[0]), float(values[-1]))
    return _report(op, krylov, known, which, top, krylov.products)


def _grow(
    watch: Watch, rtol: float, top: int, max_steps: int, on_step: Callable[[int, float, float], None] | None
) -> None:
    """Step until everything asked for is known, or the products are spent."""
    run, next_look, before = watch.run, 2, (0, math.inf)
    for step in range(1, max_steps + 1):
        run.step()
        certify = step >= next_look or step == max_steps
        watch.look(certify=certify)
        if on_step is not None:
            on_step(run.products, *watch.history[-1][1:3])
        if run.exhausted:
            break
        if certify:
            gaps = watch.gaps(rtol, top).values()
            excess = max(gap / max(allowed, 1e-300) for gap, allowed in gaps)
            if excess <= 1 and not (run.faint and run.op.size <= max_steps):
                break
            next_look = step + _pause(step, excess, *before)
            before = (step, excess)


def _pause(step: int, excess: float, step_before: int, excess_before: float) -> int:
    """Steps until the next look, which costs 1 to 5 ms: the distance falls exponentially, so the end shows."""
    most = max(2, step // 6)
    if not excess < excess_before < math.inf:
        return 2
    left = math.log(excess) * (step - step_before) / math.log(excess_before / excess)
    return min(max(1, int(0.6 * left)), most)


@dataclass(frozen=True)
class _Known:
    """How a run was made, and what it says of where no eigenvalue is, with the probability of being wrong."""

    method: str
    settings: Mapping[str, int | float | str]
    failure: float
    lower: float
    upper: float


def _report(
    op: SymmetricOperator, krylov: Krylov, known: _Known, which: Sequence[Side], top: int, spent: int
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
        return ritz("lambda_min", pair, min(known.lower, pair[0]) - margin, pair[0] + floor, known.failure)

    return Extremes(
        lambda_max=highest(largest[0]) if largest else None,
        lambda_min=lowest(smallest[0]) if smallest else None,
        top=tuple(ritz("eigenvalue", (v, r), v - r - floor, v + r + floor, 0.0) for v, r in largest),
        krylov=krylov,
        convergence=Convergence(),
    )


def _missing(watch: Watch, rtol: float, top: int) -> tuple[str, ...]:
    """What has not reached the tolerance, in words; empty when it has."""
    if watch.run.exhausted:
        return ()
    known = f"after {watch.run.products} products"
    return tuple(
        f"{name} is known to {gap:.2g} {known}, asked was {allowed:.2g}: raise max_steps"
        for name, (gap, allowed) in watch.gaps(rtol, top).items()
        if gap > allowed
    )


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
        pairs += rayleigh(vectors, op.rows(vectors))
    return sorted(pairs[: len(largest)], reverse=True), pairs[len(largest) :]


def rayleigh(vectors: Tensor, images: Tensor) -> list[tuple[float, float]]:
    """(θ, ‖Hy − θy‖) of each row y with its product Hy, in float64."""
    pairs = []
    for vector, image in zip(vectors, images, strict=True):
        length = float(norms(vector[None])[0])
        theta = float(dots(vector[None], image[None])[0]) / length**2
        residual = image.double() - theta * vector.double()
        pairs.append((theta, float(torch.linalg.vector_norm(residual)) / length))
    return pairs


def _unsettled(largest: Sequence[RitzValue], rtol: float, rounding: float) -> tuple[str, ...]:
    """Verified values whose fresh residual says that they are no eigenvalues yet (ten times the tolerance)."""
    allowed = [10 * (rtol * abs(ritz.value) + rounding) for ritz in largest]
    loose = [
        number for number, (ritz, most) in enumerate(zip(largest, allowed, strict=True), 1) if ritz.residual > most
    ]
    if len(largest) < 2 or not loose:
        return ()
    return (f"of the top {len(largest)}, number {loose[0]} and below lie in a continuum: no single eigenvalues",)


def _ghosts(krylov: Krylov) -> tuple[str, ...]:
    """Below √eps the projected matrix is as good as exact, and no eigenvalue appears twice (Simon 1984)."""
    allowed = math.sqrt(torch.finfo(krylov.basis.dtype).eps)
    if krylov.orthogonality <= allowed:
        return ()
    return (f"the basis lost orthogonality ({krylov.orthogonality:.1g}, allowed {allowed:.1g}): try float64",)


def _require(rtol: float, which: Sequence[Side], top: int, failure: float) -> None:
    if not 0 < rtol < 1 or not 0 < failure < 1:
        msg = f"rtol={rtol}, failure={failure}: both must lie between 0 and 1"
        raise UsageError(msg)
    if not which or not set(which) <= {"max", "min"}:
        msg = f"which={tuple(which)}: allowed are 'max' and 'min', at least one"
        raise UsageError(msg)
    if top < 1:
        msg = f"top={top}: at least 1"
        raise UsageError(msg)
