"""The largest eigenvalue of the Hessian as an adaptive optimizer sees it, beside its threshold."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from hessdiag.analysis.needs import PRECONDITIONED, TYPICAL
from hessdiag.analysis.population import batch_error
from hessdiag.analysis.room import held
from hessdiag.analysis.spending import Spending
from hessdiag.engine.checks.rounding import preconditioned_floor
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.preconditioned import Preconditioned
from hessdiag.optimizers import Preconditioner
from hessdiag.results import Metric
from hessdiag.resume import once
from hessdiag.settings import Settings
from hessdiag.spectral import extremes

SHARE = 0.3  # of a budget, where other quantities are measured too


def take_preconditioned(
    operator: Curvature, settings: Settings, preconditioner: Preconditioner, spending: Spending
) -> tuple[Metric, tuple[str, ...], tuple[str, ...]]:
    """The metric, warnings and notes; a run of its own, as many products as H's largest eigenvalue or more.

    Args:
        operator: H, after its self-test.
        settings: as asked; accuracy and failure are those of lambda_max.
        preconditioner: of the optimizer.
        spending: what may be spent.
    """
    known, alone, notes = settings.known_to, settings.quantities == (PRECONDITIONED,), list[str]()
    scaled = Preconditioned(operator, preconditioner)
    scaled.floor = once(operator, "rounding", partial(preconditioned_floor, scaled, operator))
    kept = held(operator, settings, notes)
    operator.room = spending.room(1.0 if alone else SHARE, first=TYPICAL["lambda_max"])
    with operator.recorded() as record:
        found = extremes(
            scaled,
            which=("max",),
            rtol=known.lambda_max,
            failure=known.failure,
            seed=settings.seed,
            max_steps=settings.max_steps,
            max_basis=kept.vectors,
            storage=kept,
        )
    end = found.lambda_max
    assert end is not None
    shown = record.batches[found.krylov.products].numpy()
    data = batch_error(operator, shown, end.value, settings.confidence)
    said: dict[str, int | float | str] = {"optimizer": preconditioner.optimizer, "formula": preconditioner.formula}
    said |= {"step": preconditioner.step}
    said |= {} if preconditioner.lr is None else {"lr": preconditioner.lr}
    said |= {"threshold": preconditioner.threshold} if math.isfinite(preconditioner.threshold) else {}
    provenance = replace(end.provenance, settings={**end.provenance.settings, **said})
    metric = replace(end, quantity=PRECONDITIONED, provenance=provenance, data=data)
    warnings = tuple(text.replace("lambda_max", PRECONDITIONED, 1) for text in found.warnings)
    return metric, warnings, (*preconditioner.notes, *notes)
