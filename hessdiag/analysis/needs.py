"""What the quantities asked for need of a sweep, and the products they will take."""

from __future__ import annotations

import math

from hessdiag.analysis.traces import ModelTrace, OpenTrace
from hessdiag.settings import Settings

Model = ModelTrace | OpenTrace | str | None  # the trace by way of the model, or why there is none
DEFLATION_STEPS = 20  # where no extreme was asked for: 20 steps and 10 probes gave 0.15 % where 30 probes gave 6 %
TYPICAL = {"lambda_max": 13, "lambda_min": 38}
"""Products of a run on trained networks at 1e-3 and a failure of 1e-3 (digits, an MLP, a GPT: 12, 15, 9 and 39,
50, 23); a digit more takes about 1.3 times as many."""
TYPICAL_DENSITY = 50  # steps to 35% (25, 48, 85 on digits, an MLP, a GPT); the error falls like 1 / steps
TYPICAL_PROBES = 16


def planned(
    settings: Settings,
    *,
    closed: bool = False,
    model: Model = None,
    size: int | None = None,
) -> int:
    """Products the settings will take, about; those that a trace without probes would need are not in it.

    Args:
        settings: what is asked for.
        closed: whether tr H and tr H² come by formula.
        model: the trace by way of the model, or why there is none; None where that is not known yet.
        size: d, where known: no more products than that are taken (`is_whole`).
    """
    if not needs_run(settings, model, closed=closed):
        return 0
    plain = 0
    if needs_forms(settings, model) and not closed:
        plain = TYPICAL_PROBES if settings.probes is None else settings.probes
    further = settings.density_probes * (settings.steps or TYPICAL_DENSITY) if wants_density(settings) else 0
    products = _run(settings) + further + plain
    spending = settings.spending
    if spending is not None and spending.unit == "p":
        products = min(products, int(spending.amount))
    return products if size is None else min(products, size)


def _run(settings: Settings) -> int:
    """Steps of the run, and a product to verify each end."""
    known, steps = settings.known_to, float(DEFLATION_STEPS)
    ends = [name for name in TYPICAL if settings.wants(name)]
    if ends:
        finer = max(math.log10(1e-3 / getattr(known, name)) for name in ends)
        surer = max(math.log10(1e-3 / known.failure), 0.0) * 0.12
        steps = max(TYPICAL[name] for name in ends) * max(1 + 0.3 * finer + surer, 0.4)
        steps = max(steps, DEFLATION_STEPS if needs_square(settings) else 0)
    if wants_density(settings):
        steps = max(steps if ends else 0.0, settings.steps or TYPICAL_DENSITY * 0.35 / known.density)
    return min(round(steps), settings.max_steps) + len(ends) + (settings.top - 1)


def wants_density(settings: Settings) -> bool:
    """Whether the run is to go on for the density."""
    return settings.wants("density", "negative_mass")


def is_whole(settings: Settings, size: int, *, closed: bool = False, model: Model = None) -> bool:
    """Whether every direction is multiplied, since that takes no more products: all numbers are exact then."""
    return size <= planned(settings, closed=closed, model=model)


def uses_trace(settings: Settings) -> bool:
    """Whether something asked for rests on tr H."""
    return settings.wants("trace", "ws_lower", "ws_upper", "effective_rank")


def needs_square(settings: Settings) -> bool:
    """Whether something asked for rests on tr H²."""
    return settings.wants("frobenius_squared", "ws_lower", "ws_upper", "effective_rank")


def needs_forms(settings: Settings, model: Model = None) -> bool:
    """Whether probes are needed; ``model`` is the trace by way of the model, or why there is none."""
    return (settings.wants("trace") and isinstance(model, str)) or needs_square(settings)


def needs_run(settings: Settings, model: Model = None, *, closed: bool = False) -> bool:
    """Whether a Lanczos run is needed: for itself, or to deflate probes."""
    wanted = settings.wants("lambda_max", "lambda_min", "density", "negative_mass")
    return wanted or settings.top > 1 or (not closed and needs_forms(settings, model))
