"""How the moments settled: for the reader to judge, and where they fall short of what was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from hessdiag.analysis.found import Found
from hessdiag.results import Convergence, Estimate, Metric
from hessdiag.results.interval import mean_interval
from hessdiag.settings import Settings
from hessdiag.spectral import Forms, trace_from
from hessdiag.spectral.enough import size_of_trace

M = TypeVar("M", bound=Metric)
BEYOND = 1.4  # of the half interval asked for: from 8 probes it is itself known to a quarter


def with_trace(convergence: Convergence, values: Forms, confidence: float) -> Convergence:
    """The running mean of the trace forms and half its interval, from the second probe on."""
    samples = values.trace
    if values.exact or len(samples) < 3 or float(np.ptp(samples)) == 0:
        return convergence
    means, halves = [], []
    for n in range(2, len(samples) + 1):
        _, lo, hi = mean_interval(samples[:n], confidence)
        means.append(float(samples[:n].mean()))
        halves.append((hi - lo) / 2)
    return replace(convergence, trace_mean=tuple(means), trace_half_width=tuple(halves))


def shortfall(found: Found, settings: Settings, why: str) -> list[str]:
    """Which moments are known less well than asked, and what would mend it.

    Args:
        found: everything.
        settings: what was asked for.
        why: it ended early; empty where it did not.
    """
    forms, asked = found.forms, settings.probes
    if asked is not None and forms is not None and not forms.exact and len(forms.trace) < asked:
        return [f"{len(forms.trace)} of the {asked} probes asked for were drawn: it was ended early"]
    return _wide(found.metrics, settings, ended=bool(why))


def _wide(metrics: Mapping[str, Metric], settings: Settings, *, ended: bool) -> list[str]:
    found: list[str] = []
    if settings.probes is not None:
        return found
    square = metrics.get("frobenius_squared")
    for name in ("trace", "frobenius_squared"):
        metric = metrics.get(name)
        if not isinstance(metric, Estimate) or metric.kind != "probes":
            continue
        size = metric.value
        if name == "trace":
            size = size_of_trace(size, square.value if square is not None else 0.0)
        asked, reached = getattr(settings.known_to, name), (metric.hi - metric.lo) / 2 / max(size, 1e-300)
        if reached > BEYOND * asked:
            needed = math.ceil(len(metric.per_probe) * (reached / asked) ** 2)
            cure = "it was ended early" if ended else f"take `probes={needed}`"
            found.append(f"{name} is known to {reached:.2g} of its size, asked was {asked:.2g}: {cure}")
    return found


def hold_whenever_ended(found: Found, asked: float, made: float) -> None:
    """Intervals that a person may have ended because of hold as asked where they were made for that.

    Args:
        found: everything.
        asked: confidence that was asked for.
        made: confidence at which intervals over probes were made; the same where nobody ended it or saw them.
    """
    if asked == made:
        return

    def held(metric: M) -> M:
        return replace(metric, confidence=asked) if metric.confidence == made else metric

    found.metrics = {name: held(metric) for name, metric in found.metrics.items()}
    found.other_bounds = tuple(held(bound) for bound in found.other_bounds)
    found.notes.append(
        "it was ended by somebody who saw the numbers: intervals over probes are the wider ones that hold "
        "whatever made them end it"
    )


def contradiction(exact: Estimate, values: Forms) -> list[str]:
    """The exact trace against the probes of the same sweep: independent ways to one number."""
    if values.exact or len(values.trace) < 8:
        return []
    probed = trace_from(values)
    # where H is next to diagonal all probes say the same, to rounding
    rounding = values.floor * math.sqrt(values.dimension * float(values.squares.mean()))
    slack = rounding + (exact.hi - exact.lo) / 2
    off = (abs(probed.value - exact.value) - slack) / max(probed.stderr, 1e-300)
    if off <= 7:  # t with 31 degrees of freedom passes 7 once in 10 million
        return []
    return [f"the exact trace is {off:.1f} standard errors from the probes': do not trust either, and report this"]
