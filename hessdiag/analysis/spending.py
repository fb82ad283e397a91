"""What a measurement may spend, and when to end with what there is.

Neither a clock nor an interrupt looks at a number: the products formed until then are the same as without it,
only fewer, so every estimate is as unbiased as for a number of products fixed beforehand. Parts that are not
finished (a block of probes, per-example gradients) are dropped whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from hessdiag.accuracy import Budget
from hessdiag.engine.curvature import Curvature

RUN_SHARE = 0.6  # of a budget for the run where probes follow: one product of it tells more than one probe
MODEL_SHARE = 0.85  # by then per-example gradients must be done, or probes have to do


class Spending:
    """A budget and what is left of it.

    Args:
        budget: None for as much as it takes.
        operator: counts products and their time.
        gradient_seconds: of one gradient of the sample set.
        begun: clock at which the measurement began.

    Attributes:
        interrupted: set from outside, to end with what there is.
    """

    def __init__(self, budget: Budget | None, operator: Curvature, gradient_seconds: float, begun: float) -> None:
        self.budget, self.operator, self.begun = budget, operator, begun
        self.gradient_seconds = max(gradient_seconds, 1e-9)
        self.interrupted = False
        self._products, self._seconds = operator.products, operator.seconds

    def until(self, share: float, keep: int = 0) -> Callable[[], bool]:
        """Whether to stop, for a stage that may go on until ``share`` of the budget less ``keep`` products."""
        return lambda: self.interrupted or self._spent(keep) >= share * self._amount

    @property
    def ended(self) -> bool:
        """Whether nothing more may be begun."""
        return self.until(1.0)()

    @property
    def _amount(self) -> float:
        return math.inf if self.budget is None else self.budget.amount

    def _spent(self, keep: int) -> float:
        done = self.operator.products - self._products
        if self.budget is None:
            return 0.0
        if self.budget.unit == "p":
            return done + keep
        seconds = self.operator.seconds - self._seconds
        kept = keep * seconds / max(done, 1)
        if self.budget.unit == "g":
            return (seconds + kept) / self.gradient_seconds
        return time.perf_counter() - self.begun + kept
