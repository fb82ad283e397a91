"""The reparametrisation guard: does a measure change while the function does not (Dinh et al. 2017)?

Every measure is taken again at weights rescaled layer by layer (`hessdiag.gap.rescaling`), with the
same samples and the same random draws, and the two values are compared within their intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hessdiag.analysis import Measurement
from hessdiag.errors import HessdiagError, Refused, one_line
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.failed import refused
from hessdiag.gap.registry import MAXIMA, Measure, Reading
from hessdiag.gap.rescaling import ALPHA, Rescaling, rescaled
from hessdiag.problem import Problem
from hessdiag.results import QUANTITIES, Analysis, Fingerprint
from hessdiag.settings import Settings

SAME = 1e-3  # relative: below, two values are one to single precision
CLEAR = 0.1  # relative: maxima found by ascent closer than this are not called different
MOVED, STAYED, OPEN, REFUSED = "moved", "did not move", "cannot tell", "refused"


@dataclass(frozen=True)
class Comparison:
    """A measure before and after the rescaling.

    Attributes:
        name: the measure's.
        before: at the checkpoint.
        after: at the rescaled weights, or why it cannot be had there.
        verdict: "moved", "did not move", "cannot tell"; "refused" where neither has a number.
    """

    name: str
    before: Reading | Refused
    after: Reading | Refused
    verdict: str


@dataclass(frozen=True)
class Guarded:
    """The guard's findings: the rescaling, or why there is none, and every measure beside its second value."""

    rescaling: Rescaling | Refused
    measures: Mapping[str, Comparison]


def guard(
    checkpoint: Checkpoint,
    measures: Mapping[str, Measure],
    readings: Mapping[str, Reading | Refused] | None = None,
    *,
    alpha: float = ALPHA,
    again: Callable[[Problem, Checkpoint], Checkpoint] | None = None,
) -> Guarded:
    """Take every measure again after a function-preserving rescaling of the layers.

    Args:
        checkpoint: with its analysis, where measures of curvature are among those asked for.
        measures: by name.
        readings: of the checkpoint, where they were taken already; the others are taken.
        alpha: a power of two.
        again: makes the rescaled checkpoint; `remade` by default.

    Returns:
        The comparisons; none, with the reason, where no place was found or the rescaled network cannot be
        measured. Cost: the measures and the analysis again.

    Raises:
        UsageError: ``alpha`` is no power of two above 1.
    """
    found = rescaled(checkpoint, alpha=alpha)
    if isinstance(found, Refused):
        return Guarded(found, {})
    try:
        twin = (again or remade)(found.problem, checkpoint)
    except HessdiagError as error:
        reason = f"the rescaled network could not be measured: {one_line(error, 200)}"
        return Guarded(Refused(reason, refused(error).code), {})
    known = readings or {}
    compared = {}
    for name, one in measures.items():
        before = known[name] if name in known else attempted(one, checkpoint)
        after = attempted(one, twin)
        compared[name] = Comparison(name, before, after, verdict(before, after))
    return Guarded(found, compared)


def verdict(before: Reading | Refused, after: Reading | Refused) -> str:
    """Whether two readings of one function differ, as far as their intervals allow.

    Equal to 1e-3: "did not move". Intervals apart: "moved". In between, intervals that overlap did not move if the
    values are as close as 10 %, and cannot tell otherwise. A maximum that was found has no upper end, so 10 %
    decides alone. Two refusals say nothing of a number: "refused".
    """
    if isinstance(before, Refused) or isinstance(after, Refused):
        return REFUSED if isinstance(before, Refused) and isinstance(after, Refused) else OPEN
    scale = max(abs(before.value), abs(after.value))
    apart = abs(before.value - after.value)
    if apart <= SAME * scale:
        return STAYED
    if before.kind in MAXIMA or after.kind in MAXIMA:
        return MOVED if apart > CLEAR * scale else STAYED
    if before.hi < after.lo or after.hi < before.lo:
        return MOVED
    return STAYED if apart <= CLEAR * scale else OPEN


def remade(problem: Problem, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of the problem on the same samples, measured as the given one was.

    Cost: its analysis again, if it had one, but for the density and the share of negative eigenvalues: they take
    four fifths of an analysis, and that share survives every rescaling (Sylvester).
    """
    old, split = checkpoint.operator, checkpoint.samples.split
    settings = settings_of(checkpoint)
    frozen = replace(problem, data={split: list(checkpoint.samples.batches)}, params=checkpoint.problem.params)
    measurement = Measurement(frozen, settings)
    operator = measurement.operator
    operator.method, operator.block = old.method, old.block
    analysis: Analysis | None = measurement.run() if checkpoint.analysis is not None else None
    start = checkpoint.start
    named = None if start is None else dict(zip(old.function.names, old.function.split(start), strict=True))
    samples = replace(measurement.samples, available=checkpoint.samples.available)
    more: dict[str, Any] = {"start": named, "facts": checkpoint.facts, "seed": checkpoint.seed}
    return Checkpoint(frozen, samples, operator, analysis=analysis, **more)


def settings_of(checkpoint: Checkpoint) -> Settings:
    """How the checkpoint's analysis was made, as far as its fingerprint says; without density."""
    op, analysis = checkpoint.operator, checkpoint.analysis
    asked: tuple[str, ...] = ()
    recorded = Fingerprint()
    if analysis is not None:
        asked = tuple(name for name in QUANTITIES if name in analysis.metrics and name != "negative_mass")
        recorded = analysis.fingerprint
    options = {f.name for f in fields(Settings)}
    known: dict[str, Any] = {name: value for name, value in recorded.items() if name in options}
    measured: dict[str, Any] = {
        "quantities": asked or ("trace",),
        "samples": checkpoint.samples.examples,
        "split": checkpoint.samples.split,
        "operator": "ggn" if op.kind == "ggn" else "hessian",
        "dtype": str(op.dtype).removeprefix("torch."),
        "device": str(op.device),
        "top": max(1, len(analysis.top)) if analysis is not None else 1,
        "accuracy": {"failure": recorded.failure} if "failure" in recorded else None,
    }
    return Settings(**known | measured)


def attempted(one: Measure, checkpoint: Checkpoint) -> Reading | Refused:
    """The measure, or the one line of its refusal with its code."""
    try:
        found = one(checkpoint)
    except HessdiagError as error:
        return refused(error)
    if isinstance(found, Refused) and not found.code:
        return replace(found, code="does_not_apply")
    return found
