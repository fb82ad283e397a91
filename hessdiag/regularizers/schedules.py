"""Strengths that change while training: by step, by epoch, or with the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hessdiag.errors import UsageError

ByStep = Callable[[float], float]


@dataclass(frozen=True)
class Ramp:
    """A setting from ``start`` to ``end`` over so many steps, then constant; see `linear`.

    Attributes:
        shape: "linear", "cosine" or "exponential".
        start: value at step 0.
        end: value from step ``steps`` on.
        steps: length of the way.
    """

    shape: str
    start: float
    end: float
    steps: float

    def __call__(self, step: float) -> float:
        """The value at a step."""
        share = min(step / self.steps, 1.0)
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** share)
        part = (1 - math.cos(math.pi * share)) / 2 if self.shape == "cosine" else share
        return self.start + (self.end - self.start) * part


@dataclass(frozen=True)
class ByEpoch:
    """A function of epochs as one of steps; see `by_epoch`."""

    schedule: ByStep
    steps_per_epoch: int

    def __call__(self, step: float) -> float:
        """The value at a step."""
        return self.schedule(step / self.steps_per_epoch)


@dataclass(frozen=True)
class ByLearningRate:
    """A setting tied to the learning rate of each parameter group; see `proportional_to_lr`."""

    high: float
    low: float
    lr_max: float
    lr_min: float

    def of(self, lr: float) -> float:
        """The value at a learning rate."""
        share = (lr - self.lr_min) / (self.lr_max - self.lr_min)
        return self.low + (self.high - self.low) * min(max(share, 0.0), 1.0)


Schedule = float | ByStep | ByLearningRate


def linear(end: float, steps: float, start: float = 0.0) -> Ramp:
    """From ``start`` to ``end`` along a line over so many steps, then constant.

    Any setting that takes a schedule (rho, sigma, mu, K) takes it. It can be pickled.

    >>> [linear(0.1, 4)(step) for step in (0, 2, 4, 9)]
    [0.0, 0.05, 0.1, 0.1]

    Raises:
        UsageError: steps are not positive.
    """
    return Ramp("linear", start, end, _positive(steps))


def cosine(end: float, steps: float, start: float = 0.0) -> Ramp:
    """From ``start`` to ``end`` along half a cosine over so many steps, then constant.

    >>> [round(cosine(0.0, 4, start=0.1)(step), 4) for step in (0, 2, 4)]
    [0.1, 0.05, 0.0]

    Raises:
        UsageError: steps are not positive.
    """
    return Ramp("cosine", start, end, _positive(steps))


def exponential(end: float, steps: float, start: float = 1e-5) -> Ramp:
    """From ``start`` to ``end`` geometrically over so many steps, then constant.

    >>> [round(exponential(0.1, 2, start=0.001)(step), 4) for step in (0, 1, 2)]
    [0.001, 0.01, 0.1]

    Raises:
        UsageError: steps, start or end are not positive.
    """
    return Ramp("exponential", _positive(start, "start"), _positive(end, "end"), _positive(steps))


def by_epoch(schedule: ByStep, steps_per_epoch: int) -> ByEpoch:
    """A schedule whose steps are epochs: ``by_epoch(linear(0.05, 5), len(loader))`` rises for five epochs.

    >>> by_epoch(linear(0.1, 5), steps_per_epoch=100)(250)
    0.05

    Raises:
        UsageError: steps_per_epoch is not positive.
    """
    return ByEpoch(schedule, int(_positive(steps_per_epoch, "steps_per_epoch")))


def proportional_to_lr(high: float, lr_max: float, *, low: float = 0.0, lr_min: float = 0.0) -> ByLearningRate:
    """Low + (high − low) (lr − lr_min) / (lr_max − lr_min), kept within [low, high], lr of each parameter group.

    So rho falls with the learning rate, as in GSAM (Zhuang et al. 2022, arXiv 2203.08065). A group whose learning
    rate is a tenth gets about a tenth: write "rho" into its group where it should not.

    >>> rho = proportional_to_lr(0.2, lr_max=0.1)
    >>> [rho.of(lr) for lr in (0.1, 0.05, 0.0)]
    [0.2, 0.1, 0.0]

    Raises:
        UsageError: lr_max is not above lr_min.
    """
    if not lr_max > lr_min:
        msg = f"lr_max={lr_max!r}: allowed: numbers above lr_min={lr_min!r}, where it is low={low:g}"
        raise UsageError(msg)
    return ByLearningRate(high, low, lr_max, lr_min)


def _positive(value: float, name: str = "steps") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        msg = f"{name}={value!r}: allowed: positive numbers"
        raise UsageError(msg)
    return value
