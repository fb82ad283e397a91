"""The run: one Lanczos process gives the ends of the spectrum and shows its density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hessdiag.analysis.found import Found
from hessdiag.analysis.needs import DEFLATION_STEPS, needs_square, wants_density
from hessdiag.analysis.population import batch_error
from hessdiag.analysis.room import held
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.records import Record
from hessdiag.settings import Settings
from hessdiag.spectral import (
    Extremes,
    Forms,
    Krylov,
    Measure,
    density,
    extremes,
    extremes_of,
    frobenius_squared_from,
    lanczos,
    measure_of,
    negative_mass,
    own_negative_mass,
    whole,
)
from hessdiag.spectral.certificate import Watch
from hessdiag.spectral.warm import Warm

FURTHER, FURTHER_STEPS = 2, 60  # starts of a density that the run does not show, and their steps
FEWEST_STEPS = 10  # fewer than these say next to nothing, and are not begun


def sides(settings: Settings) -> list[Any]:
    """The ends to certify, "max" first."""
    which = [side for side in ("max", "min") if settings.wants(f"lambda_{side}")]
    return ["max", *which] if settings.top > 1 and "max" not in which else which


def verified(settings: Settings) -> int:
    """Fresh products that the ends take after the run."""
    return len(sides(settings)) + settings.top - 1


def take_run(
    operator: Curvature,
    settings: Settings,
    found: Found,
    *,
    every: bool,
    warm: Warm | None,
    on_step: Callable[[Watch], None] | None = None,
) -> None:
    """The run with its ends, into ``found``.

    Args:
        operator: with its ``room`` set.
        settings: what is wanted, and how well.
        found: gets krylov, run, metrics of the ends, top, convergence, warnings and notes.
        every: whether every direction is multiplied.
        warm: what an earlier run left.
        on_step: told of the certificates after each product.
    """
    s, op, which = settings, operator, sides(settings)
    with op.recorded() as record:
        if every:
            found.krylov = whole(op)
        elif not which and not wants_density(s):
            kept = held(op, s, found.notes)
            steps = kept.at_most(min(DEFLATION_STEPS, op.size))
            found.krylov = lanczos(op, steps=steps, seed=s.seed, storage=kept)
        result = _ends(op, s, found, which, warm, on_step)
    if result is not None:
        found.krylov, found.convergence, found.top = result.krylov, result.convergence, result.top
        found.warnings += result.warnings
    assert found.krylov is not None
    found.run = record.first(found.krylov.products)
    if result is not None:
        _with_data(op, s, found, result, record)


def _ends(
    op: Curvature,
    s: Settings,
    found: Found,
    which: list[Any],
    warm: Warm | None,
    on_step: Callable[[Watch], None] | None,
) -> Extremes | None:
    known = s.known_to
    if found.krylov is not None:
        return extremes_of(op, found.krylov, which=which, top=s.top) if which else None
    shown, kept = wants_density(s), held(op, s, found.notes)
    deflating = kept.at_most(DEFLATION_STEPS) if needs_square(s) else 0
    return extremes(
        op,
        which=which,
        top=s.top,
        rtol=known.lambda_max,
        rtol_min=known.lambda_min,
        failure=known.failure,
        density=known.density if shown and s.steps is None else None,
        least=max((s.steps or 0) if shown else 0, deflating),
        seed=s.seed,
        warm=None if shown else warm,  # the density needs a start that is uniform on the sphere
        max_steps=s.max_steps,
        max_basis=kept.vectors,
        on_step=on_step,
        storage=kept,
    )


def _with_data(op: Curvature, s: Settings, found: Found, result: Extremes, record: Record) -> None:
    """The ends with their errors over data: fresh products follow those of the run, the top ones first."""
    fresh = record.batches[result.krylov.products :]
    for end in (result.lambda_max, result.lambda_min):
        if end is None:
            continue
        shown = fresh[0] if end.quantity == "lambda_max" else fresh[-1]
        data = batch_error(op, shown.numpy(), end.value, s.confidence)
        found.metrics[end.quantity] = replace(end, data=data)
    ends = [found.metrics[end.quantity] for end in (result.lambda_max, result.lambda_min) if end is not None]
    if ends and all(end.data is None for end in ends):
        found.notes.append(
            f"{len(op.batches)} batches are too few for error bars over data: take a smaller `batch_size`"
        )


def take_density(operator: Curvature, settings: Settings, found: Found) -> None:
    """The density, the run's own where its start shows it, else that of further starts; into ``found``."""
    s, op, krylov = settings, operator, found.krylov
    if not wants_density(s) or krylov is None:
        return
    measure = None if krylov.exhausted or s.density_probes else measure_of(krylov)
    if measure is not None and _is_simple(measure, found.forms, s.confidence):
        found.spectrum = measure.spectrum(krylov.floor(op))
        found.warnings += _cut_short(measure, s)
        share = own_negative_mass(op, krylov, measure.alphas, measure.betas, s.confidence)
    else:
        starts, steps = s.density_probes or FURTHER, s.steps or FURTHER_STEPS
        if not krylov.exhausted and op.left < starts * min(steps, FEWEST_STEPS):
            found.warnings.append(f"not reached before the end: the density, which takes {starts} further starts")
            return
        if not krylov.exhausted and not s.density_probes:
            found.notes.append(f"the density is that of {FURTHER} further starts: {_why_further(krylov)}")
        drawn = density(op, starts, steps, s.seed, krylov)
        found.spectrum, share = drawn.spectrum, negative_mass(drawn, confidence=s.confidence)
    if s.wants("negative_mass"):
        found.metrics["negative_mass"] = share


def _is_simple(measure: Measure, forms: Forms | None, confidence: float) -> bool:
    """Whether values that stand out may be counted once each: by the start, and by probes where there are."""
    if not measure.simple:
        return False
    if forms is None or forms.exact:
        return True
    square = frobenius_squared_from(forms, confidence=confidence)
    return measure.agrees(square.value, square.hi - square.lo)


def _cut_short(measure: Measure, s: Settings) -> list[str]:
    steps = len(measure.alphas)
    if measure.complete or steps >= (s.steps or 0):
        return []
    more = "raise `max_steps`" if steps >= s.max_steps else "it was ended early"
    return [f"the run took {steps} of the {s.steps} steps asked for: {more}"]


def _why_further(krylov: Krylov) -> str:
    if krylov.restarted:
        return "the run was restarted, and forgot its start"
    return "the run's start leans towards eigenvalues that are not simple"
