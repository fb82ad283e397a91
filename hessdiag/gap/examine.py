"""A checkpoint becomes a `CheckpointRecord`: performance on every split, every measure, and the guard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from hessdiag.analysis import Measurement
from hessdiag.analysis.measurement import Progress
from hessdiag.engine.landscape.landscape import Landscape
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import Refused, UsageError
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.guard import attempted, guard, remade
from hessdiag.gap.performance import FLOOR, Examples, Performance, performance
from hessdiag.gap.record import CheckpointRecord, Moved
from hessdiag.gap.registry import Measure, Reading, registry
from hessdiag.gap.settings import GapSettings
from hessdiag.option import hint, options_of
from hessdiag.problem import Problem, matching
from hessdiag.results import QUANTITIES
from hessdiag.samples import divide, draw
from hessdiag.settings import PAIRED, Settings

CURVATURE = tuple(name for name in QUANTITIES if name not in ("density", "negative_mass"))


@dataclass(frozen=True, kw_only=True)
class Examination(GapSettings):
    """What is asked of every checkpoint: the options of a report, and how its curvature is measured.

    Attributes:
        settings: of the curvature; the split it is measured on is the training split.
        floor: training loss that counts as reached.
    """

    settings: Settings = field(default_factory=lambda: Settings(quantities=CURVATURE, **PAIRED))
    floor: float = FLOOR

    @classmethod
    def of(cls, **options: Any) -> Examination:
        """What ``hessdiag gap`` asks for with these options, the others at its defaults.

        Args:
            **options: fields of `GapSettings` and of `hessdiag.Settings`.

        Raises:
            OptionError: an unknown value, or one out of range.
            TypeError: an unknown name.

        >>> from hessdiag.survey import Examination
        >>> asked = Examination.of(measures=("trace",), samples=256)
        >>> asked.settings.samples, asked.settings.probes, asked.guard
        (256, 32, True)
        """
        own = {name: options.pop(name) for name in options_of(GapSettings) if name in options}
        return cls(settings=Settings(**{"quantities": CURVATURE, **PAIRED, **options}), **own)

    def chosen(self) -> dict[str, Measure]:
        """The measures asked for.

        Raises:
            UsageError: a glob matches none.
        """
        every = registry()
        globs = [glob.strip() for given in self.measures for glob in given.split(",") if glob.strip()] or ["*"]
        for glob in globs:
            if not matching(every, (glob.removeprefix("!"),)):
                wrong = glob.removeprefix("!")
                msg = f"`measures={wrong}`: no such measure; {hint(wrong, tuple(every))}"
                raise UsageError(msg)
        return {name: every[name] for name in matching(every, globs)}


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a checkpoint before it is measured.

    Attributes:
        name: in tables.
        file: as given.
        sha256: of it.
        facts: of the run, beside ``Problem.meta``, which counts where both say something.
        notes: to be kept with the record.
    """

    name: str = "checkpoint"
    file: str = ""
    sha256: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def examine(
    problem: Problem,
    asked: Examination,
    about: About,
    *,
    start: Mapping[str, Tensor] | None = None,
    report: Progress | None = None,
    say: Callable[[str], None] | None = None,
    expect: Callable[[float], None] | None = None,
) -> CheckpointRecord:
    """Everything a report says of one checkpoint.

    Cost: a curvature analysis (`Measurement.forecast`), the measures (each states its own), both again with
    the guard; a forward pass of every split.

    Args:
        problem: with its weights.
        asked: what is wanted.
        about: what is known of it.
        start: weights before training, by name.
        report: called with (stage, done, total).
        say: takes one line, what it will cost, before it begins.
        expect: takes the seconds that the analysis will take, before it begins; costs a product or two.

    Raises:
        UsageError: a split is missing.
        MeasurementError: the products cannot be believed.
    """
    begun, watch = time.perf_counter(), report or (lambda *_: None)
    measures = asked.chosen()
    measurement = Measurement(problem, asked.settings)
    if say is not None:
        more = "the measures" + " and the guard" * asked.guard
        say(f"{about.name}: {measurement.forecast()} for its curvature alone; {more} often take over 5 times that")
    if expect is not None and not measurement.checked.texts("fault"):
        expect(measurement.foreseen.seconds)
    analysis = measurement.run(progress=report)
    operator = measurement.operator
    known: dict[str, Any] = {"analysis": analysis, "start": start, "facts": about.facts}
    checkpoint = Checkpoint(operator.problem, measurement.samples, operator, seed=asked.settings.seed, **known)
    readings = {}
    for index, (key, one) in enumerate(measures.items()):
        watch(f"measures: {key}", index, len(measures))
        readings[key] = attempted(one, checkpoint)
    watch("guard" if asked.guard else "performance", 0, 1)
    twin = _rescaled(checkpoint, measures, readings) if asked.guard else _Twin("the guard was not asked for")
    found, evaluated, said = _performance(problem, asked, operator)
    return CheckpointRecord(
        name=about.name,
        file=about.file,
        sha256=about.sha256,
        meta=checkpoint.meta,
        performance=found,
        readings=readings,
        guard=twin.moved,
        rescaled=twin.where,
        fingerprint=measurement.fingerprint,
        gradient_share=_gradient_share(checkpoint),
        loss=checkpoint.loss,
        first_loss=float(checkpoint.operator.batch_losses[0]),
        batch_norm=any(isinstance(module, _BatchNorm) for _, module in operator.function.modules()),
        products=operator.products + twin.products,
        seconds=time.perf_counter() - begun,
        model_seconds=operator.seconds + evaluated + twin.seconds,
        notes=tuple(dict.fromkeys((*about.notes, *analysis.warnings, *said))),
    )


@dataclass(frozen=True)
class _Twin:
    """What the guard found at the rescaled weights, and what it cost."""

    where: str
    moved: Mapping[str, Moved] = field(default_factory=dict)
    products: int = 0
    seconds: float = 0.0


def _rescaled(
    checkpoint: Checkpoint, measures: Mapping[str, Measure], readings: Mapping[str, Reading | Refused]
) -> _Twin:
    twins: list[Checkpoint] = []

    def again(problem: Problem, before: Checkpoint) -> Checkpoint:
        twins.append(remade(problem, before))
        return twins[-1]

    guarded = guard(checkpoint, measures, readings, again=again)
    if isinstance(guarded.rescaling, Refused):
        return _Twin(guarded.rescaling.reason)
    moved = {
        key: Moved(verdict=one.verdict, after=None if isinstance(one.after, Refused) else one.after.value)
        for key, one in guarded.measures.items()
    }
    operator = twins[0].operator
    return _Twin(", ".join(guarded.rescaling.places), moved, operator.products, operator.seconds)


def _gradient_share(checkpoint: Checkpoint) -> float:
    """‖∇L‖ · ‖θ‖ / L."""
    lengths = float(checkpoint.gradient.norm()) * float(checkpoint.theta.norm())
    return lengths / max(abs(checkpoint.loss), 1e-300)


def _performance(
    problem: Problem, asked: Examination, operator: Curvature
) -> tuple[Performance, float, list[str]]:
    """Performance on every split, the seconds it took, and what is to know of the examples."""
    splits, seconds, s = {}, 0.0, asked.settings
    said: list[str] = []
    for split, source in problem.data.items():
        samples = draw(source, split=split, samples=asked.evaluate, seed=s.seed, batch_size=s.batch_size)
        other = Curvature(operator.problem, samples, function=operator.function)
        splits[split] = _examples(Landscape(other), problem)
        said += (*samples.warnings, *samples.notes)
        seconds += other.seconds
    found = performance(
        splits, train=s.split, test=asked.test, floor=asked.floor, confidence=s.confidence, seed=s.seed
    )
    return found, seconds, said


def _examples(landscape: Landscape, problem: Problem) -> Examples:
    scores = landscape.examples()
    score: Any = None if scores.correct is None else scores.correct.double().numpy()
    if score is None and problem.metric is not None and problem.has_outputs:
        score = np.array(_metric(landscape, problem))
    confidence = None if scores.confidence is None else scores.confidence.numpy()
    return Examples(loss=scores.loss.numpy(), score=score, confidence=confidence)


def _metric(landscape: Landscape, problem: Problem) -> list[float]:
    """The user's metric of every example alone."""
    function, values = landscape.function, []
    with landscape.operator.timed(), torch.no_grad():
        for one in (one for batch in landscape.batches for one in divide(batch, 1)):
            value = float(problem.metric(function.outputs(function.theta, one), one))  # type: ignore[misc]
            values.append(value if math.isfinite(value) else math.nan)
    return values
