"""What the quantities asked for need of a sweep, and the products they will take: middles of trained networks."""

from __future__ import annotations

import math

from hessdiag.analysis.traces import ModelTrace, OpenTrace
from hessdiag.errors import Refused
from hessdiag.settings import Settings

Model = ModelTrace | OpenTrace | Refused | None  # the trace by way of the model, or why there is none
DEFLATION_STEPS = 20  # where no extreme was asked for: 20 steps and 10 probes gave 0.15 % where 30 probes gave 6 %
TYPICAL = {"lambda_max": 11, "lambda_min": 35}
"""Steps that certify it to 1e-3 at a failure of 1e-3: 11, 15, 7, 11 and 37, 50, 24, 48 on a digits MLP, an MNIST
MLP, a GPT and an MLP of a million parameters; all constants here are the geometric middle of what these took."""
FINER = {"lambda_max": 0.15, "lambda_min": 0.5}  # as a share, for a digit more
SURER = {"lambda_max": 0.08, "lambda_min": 0.12}  # for a tenth of the failure
TYPICAL_DENSITY = 52  # steps to 35%: 35 to 37, 50, 86, 48
DEEPER, SHALLOWER = (
    0.72,
    1.2,
)  # powers of the error: 63 to 86, 89, 160 (not reached), 140 to 15%; 20, 23, 33 to 70%
FLATTER = 1.4  # steps of the preconditioned Hessian over those of H: 16 and 14 on two MNIST MLPs trained by Adam
PRECONDITIONED = "preconditioned_lambda_max"
PROBES_ALONE = 8  # for tr H² to any of the efforts, where the trace comes from elsewhere
PROBES_BOTH, FEWER = 20, 1.15  # for the trace to 2% (11, 30, 21, 64); a power of its accuracy


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
        size: d, where known: no more products than that are taken of each matrix (`is_whole`).
    """
    products, own = sum(shares(settings, closed=closed, model=model)), preconditioned(settings)
    if size is not None:
        products, own = min(products, size), min(own, size)
    spending = settings.spending
    if spending is not None and spending.unit == "p":
        return min(products + own, int(spending.amount))
    return products + own


def shares(
    settings: Settings, *, closed: bool = False, model: Model = None, by_model: bool | None = None
) -> tuple[int, int]:
    """The same without the end that a budget or the size sets: of the run and further starts, and of probes.

    Where ``model`` is not known yet, ``by_model`` may be: whether it will give the trace.
    """
    if by_model is not None:
        model = None if by_model else Refused("foreseen")
    elif model is not None:
        by_model = isinstance(model, ModelTrace)
    if not needs_run(settings, model, closed=closed):
        return 0, 0
    probes = 0 if closed or not needs_forms(settings, model) else _probes(settings, by_model)
    further = settings.density_probes * (settings.steps or TYPICAL_DENSITY) if wants_density(settings) else 0
    return run_steps(settings) + further, probes


def preconditioned(settings: Settings) -> int:
    """Products that the run of the preconditioned Hessian takes, about."""
    if not settings.wants(PRECONDITIONED):
        return 0
    known, steps = settings.known_to, TYPICAL["lambda_max"]
    more = FINER["lambda_max"] * math.log10(1e-3 / known.lambda_max)
    more += SURER["lambda_max"] * math.log10(1e-3 / known.failure)
    return min(round(FLATTER * steps * max(1 + more, 0.44)), settings.max_steps) + 1


def _probes(settings: Settings, by_model: bool | None) -> int:
    if settings.probes is not None:
        return settings.probes
    both = 0.0 if by_model or not uses_trace(settings) else PROBES_BOTH
    both *= (0.02 / settings.known_to.trace) ** FEWER
    if by_model is None:
        both = math.sqrt(both * PROBES_ALONE)  # either may be
    return min(max(round(both), PROBES_ALONE), settings.most_probes)


def run_steps(settings: Settings) -> int:
    """Steps of the run, and a product to verify each end."""
    known, steps = settings.known_to, 0.0
    ends = [name for name in TYPICAL if settings.wants(name)]
    surer = math.log10(1e-3 / known.failure)
    for name in ends:
        more = FINER[name] * math.log10(1e-3 / getattr(known, name)) + SURER[name] * surer
        steps = max(steps, TYPICAL[name] * max(1 + more, 0.44))
    if wants_density(settings):
        finer = 0.35 / known.density
        deep = TYPICAL_DENSITY * finer ** (DEEPER if finer > 1 else SHALLOWER)
        steps = max(steps, settings.steps or deep)
    return min(round(steps or DEFLATION_STEPS), settings.max_steps) + len(ends) + (settings.top - 1)


def wants_density(settings: Settings) -> bool:
    """Whether the run is to go on for the density."""
    return settings.wants("density", "negative_mass")


def is_whole(settings: Settings, size: int, *, closed: bool = False, model: Model = None) -> bool:
    """Whether every direction is multiplied, since that takes no more products: all numbers are exact then."""
    return size <= planned(settings, closed=closed, model=model) - preconditioned(settings)


def uses_trace(settings: Settings) -> bool:
    """Whether something asked for rests on tr H."""
    return settings.wants("trace", "ws_lower", "ws_upper", "effective_rank")


def needs_square(settings: Settings) -> bool:
    """Whether something asked for rests on tr H²."""
    return settings.wants("frobenius_squared", "ws_lower", "ws_upper", "effective_rank")


def needs_forms(settings: Settings, model: Model = None) -> bool:
    """Whether probes are needed; ``model`` is the trace by way of the model, or why there is none."""
    return (settings.wants("trace") and isinstance(model, Refused)) or needs_square(settings)


def needs_run(settings: Settings, model: Model = None, *, closed: bool = False) -> bool:
    """Whether a Lanczos run is needed: for itself, or to deflate probes."""
    wanted = settings.wants("lambda_max", "lambda_min", "density", "negative_mass")
    return wanted or settings.top > 1 or (not closed and needs_forms(settings, model))
