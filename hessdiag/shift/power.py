"""What a number of test examples can tell apart: said before a test is made, and of what was found.

A true difference d is found, at confidence c, in a share q of test sets if d is (z_{(1+c)/2} + z_q) standard
errors or more; a standard error falls with the square root of the number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import norm

from hessdiag.shift.compare import CurveDifference
from hessdiag.shift.results import ShiftCurve

POWER = 0.8  # the usual share of test sets that must find what is there
POINT = 0.01  # of accuracy
DISAGREEING = 0.1
"""Share of test examples that two checkpoints are taken to judge differently before any is seen: of pairs of good
classifiers on one data set, between 0.02 and 0.2. The examples needed grow in proportion to it."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """What the examples of a test tell apart, one comparison by itself.

    Attributes:
        what: the number whose error it is.
        examples: of the test.
        detects: the smallest true difference found in `POWER` of test sets, as a share: 0.01 is one point.
        needed: examples of this kind that find one point.
        confidence: of the interval that must leave zero out.
    """

    what: str
    examples: int
    detects: float
    needed: int
    confidence: float

    @property
    def sentence(self) -> str:
        """In words, in points of accuracy."""
        return (
            f"{self.what}: these {self.examples:,} examples tell {100 * self.detects:.2g} points apart "
            f"({POWER:.0%} of the time, at {self.confidence:.0%}, one comparison by itself); one point takes "
            f"about {_round(self.needed)}"
        )


def power(what: str, stderr: float, examples: int, confidence: float) -> Power:
    """What examples tell apart whose difference has this standard error.

    Args:
        what: the number whose error it is.
        stderr: over test examples.
        examples: that gave it.
        confidence: of the intervals.

    Example:
        >>> power("accuracy", 0.005, 2000, 0.95).needed
        3925
    """
    detects = _errors(confidence) * stderr
    needed = math.ceil(examples * (detects / POINT) ** 2)
    return Power(what=what, examples=examples, detects=detects, needed=needed, confidence=confidence)


def foreseen(examples: int, confidence: float) -> str:
    """Before a test: what so many examples tell apart, if two checkpoints differ on `DISAGREEING` of them.

    A small difference of two scores of 0 and 1 has the variance of the share on which they differ.
    """
    ahead = power("", math.sqrt(DISAGREEING / examples), examples, confidence)
    return (
        f"{examples:,} test examples tell two checkpoints {100 * ahead.detects:.2g} points of accuracy apart "
        f"({POWER:.0%} of the time, at {confidence:.0%}), if they differ on {DISAGREEING:.0%} of the examples; "
        f"one point takes about {_round(ahead.needed)} (`samples`)"
    )


def powers(curves: Mapping[str, ShiftCurve], differences: Sequence[CurveDifference]) -> tuple[Power, ...]:
    """What a test's examples told apart: the difference of mean scores known least, else the change of one.

    Args:
        curves: of one test, by checkpoint.
        differences: from the reference.
    """
    told = [one for one in differences if one.score is not None]
    if told:
        widest = max(told, key=lambda one: one.score.over_examples.stderr if one.score else 0.0)
        assert widest.score is not None
        curve = curves[widest.name]
        what = f"mean accuracy of {widest.name} against {widest.reference}"
        return (power(what, widest.score.over_examples.stderr, _examples(curve), curve.confidence),)
    found = []
    for name, curve in curves.items():
        if curve.slope is not None:
            shifts = [point.shift for point in curve.points]
            across = (max(shifts) - min(shifts)) * curve.slope.over_examples.stderr
            what = f"change of accuracy of {name} from the least to the largest shift"
            found.append(power(what, across, _examples(curve), curve.confidence))
    return (max(found, key=lambda one: one.detects),) if found else ()


def _examples(curve: ShiftCurve) -> int:
    return int((curve.levels.weights > 0).any(0).sum())


def _errors(confidence: float) -> float:
    return float(norm.ppf((1 + confidence) / 2) + norm.ppf(POWER))


def _round(number: int) -> str:
    """To two digits: a forecast knows no more."""
    digits = max(len(str(number)) - 2, 0)
    return f"{round(number, -digits):,}"
