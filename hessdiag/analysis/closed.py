"""The closed form in the place of probes: when it is taken, and the trace it gives."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from hessdiag.analysis.needs import needs_square, planned, uses_trace
from hessdiag.analysis.population import by_batch, data_error
from hessdiag.analysis.traces import ModelTrace
from hessdiag.closed_form import ClosedForm, Recognized, affordable, exact_traces
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import Refused
from hessdiag.settings import PAIRED, Settings

FREE = 1e10  # multiply-adds: about a second on one core, not worth an error bar
PER_PRODUCT = 6  # multiply-adds per sample and weight: a product is two gradients of three matrix products each


def network_of(operator: Curvature, settings: Settings) -> Recognized | None:
    """The three-layer network whose closed form gives tr H and tr H², if something asked for rests on them.

    Taken where its multiply-adds are at most `FREE`, or at most those of the products that the same settings take
    without it. That counts and times nothing, so the same problem and settings have the same kinds of numbers on
    every machine; the whole measurement becomes at most twice as dear, as a rule cheaper.
    """
    if not (uses_trace(settings) or needs_square(settings)):
        return None
    products = planned(settings) + (PAIRED["probes"] if uses_trace(settings) else 0)
    each = PER_PRODUCT * operator.samples.examples * operator.size
    found = affordable(operator, max(FREE, products * each))
    return None if isinstance(found, Refused) else found


def closed_trace(operator: Curvature, network: Recognized, confidence: float) -> tuple[ClosedForm, ModelTrace]:
    """The closed form, and its trace with the error over data; its time is added to the operator's."""
    begun = time.perf_counter()
    closed = exact_traces(operator, network)
    value, samples = closed.trace.value, closed.per_sample.numpy()
    batches, ones = by_batch(operator, closed.per_batch.numpy()), np.ones(len(samples))
    data = data_error(samples, ones, value, confidence, what="examples", batches=batches)
    estimate = replace(closed.trace, data=data)
    operator.seconds += time.perf_counter() - begun
    return closed, ModelTrace(estimate, closed.layers, closed.trace.provenance.method)
