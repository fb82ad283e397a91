"""When a tracker measures: at multiples of a number of steps, as often as its share of the time allows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hessdiag.option import Fault, refuse

clock = time.perf_counter

WRITTEN = "a share of the time is needed, for example '5%' or 0.05; None measures at every due step"


def share_of(budget: str | float | None) -> float | None:
    """Read "5%" or 0.05; None is no limit.

    Raises:
        OptionError: anything else.
    """
    if budget is None:
        return None
    text = str(budget).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if isinstance(budget, bool) or not 0 < share <= 1:
        refuse(Fault("budget", budget, WRITTEN))
    return share


def due(step: int, last: int | None, every: int) -> bool:
    """Whether a multiple of ``every`` was reached since the step before; the same on every rank."""
    return step % every == 0 if last is None else step // every > last // every


class Pace:
    """What training and measuring have taken, and whether one more measurement keeps its share.

    A measurement is never shortened: where the next one would exceed the share it is left out. The first is always
    made, since what one takes is not known before.

    Args:
        share: of the wall time since the first step; None for no limit.

    Attributes:
        spent: seconds of measuring.
        cost: seconds of the last measurement, with what was logged and drawn of it; 0.0 before the first.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.spent = self.cost = self._before = 0.0
        self._began: float | None = None
        self._first: int | None = None

    @property
    def elapsed(self) -> float:
        """Seconds since the first step, those of a run that was resumed included."""
        return self._before if self._began is None else self._before + clock() - self._began

    def begin(self, step: int) -> None:
        """Start the clock, at the first step."""
        if self._began is None:
            self._began = clock()
        if self._first is None:
            self._first = step

    def allows(self) -> bool:
        """Whether a measurement of the last one's cost keeps the share."""
        if self.share is None or self.cost == 0:
            return True
        return self.spent + self.cost <= self.share * (self.elapsed + self.cost)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What is done inside counts as measuring, however it ends."""
        begun = clock()
        try:
            yield
        finally:
            self.cost = max(clock() - begun, 1e-9)
            self.spent += self.cost

    def slower(self, step: int, every: int, budget: object) -> str:
        """One line: a measurement is left out, and about how many steps there will be between two."""
        share, steps = self.share or 1.0, step - (self._first or 0)
        trained = max(self.elapsed - self.spent, 1e-9)
        between = self.cost * (1 - share) / share * steps / trained
        often = f"about every {max(math.ceil(between / every), 1) * every:,} steps" if steps > 0 else "less often"
        return (
            f"a measurement takes {self.cost:.2g} s: within budget={budget!r} of the time it is made {often} "
            f"rather than every {every:,}"
        )

    def state(self) -> dict[str, Any]:
        """Plain numbers, for `resume`."""
        return {"spent": self.spent, "cost": self.cost, "elapsed": self.elapsed, "first": self._first}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the time in between does not count."""
        self.spent, self.cost, self._before = state["spent"], state["cost"], state["elapsed"]
        self._began, self._first = None, state["first"]
