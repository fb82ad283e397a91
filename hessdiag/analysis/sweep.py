"""The shared sweep: one Lanczos run gives the ends, shows the density and deflates the probes of every moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hessdiag.analysis.closed import closed_trace
from hessdiag.analysis.found import Found
from hessdiag.analysis.needs import TYPICAL, is_whole, needs_forms, needs_run, needs_square, uses_trace
from hessdiag.analysis.probed import Probed
from hessdiag.analysis.run import take_density, take_run, verified
from hessdiag.analysis.settled import contradiction, hold_whenever_ended, shortfall, with_trace
from hessdiag.analysis.so_far import Account
from hessdiag.analysis.spending import RUN_SHARE, Spending
from hessdiag.analysis.traces import ModelTrace, OpenTrace, model_trace
from hessdiag.closed_form import ClosedForm, Recognized
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import Refused
from hessdiag.results import Estimate, Metric
from hessdiag.results.interval import PILOT, watched
from hessdiag.settings import Settings
from hessdiag.spectral import (
    Forms,
    Goal,
    deflated_ws,
    effective_rank_from,
    forms,
    forms_for,
    frobenius_bound,
    frobenius_squared_from,
    trace_from,
    wolkowicz_styan,
)
from hessdiag.spectral.certificate import Watch
from hessdiag.spectral.deflation import FEWEST
from hessdiag.spectral.enough import probes_for
from hessdiag.spectral.measure import FEWEST_NODES
from hessdiag.spectral.warm import Warm


class Sweep:
    """One pass over what the settings ask for.

    Args:
        operator: checked and ready.
        settings: what is wanted, and how well.
        spending: what may be spent.
        network: the three-layer network that the operator is of, where its closed form is to give the traces.
        warm: what an earlier run left, for the extremes to start near.
        account: told of what has been found, whenever that is more.
        known: numbers that need no product (`hessdiag.analysis.structure`).
    """

    def __init__(
        self,
        operator: Curvature,
        settings: Settings,
        spending: Spending,
        network: Recognized | None = None,
        warm: Warm | None = None,
        account: Account | None = None,
        known: Mapping[str, Metric] | None = None,
    ) -> None:
        self.operator, self.settings, self.spending = operator, settings, spending
        self.network, self.warm = network, warm
        self.account = account or Account(None, settings, lambda: 0, 0)
        self.confidence = settings.confidence
        self.known = known or {}

    def run(self) -> Found:
        """All quantities asked for; cost as `planned`, plus R products where the trace needs them."""
        s, found = self.settings, Found(metrics=dict(self.known))
        if set(s.quantities) <= set(self.known):
            return found
        closed = self.network is not None
        every = is_whole(s, self.operator.size, closed=closed)
        if needs_run(s, closed=closed):
            self._run(found, every)
            self.account.of_stage(found)
        with self.spending.aside():
            model = self._model(found, every)
        if found.krylov is None and needs_run(s, model, closed=closed):
            self._run(found, is_whole(s, self.operator.size, model=model))
        if isinstance(model, ModelTrace):
            self._of_model(found, model)
            self.account.of_stage(found)
        if needs_forms(s, model) and not closed and self._may_begin(found, "trace", "frobenius_squared"):
            self._forms(found)
            if isinstance(model, OpenTrace):
                self._better(found, model)
        self.operator.room = self.spending.room()
        take_density(self.operator, s, found)
        if found.closed is not None:
            self._exact_moments(found, found.closed)
        else:
            self._moments(found)
        found.warnings += shortfall(found, s, self.spending.why)
        hold_whenever_ended(found, s.confidence, self.confidence)
        if self.spending.interrupted or (found.warnings and self.spending.why):
            found.warnings.insert(0, self.spending.why)
        self.account.of_stage(found)
        return found

    def _run(self, found: Found, every: bool) -> None:
        s, op = self.settings, self.operator
        follow = (needs_square(s) or uses_trace(s)) and self.network is None
        modelled = uses_trace(s) and op.problem.has_outputs  # the trace needs no probes, as a rule
        goal, later = self._goal(trace=not modelled), None

        def step(watch: Watch) -> None:
            nonlocal later
            if s.budget is not None and watch.run.products >= FEWEST_NODES:
                probes = (s.probes or probes_for(watch.run.krylov(), goal)) if needs_square(s) else 0
                later = None if probes is None else probes + (self.spending.for_model if modelled else 0)
            self.account.of_run(watch)

        op.room = self.spending.room(
            RUN_SHARE if follow else 1.0, keep=verified(s), first=TYPICAL["lambda_max"], later=lambda: later
        )
        take_run(
            op, s, found, every=every, warm=self.warm, on_step=step if s.budget or self.account.look else None
        )

    def _goal(self, *, trace: bool) -> Goal:
        s, known = self.settings, self.settings.known_to
        square = known.frobenius_squared if needs_square(s) else None
        return Goal(known.trace if trace else None, square, s.confidence, s.most_probes)

    def _may_begin(self, found: Found, *quantities: str) -> bool:
        """Whether a further stage may begin; where it may not, what will be missing is said."""
        if self.spending.room()() >= FEWEST:
            return True
        missing = [name for name in quantities if self.settings.wants(name) and name not in found.metrics]
        if missing:
            found.warnings.append(f"not reached before the end: {', '.join(missing)}, and what follows from them")
        return False

    def _model(self, found: Found, every: bool) -> ModelTrace | OpenTrace | Refused | None:
        """The trace by way of the model, or why there is none; None where nobody asks for it."""
        s, op = self.settings, self.operator
        if self.network is not None:
            if not self._may_begin(found, "trace", "frobenius_squared"):
                return None
            found.closed, model = closed_trace(op, self.network, s.confidence)
            return model
        if not uses_trace(s):
            return None
        op.room = self.spending.room(keep=PILOT if self.spending.by_clock else 0)
        trace = (
            Refused("it was ended early")
            if op.left < FEWEST
            else model_trace(op, s, probed=needs_square(s), whole=every)
        )
        if isinstance(trace, Refused) and not every:
            found.notes.append(f"the trace comes from probes: {trace.reason}")
        return trace

    def _forms(self, found: Found) -> None:
        s, op, krylov = self.settings, self.operator, found.krylov
        op.room = self.spending.room()
        with op.recorded() as record:
            if s.probes is not None or krylov is None or krylov.exhausted:
                found.forms = forms(op, krylov, s.most_probes, s.seed, on_block=self.account.of_probes)
            else:
                goal = self._goal(trace="trace" not in found.metrics)
                found.forms = forms_for(op, krylov, goal, s.seed, on_block=self.account.of_probes)
        if self.spending.interrupted and self.account.looks:
            self.confidence = watched(s.confidence, self.account.looks)
        known, before = (krylov.size, krylov.products) if krylov is not None else (0, 0)
        last = op.size - known if found.forms.exact else len(found.forms.trace)
        found.probes = record.first(found.forms.products - before).last(last)  # what came after was dropped

    def _of_model(self, found: Found, model: ModelTrace) -> None:
        found.layers = model.layers
        found.metrics["trace"] = model.estimate

    def _better(self, found: Found, model: OpenTrace) -> None:
        """The trace by the way that knows it better, judged by pilots that it does not use."""
        assert found.forms is not None
        few = len(found.forms.trace) < PILOT + FEWEST or self.operator.left < 2 * PILOT
        if few and not found.forms.exact:  # nothing is left to choose with
            return self._of_probes(found, self._probed(found, found.forms))
        pilot, left = found.forms.trace[:PILOT], max(len(found.forms.trace) - PILOT, 1)
        ours = 0.0 if found.forms.exact else float(pilot.std(ddof=1)) / math.sqrt(left)
        if ours >= model.stderr:
            return self._of_model(found, model.settle())
        probed = self._probed(found, found.forms)
        self._of_probes(found, probed if found.forms.exact else probed.without(PILOT))
        found.notes.append(
            f"the trace comes from probes on H: their standard error was foreseen as {ours:.2g}, "
            f"that of tr(G) and probes on R as {model.stderr:.2g}"
        )
        return None

    def _probed(self, found: Found, forms: Forms) -> Probed:
        return Probed(self.operator, found.krylov, forms, found.run, found.probes)

    def _of_probes(self, found: Found, probed: Probed) -> None:
        found.metrics["trace"] = probed.trace(self.confidence)
        found.layers = probed.layers(self.confidence)

    def _moments(self, found: Found) -> None:
        """Everything that follows from tr H and tr H²."""
        values = found.forms
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
            trace = trace_from(values, confidence=self.confidence)  # of the same probes as tr H²: used jointly
        if not isinstance(trace, Estimate):
            return
        found.convergence = with_trace(found.convergence, values, self.confidence)
        square = frobenius_squared_from(values, confidence=self.confidence)
        rank = effective_rank_from(values, confidence=self.confidence)
        found.metrics |= {"frobenius_squared": square, "effective_rank": rank}
        self._bounds(found, trace, square)

    def _exact_moments(self, found: Found, closed: ClosedForm) -> None:
        """The same by formula."""
        if needs_square(self.settings):
            found.metrics |= {e.quantity: e for e in (closed.frobenius_squared, closed.effective_rank)}
            self._bounds(found, closed.trace, closed.frobenius_squared)

    def _bounds(self, found: Found, trace: Estimate, square: Estimate) -> None:
        op = self.operator
        measured = {
            n: found.metrics[n].value if n in found.metrics else None for n in ("lambda_max", "lambda_min")
        }
        if op.semidefinite:  # beside zero a negative bound is no multiple of anything
            measured["lambda_min"] = None
        ws = wolkowicz_styan(trace, square, op.size, confidence=self.confidence, **measured)
        found.metrics |= {"ws_upper": ws.upper, "ws_lower": ws.lower}
        found.other_bounds = (ws.inner_max, ws.spread, frobenius_bound(square, lambda_max=measured["lambda_max"]))
        if found.krylov is not None and found.krylov.size < op.size:
            found.other_bounds += deflated_ws(found.krylov, trace, square, op.size, **measured)
        if found.closed is not None:
            found.other_bounds += found.closed.blockwise(**measured)
