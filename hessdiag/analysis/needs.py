"""What the quantities asked for need of a sweep, and the products they will take."""

from __future__ import annotations

from hessdiag.analysis.traces import ModelTrace, OpenTrace
from hessdiag.settings import Settings

Model = ModelTrace | OpenTrace | str | None  # the trace by way of the model, or why there is none
DEFLATION_STEPS = 20  # where no extreme was asked for: 20 steps and 10 probes gave 0.15 % where 30 probes gave 6 %
TYPICAL_EXTREMES = 40  # products the extremes take on trained networks, for the forecast


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
    run = TYPICAL_EXTREMES if settings.wants("lambda_max", "lambda_min") else DEFLATION_STEPS
    continued = settings.wants("density", "negative_mass")
    dense = settings.density_probes * settings.steps if continued else 0
    plain = settings.probes if needs_forms(settings, model) and not closed else 0
    products = min(run, settings.max_steps) + dense + plain
    return products if size is None else min(products, size)


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
