"""The spectrum along training: checkpoint after checkpoint on the same samples, each near the one before."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hessdiag.analysis.measurement import Measurement
from hessdiag.errors import LoadError, MeasurementError, ProblemError, Refused, one_line
from hessdiag.results import Analysis, Fingerprint
from hessdiag.results.fingerprint import SUBJECT
from hessdiag.settings import Settings
from hessdiag.sources.factory import Built
from hessdiag.spectral.warm import Warm
from hessdiag.track.trajectory import Point, Rate


class Run(Protocol):
    """Measures."""

    def __call__(self, measurement: Measurement, /, *, warm: Warm | None) -> Analysis:
        """As `Measurement.run`."""


RATES = ("lr", "learning_rate")
OPTIMIZERS = ("optimizer", "optim", "opt", "optimizer_name")
ADAPTIVE = re.compile(
    r"ada(m|grad|delta|factor|belief|bound|max|n\b)|rms_?prop|lion|lamb|sophia|shampoo|muon|soap|prodigy|rprop",
    re.I,
)
"""Names of optimizers whose step is no gradient times a rate."""
OF_ONE = (LoadError, MeasurementError, ProblemError)
"""Refusals that are about one checkpoint, not about what was asked for."""


def rate_of(asked: float | None, facts: Mapping[str, Any], meta: Mapping[str, Any]) -> Rate | Refused | None:
    """The step of a checkpoint's optimizer; None where none is named, refused where the one named has no limit.

    ``lr`` comes before what the checkpoint says of itself (a schedule moves it), that before ``problem.meta``.
    Momentum comes from the first of checkpoint and meta that names it. `Adam` and its like have no such limit,
    whichever of the two names them.
    """
    beside = {**meta, **facts}
    momentum = number(beside.get("momentum")) or 0.0
    nesterov = beside.get("nesterov") is True
    if not 0 <= momentum < 1:
        return Refused(f"the momentum is {momentum:g}, it must be 0 to less than 1: no limit on λ_max is known")
    if asked is not None:
        return Rate(lr=asked, momentum=momentum, nesterov=nesterov, origin="lr")
    if _adaptive(facts) or _adaptive(meta):
        return Refused(
            "the optimizer scales each direction by itself, so 2/η is no limit on λ_max: none is given; "
            "its own is that of preconditioned_lambda_max"
        )
    for origin, source in (("checkpoint", facts), ("problem.meta", meta)):
        for name in RATES:
            if rate := positive(source.get(name)):
                return Rate(lr=rate, momentum=momentum, nesterov=nesterov, origin=origin)
    return None


def _adaptive(source: Mapping[str, Any]) -> bool:
    """Whether an optimizer that scales each direction by itself is named."""
    texts = (source.get(name) for name in OPTIMIZERS)
    named = any(isinstance(text, str) and ADAPTIVE.search(text) is not None for text in texts)
    return source.get("adaptive") is True or named


def number(value: Any) -> float | None:
    """What a checkpoint or a problem says, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def positive(value: Any) -> float | None:
    """The same, if it is above 0."""
    found = number(value)
    return found if found is not None and found > 0 else None


@dataclass
class Follower:
    """Measures one checkpoint after another; `point` never raises for what is one checkpoint's own fault.

    Attributes:
        settings: the same for all.
        lr: learning rate that counts before all others.
        recall: finished measurement of a key, if there is one.
        keep: takes a key, the checkpoint's name and its finished measurement.
        say: takes lines for the reader, the forecast of the cost among them; None: none is made.
        warm_start: start the extremes near the checkpoint before (`hessdiag.spectral.warm` has what it is worth).
    """

    settings: Settings
    lr: float | None = None
    recall: Callable[[str, str], Analysis | None] = lambda _key, _name: None
    keep: Callable[[str, str, Analysis], None] = lambda _key, _name, _analysis: None
    say: Callable[[str], None] | None = None
    warm_start: bool = True
    notes: list[str] = field(default_factory=list)
    _warm: Warm | None = None
    _first: Fingerprint | None = None
    _measuring: bool = False
    _told: set[str] = field(default_factory=set)

    def point(self, name: str, path: str, load: Callable[[], Built], run: Run = Measurement.run) -> Point:
        """Measure a checkpoint; cost as `hessdiag.analyze`.

        Args:
            name: short.
            path: of the file.
            load: builds the problem with its weights.
            run: measures, given a measurement that is ready and what the checkpoint before left.

        Raises:
            UsageError: what is asked for contradicts itself: no checkpoint could be measured.
        """
        try:
            built = load()
            measurement = Measurement(built.problem, self.settings)
            self._require_same(measurement.fingerprint)
            step = rate_of(self.lr, built.weights.facts if built.weights else {}, built.problem.meta)
            rate, why = (None, step.reason) if isinstance(step, Refused) else (step, "")
            self._tell(*built.notes, why)
            self.notes += [why] if why and why not in self.notes else []
            key = measurement.key
            found = self.recall(key, name)
            if found is not None:
                self._warm = None  # what it found of the eigenvectors was not kept
                return Point(name=name, path=path, analysis=found, rate=rate, reused=True)
            warm = self._warm if self.warm_start else None
            if not self._measuring:
                self._measuring = True
                if self.say is not None:
                    self.say(f"each: {measurement.forecast()}")
            result = run(measurement, warm=warm)
        except OF_ONE as error:
            return Point(name=name, path=path, error=one_line(error))
        result = result.about(name, built.notes, built.weights.sha256 if built.weights else None)
        self._warm = measurement.left
        if measurement.repeatable:
            self.keep(key, name, result)
        return Point(name=name, path=path, analysis=result, rate=rate, warm=warm is not None)

    def _require_same(self, fingerprint: Fingerprint) -> None:
        """Refuse a checkpoint whose numbers are about something else than the first's."""
        if self._first is None:
            self._first = fingerprint
        moved = [name for name in SUBJECT if fingerprint[name] != self._first[name]]
        if moved:
            msg = (
                f"its {', '.join(moved)} differ from the first checkpoint's: a trajectory needs one architecture, "
                "and a factory that gives the same examples every time"
            )
            raise MeasurementError(msg)

    def _tell(self, *lines: str) -> None:
        for line in lines:
            if line and line not in self._told:
                self._told.add(line)
                if self.say is not None:
                    self.say(line)
