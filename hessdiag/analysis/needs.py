"""What the quantities asked for need of a sweep, and the products they will take."""

from __future__ import annotations

from hessdiag.analysis.traces import ModelTrace
from hessdiag.settings import Settings

DEFLATION_STEPS = 20  # where no extreme was asked for: 20 steps and 10 probes gave 0.15 % where 30 probes gave 6 %
TYPICAL_EXTREMES = 40  # products the extremes take on trained networks, for the forecast


def planned(settings: Settings, *, closed: bool = False) -> int:
    """Products the settings will take, about; those that a trace without probes would need are not in it.

    Args:
        settings: what is asked for.
        closed: whether tr H and tr H² come by formula.
    """
    if not needs_run(settings, closed=closed):
        return 0
    run = TYPICAL_EXTREMES if settings.wants("lambda_max", "lambda_min") else DEFLATION_STEPS
    continued = settings.wants("density", "negative_mass")
    dense = settings.density_probes * settings.steps if continued else 0
    probed = needs_forms(settings) and not closed
    plain = settings.probes - (settings.density_probes if continued else 0) if probed else 0
    return min(run, settings.max_steps) + dense + plain


def uses_trace(settings: Settings) -> bool:
    """Whether something asked for rests on tr H."""
    return settings.wants("trace", "ws_lower", "ws_upper", "effective_rank")


def needs_square(settings: Settings) -> bool:
    """Whether something asked for rests on tr H²."""
    return settings.wants("frobenius_squared", "ws_lower", "ws_upper", "effective_rank")


def needs_forms(settings: Settings, model: ModelTrace | str | None = None) -> bool:
    """Whether probes are needed; ``model`` is the trace by way of the model, or why there is none."""
    return (settings.wants("trace") and isinstance(model, str)) or needs_square(settings)


def needs_run(settings: Settings, model: ModelTrace | str | None = None, *, closed: bool = False) -> bool:
    """Whether a Lanczos run is needed: for itself, or to deflate probes."""
    wanted = settings.wants("lambda_max", "lambda_min", "density", "negative_mass")
    return wanted or settings.top > 1 or (not closed and needs_forms(settings, model))
