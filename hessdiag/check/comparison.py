"""Two checkpoints side by side: how much every metric differs, and whether it does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hessdiag.check.budgets import Scope
from hessdiag.check.change import METHODS, change
from hessdiag.check.comparable import differences, explain, same_weights
from hessdiag.check.recorded import Entry
from hessdiag.check.subject import Source
from hessdiag.check.verdict import Interval
from hessdiag.errors import NoVerdictError


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One metric of two checkpoints.

    Attributes:
        metric: its name.
        first: of the first checkpoint.
        second: of the second.
        difference: second less first, as a share of the first's size if ``relative``.
        relative: false where the first may be zero.
    """

    metric: str
    first: Interval
    second: Interval
    difference: Interval
    relative: bool

    @property
    def words(self) -> str:
        """Whether the second is higher, lower, or cannot be told apart."""
        if self.difference.lo > 0:
            return "higher"
        return "lower" if self.difference.hi < 0 else "cannot tell apart"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**asdict(self), "verdict": self.words}


def compare(
    first: Source, second: Source, scope: Scope, metrics: Collection[str], asked: Mapping[str, Any]
) -> list[Compared]:
    """Compare every metric that both have, in pairs of the same probes on the same samples.

    Args:
        first: where the one's numbers come from.
        second: likewise the other's.
        scope: what is compared.
        metrics: to be measured, where they are not yet.
        asked: probes, rtol and confidence.

    Raises:
        NoVerdictError: they were not measured on the same samples, parameters, loss and seed.
    """
    a, b = (source.entry(scope, metrics, **asked) for source in (first, second))
    found = differences(a.fingerprint, b.fingerprint)
    if found:
        more = f" (and {len(found) - 1} more fields)" if len(found) > 1 else ""
        msg = f"not comparable: {explain(scope.label, found)[0]}{more}"
        raise NoVerdictError(msg)
    return [_compared(name, a, b, asked["confidence"]) for name in a.metrics if name in b.metrics]


def _compared(name: str, a: Entry, b: Entry, confidence: float) -> Compared:
    one, other = a.metrics[name], b.metrics[name]
    relative = not one.lo <= 0 <= one.hi
    same = same_weights(a.fingerprint, b.fingerprint)
    difference = change(one, other, relative=relative, confidence=confidence, same=same)
    return Compared(
        metric=name,
        first=Interval(one.value, one.lo, one.hi, METHODS[one.kind]),
        second=Interval(other.value, other.lo, other.hi, METHODS[other.kind]),
        difference=difference or Interval(0.0, float("-inf"), float("inf")),
        relative=relative,
    )
