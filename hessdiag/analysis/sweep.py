"""The shared sweep: one Lanczos run deflates the probes and the density's starts, a probe serves every moment.

Asking for everything costs about what the density alone costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hessdiag.analysis.closed import closed_trace
from hessdiag.analysis.needs import (
    DEFLATION_STEPS,
    is_whole,
    needs_forms,
    needs_run,
    needs_square,
    uses_trace,
)
from hessdiag.analysis.population import batch_error
from hessdiag.analysis.probed import Probed
from hessdiag.analysis.traces import ModelTrace, OpenTrace, contradiction, model_trace, shortfall, with_trace
from hessdiag.closed_form import ClosedForm, Recognized
from hessdiag.engine.curvature import Curvature
from hessdiag.results import (
    Bound,
    Convergence,
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
    extremes_of,
    forms_to,
    frobenius_bound,
    frobenius_squared_from,
    lanczos,
    negative_mass,
    trace_from,
    whole,
    wolkowicz_styan,
)
from hessdiag.spectral.interval import PILOT
from hessdiag.spectral.warm import Warm

BASIS_BYTES = 2 << 30  # a Lanczos basis beyond 2 GiB restarts (thick restart: more products, same certificates)
FEWEST_VECTORS = 12


@dataclass
class Found:
    """What a sweep has found so far."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    krylov: Krylov | None = None
    closed: ClosedForm | None = None
    forms: Forms | None = None
    spectrum: Spectrum | None = None
    top: tuple[RitzValue, ...] = ()
    companions: tuple[Bound, ...] = ()
    layers: tuple[Layer, ...] = ()
    convergence: Convergence = field(default_factory=Convergence)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first: int = 0  # index of the main run's first product among the operator's recorded forms
    first_form: int = 0  # likewise of the first probe
    products: int = 0  # with other operators than the main one


class Sweep:
    """One pass over what the settings ask for.

    Args:
        operator: checked and ready.
        settings: what is wanted, and how much may be spent.
        network: the three-layer network that the operator is of, where its closed form is to give the traces.
        warm: what an earlier run left, for the extremes to start near.
    """

    def __init__(
        self,
        operator: Curvature,
        settings: Settings,
        network: Recognized | None = None,
        warm: Warm | None = None,
    ) -> None:
        self.operator, self.settings, self.network, self.warm = operator, settings, network, warm

    def run(self) -> Found:
        """All quantities asked for; cost as `planned`, plus R products where the trace needs them."""
        s, found = self.settings, Found()
        model: ModelTrace | OpenTrace | str | None = None
        every = is_whole(s, self.operator.size, closed=self.network is not None)
        if self.network is not None:
            found.closed, model = closed_trace(self.operator, self.network, s.confidence)
        elif uses_trace(s):
            model = model_trace(self.operator, s, probed=needs_square(s), whole=every)
            every = every or is_whole(s, self.operator.size, model=model)
        if isinstance(model, str) and not every:
            found.notes.append(f"the trace comes from probes: {model}")
        closed = found.closed is not None
        if needs_run(s, model, closed=closed):
            self._extremes(found, every)
            self._density(found)
        if isinstance(model, ModelTrace):
            self._of_model(found, model)
        if found.closed is not None:
            self._exact_moments(found, found.closed)
        elif needs_forms(s, model):
            self._forms(found)
            if isinstance(model, OpenTrace):
                self._better(found, model)
            self._moments(found)
        trace = found.metrics.get("trace")
        if isinstance(trace, Estimate):
            found.warnings += shortfall(trace, s)
        return found

    def _extremes(self, found: Found, every: bool) -> None:
        s, op = self.settings, self.operator
        found.first = len(op.forms)
        which = [side for side in ("max", "min") if s.wants(f"lambda_{side}")]
        if s.top > 1 and "max" not in which:
            which.insert(0, "max")
        if every:
            found.krylov = whole(op)
        elif not which:
            found.krylov = lanczos(op, steps=min(DEFLATION_STEPS, op.size), seed=s.seed)
        if not which:
            return
        sides: dict[str, Any] = {"which": which, "top": s.top}
        if found.krylov is not None:
            result = extremes_of(op, found.krylov, **sides)
        else:
            sides |= {"max_steps": s.max_steps, "max_basis": self._max_basis(found)}
            result = extremes(op, rtol=s.rtol, seed=s.seed, warm=self.warm, **sides)
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

    def _forms(self, found: Found) -> None:
        s, op = self.settings, self.operator
        rtol = None if needs_square(s) else s.trace_rtol
        found.forms = forms_to(op, found.krylov, s.probes, s.seed, rtol)
        left = op.size - (found.krylov.size if found.krylov is not None else 0)
        drawn = left if found.forms.exact else len(found.forms.trace)
        found.first_form = len(op.forms) - drawn  # after those of the density, and those that said how many

    def _of_model(self, found: Found, model: ModelTrace) -> None:
        found.products, found.layers = model.products, model.layers
        found.metrics["trace"] = model.estimate

    def _better(self, found: Found, model: OpenTrace) -> None:
        """The trace by the way that knows it better, judged by pilots that it does not use."""
        assert found.forms is not None
        pilot, left = found.forms.trace[:PILOT], max(len(found.forms.trace) - PILOT, 1)
        ours = 0.0 if found.forms.exact else float(pilot.std(ddof=1)) / math.sqrt(left)
        if ours >= model.stderr:
            self._of_model(found, model.settle())
            return
        found.products = model.residual.products
        probed = self._probed(found, found.forms)
        self._of_probes(found, probed if found.forms.exact else probed.without(PILOT))
        found.notes.append(
            f"the trace comes from probes on H: their standard error was foreseen as {ours:.2g}, "
            f"that of tr(G) and probes on R as {model.stderr:.2g}"
        )

    def _probed(self, found: Found, forms: Forms) -> Probed:
        return Probed(self.operator, found.krylov, forms, found.first, found.first_form)

    def _of_probes(self, found: Found, probed: Probed) -> None:
        found.metrics["trace"] = probed.trace(self.settings.confidence)
        found.layers = probed.layers(self.settings.confidence)

    def _moments(self, found: Found) -> None:
        """Everything that follows from tr H and tr H²."""
        s, values = self.settings, found.forms
        if values is None:
            return
        trace = found.metrics.get("trace")
        if trace is None:
            self._of_probes(found, self._probed(found, values))
            trace = found.metrics["trace"]
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
        self._bounds(found, trace, square)

    def _exact_moments(self, found: Found, closed: ClosedForm) -> None:
        """The same by formula; probes of the density, if any, are held against it."""
        if found.forms is not None:
            found.warnings += contradiction(closed.trace, found.forms)
        if needs_square(self.settings):
            found.metrics |= {e.quantity: e for e in (closed.frobenius_squared, closed.effective_rank)}
            self._bounds(found, closed.trace, closed.frobenius_squared)

    def _bounds(self, found: Found, trace: Estimate, square: Estimate) -> None:
        s, op = self.settings, self.operator
        measured = {
            n: found.metrics[n].value if n in found.metrics else None for n in ("lambda_max", "lambda_min")
        }
        ws = wolkowicz_styan(trace, square, op.size, confidence=s.confidence, **measured)
        found.metrics |= {"ws_upper": ws.upper, "ws_lower": ws.lower}
        found.companions = (ws.inner_max, ws.spread, frobenius_bound(square, lambda_max=measured["lambda_max"]))
        if found.krylov is not None and found.krylov.size < op.size:
            found.companions += deflated_ws(found.krylov, trace, square, op.size, **measured)
        if found.closed is not None:
            found.companions += found.closed.blockwise(**measured)
