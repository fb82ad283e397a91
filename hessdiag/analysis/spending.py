"""What a measurement may spend, and when to end with what there is.

Neither a clock nor an interrupt looks at a number: the products formed until then are the same as without it,
only fewer, so every estimate is as unbiased as for a number of products fixed beforehand. Parts that are not
finished (a block of probes, per-example gradients) are dropped whole. A person who watches the numbers does look
at them: `hessdiag.results.interval.watched` has what that takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hessdiag.accuracy import Budget
from hessdiag.engine.products.curvature import Curvature

RUN_SHARE = 0.6  # of a budget for the run where probes follow: one product of it tells more than one probe
MODEL_GRADIENTS = 18  # of the trace by way of the model: 17.6 of a ResNet with 10 outputs
GUESS = 2.5  # gradients that a product takes, until one was formed: a ResNet's 2.4


class Spending:
    """A budget and what is left of it.

    Args:
        budget: None for as much as it takes.
        operator: counts products and their time.
        gradient_seconds: of one gradient of the sample set.
        begun: clock at which the measurement began; what was spent since then is gone.
        clock: of the measurement: one that goes on after a kill counts what was spent before.

    Attributes:
        interrupted: set from outside, to end with what there is.
        cut: whether a stage was ended before its time.
    """

    def __init__(
        self,
        budget: Budget | None,
        operator: Curvature,
        gradient_seconds: float,
        begun: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.budget, self.operator, self.begun = budget, operator, begun
        self.clock = clock or time.perf_counter
        self.gradient_seconds = max(gradient_seconds, 1e-9)
        self.interrupted = self.cut = False
        self._products, self._begun = operator.products + operator.beside, self.clock()
        self._before = self._spent
        self._aside = 0.0

    def room(
        self,
        share: float = 1.0,
        *,
        keep: int = 0,
        first: int = 0,
        later: Callable[[], int | None] = lambda: None,
    ) -> Callable[[], float]:
        """Products that a stage may still form, as a function to be asked between them.

        Args:
            share: of what was left when measuring began, for this stage and those before it.
            keep: products to leave whatever happens.
            first: products that come before any share of others: one number that is known is worth more than two
                that are not.
            later: products that the stages after this one will take, where that is known by now: this one may have
                all but these, if that is more than its share.
        """

        def left() -> float:
            products = self.operator.group.number(counted())  # ranks must end together
            self.cut |= products < 1
            return products

        def counted() -> float:
            if self.interrupted:
                return 0.0
            if self.budget is None:
                return math.inf
            each = self._each
            everything = max(self.budget.amount - self._before, 0.0) / each
            others = min((1 - share) * everything, max(everything - first - keep, 0.0))
            if (known := later()) is not None:
                others = min(others, known)
            return (self.budget.amount - self._spent) / each - others - keep

        return left

    @property
    def by_clock(self) -> bool:
        """Whether time is what counts."""
        return self.budget is not None and self.budget.unit != "p"

    @property
    def for_model(self) -> int:
        """Products that the trace by way of the model takes the time of, about."""
        if self.budget is None or self.budget.unit == "p":
            return 0  # no products
        gradient = 1.0 if self.budget.unit == "g" else self.gradient_seconds
        return math.ceil(MODEL_GRADIENTS * gradient / self._each)

    @property
    def why(self) -> str:
        """Why it ended early; empty where it did not."""
        if self.interrupted:
            return "interrupted: what is missing or wide here would have come with more products"
        return f"the budget of {self.budget} ended it: a larger `budget` knows more" if self.cut else ""

    @property
    def repeatable(self) -> bool:
        """Whether the same measurement would give the same again: it was not ended by a clock or a person."""
        return not self.interrupted and not (self.cut and self.by_clock)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is spent inside is no measure of what a product takes."""
        before, done, each = self._spent, self._done, self._each
        yield
        self._aside += max(self._spent - before - each * (self._done - done), 0.0)

    @property
    def _done(self) -> int:
        return self.operator.products + self.operator.beside - self._products

    @property
    def _spent(self) -> float:
        """In the budget's unit."""
        if self.budget is None:
            return 0.0
        if self.budget.unit == "p":
            return self._done
        if self.budget.unit == "g":
            return (self.clock() - self._begun) / self.gradient_seconds
        return self.clock() - self.begun

    @property
    def _each(self) -> float:
        """What a product takes, in the budget's unit."""
        if self.budget is None or self.budget.unit == "p":
            return 1.0
        if self._done:
            return max((self._spent - self._before - self._aside) / self._done, 1e-9)
        return GUESS * (1.0 if self.budget.unit == "g" else self.gradient_seconds)
