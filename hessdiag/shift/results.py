"""What a shift test finds: levels of shift, points, a regression line, and what is uncertain about it.

Three uncertainties, never mixed:

* over test examples, the checkpoint and the shifts given: errors of points, bootstrap of slopes;
* over levels, the test examples given: ordinary least squares, as in the paper. It says how the levels scatter
  around the line, and narrows as levels are added, however few the test examples;
* over training runs: none of these. Compare several seeds of each recipe for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST = 50.0
"""Effective examples a level needs: the standard error of an accuracy is then at most 0.07."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftPoint:
    """One level of shift."""

    shift: float  # in the curve's parameter
    score: float  # accuracy, where scores are 0 and 1
    stderr: float  # over test examples, linearized; 0.0 where all agree, which [lo, hi] does not believe
    lo: float  # Wilson's interval for 0/1 scores, a t interval for others; over test examples
    hi: float
    effective: float  # Kish's effective number of examples, (Σw)² / Σw²


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """An interval for a slope, and the p-value of no slope, by one source of chance."""

    over: Literal["test examples", "levels"]
    stderr: float
    lo: float
    hi: float
    pvalue: float  # two-sided
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """Ordinary least squares of the score on the shift, each level counting the same (as in the paper)."""

    value: float  # score per unit of shift; with levels 0 and 1 only, the change of the score
    intercept: float  # score of the line at zero shift
    over_examples: Uncertainty
    over_levels: Uncertainty | None  # None for fewer than 3 levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What the points are computed from, kept so that checkpoints can be compared pair by pair.

    The score of level l is Σᵢ w_li s_li / Σᵢ w_li.
    """

    shifts: Array  # (levels,)
    weights: Array  # (levels, examples), not negative
    scores: Array  # (levels, examples), or (1, examples) where all levels have the same
    groups: NDArray[np.int64]  # (examples,), 0 to groups - 1: examples derived from one original are one group
    strata: NDArray[np.int64]  # (groups,): each is resampled by itself, as samples drawn apart are
    digest: str  # of the inputs: only curves of equal digests are pairs

    @property
    def binary(self) -> bool:
        """Whether all scores are 0 or 1."""
        return bool(np.isin(self.scores, (0.0, 1.0)).all())

    def means(self) -> Array:
        """The score of each level, (levels,)."""
        mean: Array = (self.weights * self.scores).sum(1) / self.weights.sum(1)
        return mean

    def effective(self) -> Array:
        """Kish's effective number of examples of each level, (levels,)."""
        size: Array = self.weights.sum(1) ** 2 / np.square(self.weights).sum(1)
        return size

    def by_group(self) -> tuple[Array, Array]:
        """Σ w s and Σ w of each level and group, two of (levels, groups)."""
        weighted = self.weights * self.scores
        if len(self.strata) == len(self.groups):
            return weighted, self.weights
        member = np.zeros((len(self.groups), len(self.strata)))
        member[np.arange(len(self.groups)), self.groups] = 1.0
        return weighted @ member, self.weights @ member


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftCurve:
    """A checkpoint's score against the shift of its test data."""

    test: str  # "covariate shift"
    parameter: str  # what the shift is measured in
    points: tuple[ShiftPoint, ...]
    slope: Slope | None  # None: cannot tell, and ``cannot_tell`` says why and what is needed
    cannot_tell: str = ""
    left_out: int = 0  # levels with fewer than ``least`` effective examples
    least: float = LEAST
    confidence: float = 0.95
    notes: tuple[str, ...] = ()
    levels: Levels = field(repr=False, compare=False)
