"""How many probes an accuracy takes: known from the run, before one of them is drawn.

A form of deflated random signs has the variance 2(‖PHP‖²_F − Σ (PHP)ᵢᵢ²) for tr H, and 2(‖(PHP)²‖²_F − …) for
tr H²: sums of squares (about their mean) and fourth powers of the eigenvalues that the run has not explained,
which its own density knows well enough. A number that depends on the run alone leaves the probes as unbiased as
any fixed number does, and their intervals cover as often; stopping by the probes' own spread would not
(`interval.enough`).

Where the number was too small after all, the mean comes from fresh probes alone. That costs the first ones, and a
part of the coverage that is small: first intervals are kept where they are narrow, which is not independent of
where they lie, so at most 5% of the cases that go on are lost: 1% where one in five does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hessdiag.operator import SymmetricOperator
from hessdiag.results.interval import mean_interval, quantile
from hessdiag.spectral import deflation
from hessdiag.spectral.deflation import Forms, forms
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.measure import Measure, measure_of

FEWEST = 8
"""With fewer the t-interval is 2.4 standard errors and more, and its skewness is noise."""
LEFT = 0.25
"""At least this share of what the density says of the rest counts as unexplained: one start knows it no better."""
SHORT = 1.25  # times the half interval asked for, beyond which fresh probes are drawn


@dataclass(frozen=True)
class Goal:
    """Half intervals to reach; None for what is not wanted.

    Attributes:
        trace: of tr H, relative to it, or to ‖H‖_F where that is larger.
        square: of tr H², relative.
        confidence: of the intervals.
        most: probes at most.
    """

    trace: float | None
    square: float | None
    confidence: float
    most: int

    def allowed(self, trace: float, square: float) -> tuple[float, float]:
        """Half intervals of tr H and tr H² that are enough, absolute."""
        return (self.trace or math.inf) * size_of_trace(trace, square), (self.square or math.inf) * square


def size_of_trace(trace: float, square: float) -> float:
    """What the accuracy of tr H is relative to: itself, or ‖H‖_F where that is larger."""
    return max(abs(trace), math.sqrt(max(square, 0.0)))


def probes_for(krylov: Krylov, goal: Goal) -> int | None:
    """Probes that a goal takes, by what the run has seen; None where it cannot tell."""
    measure = measure_of(krylov)
    if measure is None:
        return None
    nodes, weights = measure.rule
    sums = [measure.dimension * float(np.dot(weights, nodes**power)) for power in (1, 2)]
    allowed = goal.allowed(sums[0], sums[1])
    spreads = [math.sqrt(2 * left) for left in _unexplained(krylov, measure)]
    return max(_number(spread, half, goal) for spread, half in zip(spreads, allowed, strict=True))


def _unexplained(krylov: Krylov, measure: Measure) -> tuple[float, float]:
    """Σ (λ − m)² and Σ λ⁴ of the eigenvalues outside the run's subspace; signs do not see their mean m."""
    nodes, weights, share = measure.rest
    left, mean = share * measure.dimension, float(np.dot(weights, nodes))
    others = krylov.ritz_values
    for value in measure.counted:
        others = np.delete(others, np.argmin(np.abs(others - value)))
    spread = left * float(np.dot(weights, np.square(nodes - mean)))
    fourth = left * float(np.dot(weights, nodes**4))
    seen = float(np.square(others - mean).sum()) + 2 * krylov.beta**2, float((others**4).sum())
    return max(spread - seen[0], LEFT * spread), max(fourth - seen[1], LEFT * fourth)


def forms_for(
    op: SymmetricOperator,
    krylov: Krylov,
    goal: Goal,
    seed: int,
    on_block: Callable[[Forms], None] | None = None,
) -> Forms:
    """As many `forms` as a goal takes, 8 at least; cost: these, and those that were too few."""
    number = probes_for(krylov, goal) or 2 * FEWEST
    if op.left < number + FEWEST:
        number = int(op.left)  # fresh ones could not follow
    first = forms(op, krylov, max(min(number, goal.most), deflation.FEWEST), seed, on_block=on_block)
    more = 0 if first.exact or op.left < FEWEST else _lacking(first, goal)
    if not more or len(first.trace) + FEWEST > goal.most:
        return first
    begin = len(first.trace)
    fresh = forms(op, krylov, min(more, goal.most - begin), seed, first=begin, on_block=on_block)
    if len(fresh.trace) < FEWEST:
        return first  # the budget ended
    return replace(fresh, products=fresh.products + begin)


def _number(spread: float, half: float, goal: Goal) -> int:
    number = FEWEST
    while number < goal.most:
        if quantile(goal.confidence, number - 1) * spread <= half * math.sqrt(number):
            break
        number += 1
    return number


def _lacking(values: Forms, goal: Goal) -> int:
    """Fresh probes that would do, where these fall short; else 0."""
    allowed = goal.allowed(float(values.trace.mean()), float(values.squares.mean()))
    short = 1.0
    for samples, half in zip((values.trace, values.squares), allowed, strict=True):
        _, lo, hi = mean_interval(samples, goal.confidence)
        short = max(short, (hi - lo) / 2 / max(half, 1e-300))
    return math.ceil(len(values.trace) * short**2) if short > SHORT else 0
