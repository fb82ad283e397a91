"""What a measurement knows at a moment, for whoever watches it; nothing is computed for it but two means."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hessdiag.accuracy import Accuracy
from hessdiag.analysis.found import Found
from hessdiag.results.interval import watched
from hessdiag.settings import Settings
from hessdiag.spectral import Forms, frobenius_squared_from, trace_from
from hessdiag.spectral.certificate import Watch
from hessdiag.spectral.enough import size_of_trace

State = Literal["waiting", "narrowing", "known"]

PAUSE = 0.2  # seconds between two looks: a reader sees no more, and a small network forms 500 products in one
WAITS = {
    "lambda_max": "the run",
    "lambda_min": "the run",
    "density": "the run",
    "negative_mass": "the density",
    "preconditioned_lambda_max": "its own run",
    "trace": "gradients or probes",
    "frobenius_squared": "the probes",
}
DERIVED = "trace, ‖H‖_F²"


@dataclass(frozen=True, slots=True)
class Row:
    """A quantity at a moment.

    Attributes:
        quantity: its name.
        value: None while there is none; a density has an error only.
        lo: lower end of an interval that holds at whatever moment the measurement is ended; None while there is
            none.
        hi: upper end.
        state: "waiting" for something else, "narrowing", or "known" as well as it will be.
        reached: how well it is known, in the terms of `hessdiag.accuracy.Accuracy`; None where that has no terms.
        asked: how well it is to be known.
        waits: what it waits for; empty while it is narrowed and when it is known.
    """

    quantity: str
    value: float | None = None
    lo: float | None = None
    hi: float | None = None
    state: State = "waiting"
    reached: float | None = None
    asked: float | None = None
    waits: str = ""


@dataclass(frozen=True, slots=True)
class SoFar:
    """Everything asked for, at a moment.

    Attributes:
        rows: one per quantity asked for, in their order.
        products: formed so far.
        foreseen: products that everything takes, about.
        probes: drawn so far.
    """

    rows: tuple[Row, ...]
    products: int
    foreseen: int
    probes: int = 0


Look = Callable[[SoFar], None]


class Account:
    """Keeps the rows of a sweep and tells them, a few times per second.

    Args:
        look: whom to tell; None for nobody, and then nothing is done.
        settings: what was asked for.
        products: formed so far.
        foreseen: products that everything takes, about.

    Attributes:
        looks: intervals over probes that were told: who saw them may have ended the measurement because of them.
    """

    def __init__(self, look: Look | None, settings: Settings, products: Callable[[], int], foreseen: int) -> None:
        self.look, self.settings, self.products, self.foreseen = look, settings, products, foreseen
        self.looks = self._probes = 0
        self._told, self._final = -math.inf, set[str]()
        self._rows = {name: Row(name, waits=WAITS.get(name, DERIVED)) for name in settings.quantities}

    def tell(self, *, now: bool = False) -> None:
        """Tell the rows, unless that was done just before."""
        if self.look is None or not (now or time.perf_counter() - self._told >= PAUSE):
            return
        done = self.products()
        self.look(SoFar(tuple(self._rows.values()), done, max(self.foreseen, done), self._probes))
        self._told = time.perf_counter()

    def of_run(self, watch: Watch) -> None:
        """A product of the run more."""
        if self.look is None:
            return
        asked, (_, high, low, upper, lower) = self.settings.known_to, watch.history[-1]
        radius = max(abs(high), abs(low), 1e-300)
        if "max" in watch.which:
            self._end("lambda_max", high, high, upper, (upper - high) / max(abs(high), 1e-300), asked)
        if "min" in watch.which:
            self._end("lambda_min", low, lower, low, (low - lower) / radius, asked)
        if watch.depth is not None:
            self._put(_narrowing("density", reached=watch.depth, asked=asked.density))
        self.tell()

    def _end(self, name: str, value: float, lo: float, hi: float, reached: float, asked: Accuracy) -> None:
        if not math.isfinite(hi - lo):
            self._put(Row(name, value, state="narrowing"))
            return
        self._put(_narrowing(name, value, lo, hi, reached=reached, asked=getattr(asked, name)))

    def of_probes(self, forms: Forms) -> None:
        """A block of probes more."""
        if self.look is None:
            return
        self.looks += 1
        self._probes = len(forms.trace)
        sure = watched(self.settings.confidence, self.looks)
        trace, square = trace_from(forms, confidence=sure), frobenius_squared_from(forms, confidence=sure)
        sizes = {"trace": size_of_trace(trace.value, square.value), "frobenius_squared": square.value}
        for estimate in (trace, square):
            name = estimate.quantity
            if name not in self._final:
                reached = (estimate.hi - estimate.lo) / 2 / max(sizes[name], 1e-300)
                asked = getattr(self.settings.known_to, name)
                row = _narrowing(name, estimate.value, estimate.lo, estimate.hi, reached=reached, asked=asked)
                self._put(row)
        self.tell()

    def of_stage(self, found: Found) -> None:
        """What has been found for good."""
        if self.look is None:
            return
        for name, metric in found.metrics.items():
            self._put(Row(name, metric.value, metric.lo, metric.hi, "known"))
            self._final.add(name)
        if found.spectrum is not None:
            self._put(Row("density", state="known", reached=found.spectrum.error or None))
        self.tell(now=True)

    def _put(self, row: Row) -> None:
        if row.quantity in self._rows:
            self._rows[row.quantity] = row


def _narrowing(
    name: str,
    value: float | None = None,
    lo: float | None = None,
    hi: float | None = None,
    *,
    reached: float,
    asked: float,
) -> Row:
    return Row(name, value, lo, hi, "known" if reached <= asked else "narrowing", reached, asked)
