"""hessdiag's numbers beside the truth: how far they are off, what error they state, and whether it holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.accuracy import off_by
from benchmarks.density_truth import DensityTruth
from benchmarks.truth import Truth
from hessdiag.results import Analysis

SIGMAS = 3.0  # how far a truth that has a standard error itself may lie outside
ROUNDING = 1e-5  # float32 products against a float64 truth


PARTS = {
    "lambda_max": "lambda_max",
    "lambda_min": "lambda_min",
    "trace": "trace",
    "frobenius": "frobenius_squared",
}
"""Parts of an analysis by the names of `accuracy.GOALS`, and hessdiag's."""


@dataclass(frozen=True)
class Judged:
    """One number beside its truth, on the scale of `accuracy.off_by`.

    Attributes:
        off: the true error, signed.
        stated: the error that the tool states, hessdiag how far its interval reaches; None for none.
        holds: whether the truth lies in the interval, or nearer to it than the truth is known.
    """

    off: float
    stated: float | None
    holds: bool

    def __str__(self) -> str:
        """In words."""
        said = "states no error" if self.stated is None else f"states {self.stated:.1g}"
        return f"off by {abs(self.off):.1g} ({said}{'' if self.holds else ', MISSES'})"


def judged(found: Analysis, known: Truth, shape: DensityTruth) -> dict[str, Judged]:
    """Every part of an analysis, the density included, beside the truth."""
    parts = {}
    for part, name in PARTS.items():
        if name not in found.metrics:
            continue
        metric, fact = found.metrics[name], known[name]
        ends = [off_by(part, end, known) for end in (metric.lo, metric.value, metric.hi)]
        outside = max(metric.lo - fact.value, fact.value - metric.hi, 0.0)
        holds = outside <= max(SIGMAS * fact.error, ROUNDING * abs(fact.value))
        parts[part] = Judged(ends[1], max(ends[1] - ends[0], ends[2] - ends[1]), holds)
    if found.spectrum is not None:
        off = shape.off(*np.array(found.spectrum.merged()).T)
        stated = found.spectrum.error or 0.0
        parts["density"] = Judged(off, stated, off <= stated + shape.error)
    return parts
