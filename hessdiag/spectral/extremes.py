"""Both ends of the spectrum, each bounded on both sides, from one Lanczos run.

Inner side: the Rayleigh quotient of a *fresh* product; the recurrence's own residual falls to 1e-23 in
float32, which is fiction. Outer side: the Lanczos certificate (`hessdiag.spectral.certificate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hessdiag.errors import UsageError
from hessdiag.operator import as_operator
from hessdiag.results import RitzValue
from hessdiag.spectral.basis import Storage
from hessdiag.spectral.certificate import Side, Wanted, Watch
from hessdiag.spectral.ends import Extremes, Known, report
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.lanczos import Lanczos, basis_size
from hessdiag.spectral.warm import Warm, beginning

FAILURE = 1e-3
"""Per side. The other intervals miss once in 20: once in 1,000 is much less, and 1e-6 takes 1.4 times the products
for the same value (right to 3e-4 at 0.05 already)."""

FEWEST_STEPS = 3  # before an early end: fewer say nothing of either end

MAX_STEPS = 160
"""Trained spectra need 15 (lambda_max alone) to 50; a semicircle, the hardest, 140 at d = 3,000, more beyond."""


def extremes(
    operator: Any,
    *,
    rtol: float = 1e-3,
    which: Sequence[Side] = ("max", "min"),
    top: int = 1,
    seed: int = 0,
    max_steps: int = MAX_STEPS,
    max_basis: int | None = None,
    failure: float = FAILURE,
    rtol_min: float | None = None,
    density: float | None = None,
    least: int = 0,
    warm: Warm | None = None,
    on_step: Callable[[Watch], None] | None = None,
    storage: Storage | None = None,
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
        rtol_min: tolerance of lambda_min, where it is another than ``rtol``.
        density: error by depth that the density of the run's own start is to reach (`hessdiag.spectral.measure`).
        least: steps to take at least.
        warm: an earlier run's answer to start near (`hessdiag.spectral.warm`); never trusted alone.
        on_step: called after each product with the certificates as they are then.
        storage: how the vectors are held; None: in the operator's dtype, on its device.

    Returns:
        Extremes; ``confidence`` of each is ``1 - failure``, or 1.0 where every dimension was explored.
        Cost: the steps, plus one fresh product per reported eigenvalue.

    Raises:
        UsageError: an argument outside what is allowed here.

    >>> import hessdiag, torch
    >>> found = hessdiag.extremes(torch.diag(torch.arange(-2.0, 98.0)))
    >>> found.lambda_max.lo <= 97 <= found.lambda_max.hi, found.lambda_min.lo <= -2 <= found.lambda_min.hi
    (True, True)
    """
    op = as_operator(operator)
    wanted = Wanted(rtol, rtol_min, top, density, least)
    _require(wanted, which, failure)
    before = op.products
    start = beginning(op, seed, warm)
    run = Lanczos(op, start.vector, basis_size(op, max_steps, max_basis), seed, storage)
    watch = Watch(run, which, failure, start.stretch)
    _grow(watch, wanted, max_steps, on_step)
    settings = {"rtol": rtol, "seed": seed, "max_steps": max_steps, "failure": failure}
    settings |= {} if warm is None else {"warm": warm.turn}
    known = Known("Lanczos", settings, failure, watch.lower, watch.upper)
    found = report(op, run.krylov(), known, which, top, op.products - before)
    loose = _unsettled(found.top, rtol, found.krylov.margin(op))
    warnings = (*_missing(watch, wanted), *_ghosts(found.krylov), *loose)
    return replace(found, convergence=watch.convergence(), warnings=warnings)


def _grow(watch: Watch, wanted: Wanted, max_steps: int, on_step: Callable[[Watch], None] | None) -> None:
    """Step until everything asked for is known, the products are spent, or the operator says stop."""
    run, next_look, before = watch.run, 2, (0, math.inf)
    for step in range(1, max_steps + 1):
        run.step()
        last = step == max_steps or (step >= FEWEST_STEPS and run.op.stopped)
        certify = step >= next_look or last
        watch.look(certify=certify)
        if on_step is not None:
            on_step(watch)
        if run.exhausted or last:
            break
        if certify:
            gaps = watch.gaps(wanted).values()
            excess = max((gap / max(allowed, 1e-300) for gap, allowed in gaps), default=0.0)
            if excess <= 1 and step >= wanted.least and not (run.faint and run.op.size <= max_steps):
                break
            next_look = step + _pause(step, excess, *before)
            if step < wanted.least:  # where all is known nothing is looked at until then
                next_look = wanted.least if excess <= 1 else min(next_look, wanted.least)
            before = (step, excess)


def _pause(step: int, excess: float, step_before: int, excess_before: float) -> int:
    """Steps until the next look, which costs 1 to 5 ms: the distance falls exponentially, so the end shows."""
    most = max(2, step // 6)
    if excess <= 1:
        return most
    if not excess < excess_before < math.inf:
        return 2
    left = math.log(excess) * (step - step_before) / math.log(excess_before / excess)
    return min(max(1, int(0.6 * left)), most)


def _missing(watch: Watch, wanted: Wanted) -> tuple[str, ...]:
    """What has not reached the tolerance, in words; empty when it has."""
    if watch.run.exhausted:
        return ()
    more = "it was ended early" if watch.run.op.stopped else "raise max_steps"
    known = f"after {watch.run.products} products"
    return tuple(
        f"{name} is known to {gap:.2g} {known}, asked was {allowed:.2g}: {more}"
        for name, (gap, allowed) in watch.gaps(wanted).items()
        if gap > allowed
    )


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


def _require(wanted: Wanted, which: Sequence[Side], failure: float) -> None:
    shares = [wanted.rtol, failure, wanted.rtol_min or 0.5, wanted.density or 0.5]
    if not all(0 < share < 1 for share in shares):
        msg = f"rtol={wanted.rtol}, rtol_min={wanted.rtol_min}, density={wanted.density}, failure={failure}: "
        raise UsageError(msg + "each must lie between 0 and 1")
    if not set(which) <= {"max", "min"} or (not which and wanted.density is None and not wanted.least):
        msg = f"which={tuple(which)}: allowed: 'max' and 'min', at least one"
        raise UsageError(msg)
    if wanted.top < 1:
        msg = f"top={wanted.top}: at least 1"
        raise UsageError(msg)
