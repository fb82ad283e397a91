"""A live model, measured again and again: each time near the last answer; a refusal is a point with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hessdiag.analysis.measurement import Measurement
from hessdiag.engine.products.group import ALONE, Group
from hessdiag.engine.products.preconditioned import preconditioner_for
from hessdiag.errors import HessdiagError, MeasurementError, Refused, one_line
from hessdiag.problem import Problem
from hessdiag.results import Fingerprint
from hessdiag.samples import SampleSet
from hessdiag.settings import Settings
from hessdiag.sources.facts import facts
from hessdiag.spectral.warm import Warm
from hessdiag.track import pacing
from hessdiag.track.follow import number, rate_of
from hessdiag.track.loggers import say
from hessdiag.track.measured import Measured, name_of
from hessdiag.track.trajectory import PRECONDITIONED, Point, Rate


class Watch:
    """Measures one model again and again.

    Args:
        problem: its model is the one in training.
        settings: of every measurement.
        samples: of every measurement.
        group: the ranks that measure together.

    Attributes:
        notes: one-line facts about the whole.
    """

    def __init__(self, problem: Problem, settings: Settings, samples: SampleSet, group: Group = ALONE) -> None:
        self.problem, self.settings, self.samples, self.group = problem, settings, samples, group
        self.notes: list[str] = []
        self._told: set[str] = set()
        self._warm: Warm | None = None
        self._first: Fingerprint | None = None

    def measure(self, step: int, lr: float | None) -> Measured:
        """What is found now; never raises for what the model, its loss or its data do."""
        begun, refused, warm = pacing.clock(), dict[str, str](), None
        rate, known = self._rate(lr)
        analysis, reason = None, ""
        try:
            with self.group.together():
                measurement = Measurement(self.problem, self._measurable(refused), self.samples, self.group)
                warm = self._warm if self._fits(measurement) else None
                analysis = measurement.run(warm=warm).about(name_of(step))
                self._require_same(analysis.fingerprint)
                self._warm = measurement.left or self._warm
        except Exception as error:  # whatever it is, training goes on
            kind = "" if isinstance(error, HessdiagError) else f"{type(error).__name__}: "
            analysis, reason = None, kind + one_line(error)
            self.tell(f"step {step} was not measured: {reason}", key=reason)
        point = Point(
            name=name_of(step),
            path="",
            analysis=analysis,
            error=reason,
            rate=rate,
            warm=analysis is not None and warm is not None,
            at=step,
        )
        return Measured(step=step, point=point, lr=known, seconds=pacing.clock() - begun, refused=refused)

    def tell(self, line: str, *, key: str) -> None:
        """Say a line, once for each key, and keep it as a note."""
        if key not in self._told:
            self._told.add(key)
            self.notes.append(line)
            if self.group.rank == 0:
                say.warning("hessdiag: %s", line)

    def state(self) -> dict[str, Any]:
        """In types that ``torch.load(weights_only=True)`` takes."""
        warm = None if self._warm is None else {"direction": self._warm.direction, "turn": self._warm.turn}
        return {"warm": warm, "notes": list(self.notes), "told": sorted(self._told)}

    def resume(self, state: Mapping[str, Any], points: Sequence[Point]) -> None:
        """Go on after these points."""
        warm = state["warm"]
        self._warm = None if warm is None else Warm(**warm)
        self.notes, self._told = list(state["notes"]), set(state["told"])
        self._first = next((p.analysis.fingerprint for p in points if p.analysis is not None), None)

    def _measurable(self, refused: dict[str, str]) -> Settings:
        """The settings of this step; what the optimizer cannot say yet is left out, with the reason."""
        settings = self.settings
        if self._first is not None:  # loss and gradient were compared with the model's own
            settings = replace(settings, second_opinion=False)
        others = tuple(name for name in settings.quantities if name != PRECONDITIONED)
        if others and len(others) < len(settings.quantities):
            try:
                preconditioner_for(self.problem)
            except HessdiagError as error:
                refused[PRECONDITIONED] = one_line(error)
                return replace(settings, quantities=others)
        return settings

    def _fits(self, measurement: Measurement) -> bool:
        return self._warm is not None and self._warm.direction.numel() == measurement.operator.size

    def _require_same(self, found: Fingerprint) -> None:
        """Refuse what is about other parameters than the first measurement.

        Raises:
            MeasurementError: some were frozen, unfrozen or added since.
        """
        self._first = self._first or found
        if found.params_sha256 != self._first.params_sha256:
            msg = (
                f"{found.n_params:,} parameters count now, {self._first.n_params:,} at first: a trajectory has "
                "one set of them; name those that stay with `params`, or start another tracker"
            )
            raise MeasurementError(msg)

    def _rate(self, lr: float | None) -> tuple[Rate | None, float]:
        """The optimizer's step where it has a limit, and the learning rate; NaN where nobody says it."""
        told = self._of_optimizer()
        given = told if lr is None else {**told, "lr": lr}
        if not told and lr is not None:
            step = rate_of(lr, {}, self.problem.meta)
        else:
            step = rate_of(None, given, self.problem.meta)
        if isinstance(step, Refused):
            if step.reason not in self.notes:
                self.notes.append(step.reason)
            step = None
        rate = number(given.get("lr"))
        return step, math.nan if rate is None else rate

    def _of_optimizer(self) -> Mapping[str, Any]:
        optimizer = self.problem.optimizer
        groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
        groups = groups or getattr(optimizer, "param_groups", None)
        return facts({"optimizer": {"param_groups": list(groups)}}, Path()) if groups else {}
