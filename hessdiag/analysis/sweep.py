"""The shared sweep: one Lanczos run deflates the probes, the probes' first products serve every moment.

Some of the probes are continued into the density. Asking for everything costs about what the density alone costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hessdiag.analysis.population import batch_error
from hessdiag.analysis.traces import ModelTrace, contradiction, model_trace, with_trace
from hessdiag.engine.curvature import Curvature
from hessdiag.results import (
    Bound,
    Convergence,
    DataError,
    Estimate,
    Layer,
    Metric,
    RitzValue,
    Spectrum,
)
from hessdiag.settings import Settings
from hessdiag.spectral import (
    Forms,
    Krylov,
    deflated_ws,
    density,
    effective_rank_from,
    extremes,
    forms,
    frobenius_bound,
    frobenius_squared_from,
    known_half,
    lanczos,
    negative_mass,
    trace_from,
    wolkowicz_styan,
)
from hessdiag.spectral.interval import mean_interval

DEFLATION_STEPS = 20  # where no extreme was asked for: 20 steps and 10 probes gave 0.15 % where 30 probes gave 6 %
BASIS_BYTES = 2 << 30  # a Lanczos basis beyond 2 GiB restarts (thick restart: more products, same certificates)
FEWEST_VECTORS = 12
TYPICAL_EXTREMES = 40  # products the extremes take on trained networks, for the forecast


@dataclass
class Found:
    """What a sweep has found so far."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    krylov: Krylov | None = None
    forms: Forms | None = None
    spectrum: Spectrum | None = None
    top: tuple[RitzValue, ...] = ()
    companions: tuple[Bound, ...] = ()
    layers: tuple[Layer, ...] = ()
    convergence: Convergence = field(default_factory=Convergence)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first: int = 0  # index of the main run's first product among the operator's recorded forms
    first_form: int = 0  # likewise of the first probe that was not continued into the density
    products: int = 0  # with other operators than the main one


class Sweep:
    """One pass over what the settings ask for.

    Args:
        operator: checked and ready.
        settings: what is wanted, and how much may be spent.
    """

    def __init__(self, operator: Curvature, settings: Settings) -> None:
        self.operator, self.settings = operator, settings

    def run(self) -> Found:
        """All quantities asked for; cost as `planned`, plus R products where the trace needs them."""
        s, found = self.settings, Found()
        model = model_trace(self.operator, s) if uses_trace(s) else None
        if isinstance(model, ModelTrace):
            found.products, found.layers = model.products, model.layers
            found.metrics["trace"] = model.estimate
        elif model is not None:
            found.notes.append(f"the trace comes from probes: {model}")
        if _needs_run(s, model):
            self._extremes(found)
            self._density(found)
            if _needs_forms(s, model):
                self._forms(found)
                self._moments(found)
        return found

    def _extremes(self, found: Found) -> None:
        s, op = self.settings, self.operator
        found.first = len(op.forms)
        which = [side for side in ("max", "min") if s.wants(f"lambda_{side}")]
        if s.top > 1 and "max" not in which:
            which.insert(0, "max")
        if not which:
            found.krylov = lanczos(op, steps=min(DEFLATION_STEPS, op.size), seed=s.seed)
            return
        result = extremes(
            op,
            rtol=s.rtol,
            which=which,  # type: ignore[arg-type]
            top=s.top,
            seed=s.seed,
            max_steps=s.max_steps,
            max_basis=self._max_basis(found),
        )
        found.krylov, found.convergence, found.top = result.krylov, result.convergence, result.top
        found.warnings += result.warnings
        fresh = found.first + result.krylov.products
        ends = [end for end in (result.lambda_max, result.lambda_min) if end is not None]
        positions = [fresh, fresh + (len(result.top) if result.lambda_max is not None else 0)]
        if result.lambda_max is None:
            positions = positions[1:]
        for end, position in zip(ends, positions, strict=False):
            data = batch_error(op, op.forms[position].numpy(), end.value, s.confidence)
            found.metrics[end.quantity] = replace(end, data=data)
        if ends and all(found.metrics[end.quantity].data is None for end in ends):
            found.notes.append(
                f"{len(op.batches)} batches are too few for error bars over data: take a smaller --batch-size"
            )

    def _max_basis(self, found: Found) -> int | None:
        vectors = BASIS_BYTES // (self.operator.size * self.operator.dtype.itemsize)
        if vectors >= self.settings.max_steps:
            return None
        vectors = max(vectors, FEWEST_VECTORS + self.settings.top)
        found.notes.append(f"the Lanczos basis holds {vectors} vectors at a time and is restarted")
        return int(vectors)

    def _density(self, found: Found) -> None:
        s = self.settings
        if s.wants("density", "negative_mass"):
            run = density(self.operator, s.density_probes, s.steps, s.seed, found.krylov)
            found.spectrum, found.forms = run.spectrum, run.forms
            if s.wants("negative_mass"):
                found.metrics["negative_mass"] = negative_mass(run, confidence=s.confidence)
        found.first_form = len(self.operator.forms)

    def _forms(self, found: Found) -> None:
        s, op = self.settings, self.operator
        if found.forms is None:
            found.forms = forms(op, found.krylov, s.probes, s.seed)
        elif not found.forms.exact and s.probes > s.density_probes:
            more = forms(op, known_half(found.krylov), s.probes - s.density_probes, s.seed, first=s.density_probes)
            found.forms = found.forms.with_more(more)

    def _moments(self, found: Found) -> None:
        """Everything that follows from tr H and tr H²."""
        s, op, values = self.settings, self.operator, found.forms
        if values is None or found.krylov is None:
            return
        trace = found.metrics.get("trace")
        if trace is None:
            trace = trace_from(values, confidence=s.confidence)
            trace = replace(trace, data=self._probed_data(found, trace.value))
            found.metrics["trace"] = trace
            found.layers = self._probed_layers(found)
        elif isinstance(trace, Estimate) and trace.kind == "exact":
            found.warnings += contradiction(trace, values)
            values = replace(values, trace=np.full_like(values.trace, trace.value))
        else:
            trace = trace_from(values, confidence=s.confidence)  # of the same probes as tr H²: used jointly
        if not isinstance(trace, Estimate):
            return
        found.convergence = with_trace(found.convergence, values, s.confidence)
        square = frobenius_squared_from(values, confidence=s.confidence)
        rank = effective_rank_from(values, confidence=s.confidence)
        found.metrics |= {"frobenius_squared": square, "effective_rank": rank}
        measured = {
            n: found.metrics[n].value if n in found.metrics else None for n in ("lambda_max", "lambda_min")
        }
        ws = wolkowicz_styan(trace, square, op.size, confidence=s.confidence, **measured)
        found.metrics |= {"ws_upper": ws.upper, "ws_lower": ws.lower}
        found.companions = (ws.inner_max, ws.spread, frobenius_bound(square, lambda_max=measured["lambda_max"]))
        if found.krylov.size < op.size:
            found.companions += deflated_ws(found.krylov, trace, square, op.size, **measured)

    def _probed(self, found: Found, recorded: list[torch.Tensor]) -> np.ndarray[Any, Any] | None:
        """Unbiased values of tr H in parts, per probe (n, parts), out of what products recorded of themselves.

        The main run's basis vectors give Σ q·(…q), the probes (d − k) u·(…u); None after a restart, when the
        recorded vectors are no longer the basis.
        """
        known = known_half(found.krylov) if found.spectrum is not None else found.krylov
        if known is None or len(known.cycles) > 1 or found.first_form >= len(recorded):
            return None
        run = torch.stack(recorded[found.first : found.first + known.size]).sum(0)
        probes = torch.stack(recorded[found.first_form :])
        return (run + (self.operator.size - known.size) * probes).numpy()

    def _probed_data(self, found: Found, value: float) -> DataError | None:
        parts = self._probed(found, self.operator.forms)
        if parts is None:
            return None
        return batch_error(self.operator, parts.mean(0), value, self.settings.confidence)

    def _probed_layers(self, found: Found) -> tuple[Layer, ...]:
        parts = self._probed(found, self.operator.layer_forms)
        if parts is None or len(parts) < 2:
            return ()
        rows = []
        for (name, size), values in zip(self.operator.layout, parts.T, strict=True):
            _, lo, hi = mean_interval(values, self.settings.confidence)
            rows.append(Layer(name=name, size=size, trace=float(values.mean()), lo=lo, hi=hi, kind="probes"))
        return tuple(rows)


def planned(settings: Settings) -> int:
    """Products the settings will take, about; those that a trace without probes would need are not in it."""
    if not _needs_run(settings):
        return 0
    run = TYPICAL_EXTREMES if settings.wants("lambda_max", "lambda_min") else DEFLATION_STEPS
    continued = settings.wants("density", "negative_mass")
    dense = settings.density_probes * settings.steps if continued else 0
    plain = settings.probes - (settings.density_probes if continued else 0) if _needs_forms(settings) else 0
    return min(run, settings.max_steps) + dense + plain


def uses_trace(settings: Settings) -> bool:
    """Whether something asked for rests on tr H."""
    return settings.wants("trace", "ws_lower", "ws_upper", "effective_rank")


def _needs_forms(settings: Settings, model: ModelTrace | str | None = None) -> bool:
    probed_trace = settings.wants("trace") and isinstance(model, str)
    return probed_trace or settings.wants("frobenius_squared", "ws_lower", "ws_upper", "effective_rank")


def _needs_run(settings: Settings, model: ModelTrace | str | None = None) -> bool:
    wanted = settings.wants("lambda_max", "lambda_min", "density", "negative_mass")
    return wanted or settings.top > 1 or _needs_forms(settings, model)
