"""What a check may find: budgets on metrics, their limits, and the part of the problem each is about.

A budget's key is ``metric``, ``metric[split]``, ``metric@glob`` or ``metric[split]@glob``: lambda_max of the test
split's Hessian, the trace of the block of the tensors ``layer4.*``. A glob or a split names another matrix, which
is measured on its own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hessdiag.option import hint
from hessdiag.results import MEASURABLE

Level = Literal["off", "warn", "error"]
Claim = Literal["samples", "population"]
LimitKind = Literal["min", "max", "max_increase", "max_decrease"]
LEVELS: tuple[str, ...] = get_args(Level)
CLAIMS: tuple[str, ...] = get_args(Claim)
LIMITS: tuple[LimitKind, ...] = get_args(LimitKind)
METRICS = tuple(name for name in MEASURABLE if name != "density")
WITH_DATA_ERROR = ("lambda_max", "lambda_min", "trace")
KEY = re.compile(r"(?P<metric>\w+)(\[(?P<split>[^\[\]]+)\])?(@(?P<glob>.+))?")
PERCENT = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*%")


@dataclass(frozen=True, slots=True, order=True)
class Scope:
    """The matrix a budget is about: the Hessian of a split, or its block of the tensors matching a glob.

    Attributes:
        split: name of the problem's data.
        glob: on parameter names; empty for all that the run's own ``params`` name.
    """

    split: str
    glob: str = ""

    @property
    def label(self) -> str:
        """Its name in the baseline, ``train`` or ``train@layer4.*``."""
        return f"{self.split}@{self.glob}" if self.glob else self.split


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One end of what is allowed.

    Attributes:
        kind: ``min`` and ``max`` bound the value, the others its change since the baseline.
        value: in the metric's units, or the share of the baseline's size if ``relative`` (0.15 for "15%").
        relative: only for changes.
    """

    kind: LimitKind
    value: float
    relative: bool = False

    @property
    def needs_baseline(self) -> bool:
        """Whether it is about a change."""
        return self.kind in ("max_increase", "max_decrease")

    def __str__(self) -> str:
        """As a table shows it: ``≤ 80``, ``≥ -1``, ``≤ +15%``, ``≥ -0.5`` (of a change: always with its sign)."""
        number = f"{100 * self.value:g}%" if self.relative else f"{self.value:g}"
        return {"min": "≥ ", "max": "≤ ", "max_increase": "≤ +", "max_decrease": "≥ −"}[self.kind] + number


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one metric of one scope may be.

    Attributes:
        key: as the user wrote it.
        metric: one of `METRICS`.
        scope: what it is measured on.
        level: "error" fails the check, "warn" is only said, "off" is not measured.
        limits: at least one, unless the level is off.
        abs_floor: changes up to this many units are always allowed; needed where the baseline may be zero.
        claim: whether the limit is for these samples, or for the population they were drawn from.
        file: where it is written.
        line: there, from 1.
    """

    key: str
    metric: str
    scope: Scope
    level: Level = "error"
    limits: tuple[Limit, ...] = ()
    abs_floor: float | None = None
    claim: Claim = "samples"
    file: str | None = None
    line: int | None = None


def parse_key(key: str, split: str) -> tuple[str, Scope]:
    """The metric and the scope that a budget's key names.

    Args:
        key: ``metric[split]@glob``, the last two optional.
        split: the run's own, where the key has none.

    Raises:
        ValueError: not of this form, or no such metric; its text is a clause for an error message.
    """
    found = KEY.fullmatch(key)
    if found is None:
        msg = f"{key!r} is no budget: write metric, metric[split], metric@glob or metric[split]@glob"
        raise ValueError(msg)
    metric = found["metric"]
    if metric not in METRICS:
        msg = f"no metric {metric!r}; {hint(metric, METRICS)}"
        raise ValueError(msg)
    return metric, Scope(found["split"] or split, found["glob"] or "")


def parse_limit(kind: LimitKind, value: Any) -> Limit:
    """A limit out of a number, or out of text like "15%" where it is about a change.

    Raises:
        ValueError: anything else, a negative change, or a number that is not finite.
    """
    change = kind in ("max_increase", "max_decrease")
    percent = PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
    if percent is not None and change:
        return Limit(kind=kind, value=_finite(kind, float(percent[1])) / 100, relative=True)
    if isinstance(value, bool) or not isinstance(value, int | float):
        allowed = 'a number or a share like "15%"' if change else "a number"
        msg = f"{kind} = {value!r}: it must be {allowed}"
        raise ValueError(msg)  # noqa: TRY004  (one kind of refusal for a limit, whatever is wrong)
    number = _finite(kind, float(value))
    if change and number < 0:
        msg = f"{kind} = {value}: a change must be at least 0"
        raise ValueError(msg)
    return Limit(kind=kind, value=number)


def _finite(kind: str, number: float) -> float:
    if not math.isfinite(number):
        msg = f"{kind} = {number}: a finite number is needed"
        raise ValueError(msg)
    return number
