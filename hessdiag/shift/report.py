"""Shift tests of one or several checkpoints on the same shifted examples, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from hessdiag.errors import HessdiagError, Refused, UsageError, one_line
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet, draw
from hessdiag.shift.experiments import (
    CurveDifference,
    ShiftCurve,
    augmented,
    by_distance,
    compare,
    covariate_shift,
    other_source,
)
from hessdiag.shift.features import Weighted, nearest
from hessdiag.shift.images import correct, scorer
from hessdiag.shift.inputs import digest, rows
from hessdiag.shift.institutions import by_findings, other_institution
from hessdiag.shift.kept import KeptScores, Prepared
from hessdiag.shift.labels import labelled
from hessdiag.shift.power import Power, foreseen, powers
from hessdiag.shift.settings import COMPONENTS, FEATURES, TESTS, ShiftSettings
from hessdiag.shown import table

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("checkpoint", "test", "shift", "score", "stderr", "lo", "hi", "effective")


@dataclass(frozen=True)
class ShiftReport:
    """Curves by checkpoint and test, and what could not be tested.

    Attributes:
        curves: checkpoint to test to curve.
        refused: checkpoint to test to the reason why there is none.
        failures: checkpoints that could not be loaded, and why.
        reference: the checkpoint the others are compared with.
        settings: as asked.
    """

    curves: Mapping[str, Mapping[str, ShiftCurve]]
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    reference: str | None = None
    settings: ShiftSettings = field(default_factory=ShiftSettings)
    _compared: dict[str, tuple[CurveDifference, ...]] = field(default_factory=dict, repr=False, compare=False)

    def of_test(self, test: str) -> dict[str, ShiftCurve]:
        """The curves of one test, by checkpoint."""
        return {name: curves[test] for name, curves in self.curves.items() if test in curves}

    def differences(self, test: str) -> tuple[CurveDifference, ...]:
        """Each checkpoint against the reference in one test; none with fewer than two.

        Raises:
            UsageError: there is no such reference.
        """
        curves = self.of_test(test)
        if self.reference is not None and self.reference not in self.curves:
            msg = f"`reference={self.reference}`: there are {', '.join(self.curves)}"
            raise UsageError(msg)
        if len(curves) < 2 or (self.reference is not None and self.reference not in curves):
            return ()
        if test not in self._compared:
            self._compared[test] = compare(curves, reference=self.reference, seed=self.settings.seed)
        return self._compared[test]

    def powers(self, test: str) -> tuple[Power, ...]:
        """What the examples of a test tell apart; none where it found no error."""
        return powers(self.of_test(test), self.differences(test))

    def to_frame(self) -> pd.DataFrame:
        """Tidy: a row per checkpoint, test and level (columns `COLUMNS`)."""
        rows = [
            (name, test, p.shift, p.score, p.stderr, p.lo, p.hi, p.effective)
            for name, curves in self.curves.items()
            for test, one in curves.items()
            for p in one.points
        ]
        return table(rows, COLUMNS)

    def to_json(self) -> str:
        """One document: points, slopes, differences, refusals."""
        tests = [test for test in TESTS if self.of_test(test)]
        plain = {
            "schema": 1,
            "settings": asdict(self.settings),
            "curves": {
                name: {test: _plain(one) for test, one in curves.items()} for name, curves in self.curves.items()
            },
            "differences": {test: [asdict(one) for one in self.differences(test)] for test in tests},
            "power": {test: [asdict(one) for one in self.powers(test)] for test in tests},
            "refused": {name: dict(why) for name, why in self.refused.items()},
            "failures": dict(self.failures),
        }
        return json.dumps(plain, sort_keys=True, indent=1) + "\n"


def shift_curves(
    problem: Problem,
    settings: ShiftSettings,
    prepared: Prepared | None = None,
    *,
    say: Callable[[str], None] | None = None,
    kept: KeptScores | None = None,
) -> Iterator[tuple[str, ShiftCurve | Refused]]:
    """Every test asked for, or why it cannot be made.

    Cost: forward passes: one of the test split, one per strength of distortion, one of the other source. Principal
    components, weights and distances do not depend on the checkpoint: with one ``prepared`` for all of them they
    are computed once.

    Args:
        problem: the checkpoint and its data.
        settings: what is tested.
        prepared: shared by checkpoints.
        say: takes one line before the first checkpoint is tested: what so many examples can tell apart.
        kept: where forward passes are kept, for a run that goes on.

    Raises:
        UsageError: a split is missing.
        ProblemError: the model gives no classes.
    """
    asked = _Tests(problem, settings, prepared or Prepared(), kept or KeptScores(), say)
    if say is not None:
        asked.prepared.get("power", asked.of, lambda: say(foreseen(asked.test.examples, settings.confidence)))
    try:
        for name in settings.tests:
            try:
                found = getattr(asked, name)()
            except HessdiagError as error:
                found = Refused(one_line(error))
            yield name, found
    finally:
        asked.passes.end()


class _Tests:
    """The tests of one checkpoint, each a method of its name in `TESTS`."""

    def __init__(
        self,
        problem: Problem,
        settings: ShiftSettings,
        prepared: Prepared,
        kept: KeptScores,
        say: Callable[[str], None] | None,
    ) -> None:
        self.problem, self.settings, self.prepared = problem, settings, prepared
        self.train, self.test = (_samples(problem, split, settings) for split in (settings.train, settings.test))
        self.of = (self.train.digest, self.test.digest, settings)
        self.inputs, self._score = scorer(problem, self.test)
        self.known, _ = scorer(problem, self.train)
        self.scores = self._score(self.inputs)
        self.passes = kept.of(problem, (self.train, self.test), settings, self.scores, say)
        self.common: dict[str, Any] = {
            "seed": settings.seed,
            "confidence": settings.confidence,
            "notes": (*self.train.warnings, *self.train.notes, *self.test.warnings, *self.test.notes),
        }

    def score(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.passes.once("scores", partial(self._score, inputs))

    def labelled(self, samples: SampleSet) -> Any:
        return self.passes.once("labels", partial(labelled, self.problem, samples.batches))

    def covariate(self) -> ShiftCurve:
        s = self.settings

        def make() -> Weighted:
            x, y = rows(self.inputs, "inputs"), rows(self.known, "reference")
            drawn = {name: getattr(s, name) for name in ("shifts", "scale", "exclude", "seed")}
            return Weighted.of(x, y, components=_components(self.inputs, s), **drawn)

        made = self.prepared.get("weights", self.of, make)
        told = {**self.common, "weighted": made, "scale": s.scale}
        return covariate_shift(self.inputs, self.scores, reference=self.known, **told)

    def augmented(self) -> ShiftCurve:
        return augmented(self.inputs, self.score, strengths=self.settings.strengths, **self.common)

    def distance(self) -> ShiftCurve:
        def make() -> Any:
            return nearest(rows(self.inputs, "inputs"), rows(self.known, "reference"), "euclidean")

        made = self.prepared.get("distance", self.of, make)
        return by_distance(self.inputs, self.scores, reference=self.known, distance=made, **self.common)

    def other(self) -> ShiftCurve:
        s = self.settings
        source = _samples(self.problem, str(s.other), s)
        both = digest(self.inputs) + source.digest
        notes = (*self.common["notes"], *source.warnings, *source.notes)
        told = {**self.common, "notes": notes, "identity": both}
        if s.score == "accuracy" and not s.labels:
            other = self.passes.once("scores", partial(correct, self.problem, source.batches))
            return other_source(self.scores, other, **told)
        sets = (self.labelled(one) for one in (self.test, source))
        return other_institution(*sets, score=s.score, labels=s.labels, **told)

    def findings(self) -> ShiftCurve:
        s = self.settings
        told = {**self.common, "score": s.score, "labels": s.labels, "identity": digest(self.inputs)}
        return by_findings(self.labelled(self.test), **told)


def _samples(problem: Problem, split: str, settings: ShiftSettings) -> SampleSet:
    if split not in problem.data:
        msg = f"split {split}: the problem has {', '.join(problem.data)}"
        raise UsageError(msg)
    return draw(problem.data[split], split=split, samples=settings.samples, seed=settings.seed)


def _components(inputs: torch.Tensor, settings: ShiftSettings) -> int | None:
    if settings.components is not None:
        return settings.components
    return COMPONENTS if inputs[0].numel() > FEATURES else None


def _plain(one: ShiftCurve) -> dict[str, Any]:
    """Without the examples behind the curve, which are many."""
    return {
        "parameter": one.parameter,
        "points": [asdict(point) for point in one.points],
        "slope": asdict(one.slope) if one.slope else None,
        "cannot_tell": one.cannot_tell,
        "left_out": one.left_out,
        "confidence": one.confidence,
        "notes": list(one.notes),
    }
