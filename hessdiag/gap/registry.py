"""Measures by name: the built-in ones, and those of other packages by the entry points of one group."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, get_args

from hessdiag.errors import NonFiniteError, Refused, UsageError, one_line

if TYPE_CHECKING:
    from hessdiag.gap.checkpoint import Checkpoint

GROUP = "hessdiag.measures"
FAMILIES = ("curvature", "sharpness", "flatness", "pac-bayes", "noise", "norms")
INVARIANCES = ("layer rescaling", "neuron rescaling", "logit scaling", "permutation")
MODULES = (
    "curvature",
    "perturbations",
    "adversaries",
    "pac_bayes",
    "noise_bound",
    "penalties",
    "flatness",
    "norms",
    "noise",
)

Kind = Literal["exact", "draws", "search", "found", "interval"]
MAXIMA = ("search", "found")  # kinds without an upper end


@dataclass(frozen=True)
class Reading:
    """What a measure found at a checkpoint.

    Attributes:
        value: the measure.
        lo: lower end of its interval.
        hi: upper end; infinite for a "search" or "found" only.
        kind: "exact" (rounding only), "draws" (95 % interval over random draws), "interval" (taken over from a
            measurement's own interval), "search" (a maximum found by ascent: the true one may be larger), or
            "found" (made of maxima over the examples measured: among more they can only be larger).
        note: what to know about it here, one line.
        more: further numbers by name.
    """

    value: float
    lo: float
    hi: float
    kind: Kind
    note: str = ""
    more: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is not a number inside its own interval.

        Raises:
            UsageError: no such kind.
            NonFiniteError: not finite, or outside of its interval.
        """
        if self.kind not in get_args(Kind):
            msg = f"kind {self.kind!r} of a reading: allowed: {', '.join(get_args(Kind))}"
            raise UsageError(msg)
        open_end = self.kind in MAXIMA and self.hi == math.inf
        if not (math.isfinite(self.value) and math.isfinite(self.lo) and (math.isfinite(self.hi) or open_end)):
            msg = f"{self.value} in [{self.lo}, {self.hi}] is not finite: the loss overflows near this checkpoint"
            raise NonFiniteError(msg)
        if not self.lo <= self.value <= self.hi:
            msg = f"{self.value} lies outside its interval [{self.lo}, {self.hi}]"
            raise NonFiniteError(msg)


def exact(value: float, note: str = "", **more: float) -> Reading:
    """A reading without sampling: only rounding is left."""
    return Reading(value, value, value, "exact", note, more)


def found(value: float, note: str = "", **more: float) -> Reading:
    """A reading of a maximum by ascent, a lower bound of the true one."""
    return Reading(value, value, math.inf, "search", note, more)


def largest_seen(value: float, note: str = "", *, less: float = 0.0, **more: float) -> Reading:
    """A reading made of maxima over the examples measured; ``less`` is how far its lower end lies below."""
    return Reading(value, value - less, math.inf, "found", note, more)


Function = Callable[["Checkpoint"], Reading | Refused]


@dataclass(frozen=True)
class Measure:
    """A registered measure.

    Attributes:
        name: in tables and on the command line.
        title: for people.
        family: one of `FAMILIES`.
        formula: one line.
        source: paper and section or equation.
        invariances: what provably does not move it, out of `INVARIANCES`; tested for every built-in one.
        cost: in forward passes, gradients and products of the sample set.
        function: gives a `Reading`, or a `Refused` with the reason why there is none at this checkpoint.
    """

    name: str
    title: str
    family: str
    formula: str
    source: str
    invariances: frozenset[str]
    cost: str
    function: Function

    def __post_init__(self) -> None:
        """Refuse a description with gaps.

        Raises:
            UsageError: an unknown family or invariance, or an empty field.
        """
        if self.family not in FAMILIES:
            msg = f"measure {self.name!r}: family {self.family!r}; allowed: {', '.join(FAMILIES)}"
            raise UsageError(msg)
        if unknown := sorted(set(self.invariances) - set(INVARIANCES)):
            msg = f"measure {self.name!r}: invariance {unknown[0]!r}; allowed: {', '.join(INVARIANCES)}"
            raise UsageError(msg)
        for name in ("name", "title", "formula", "source", "cost"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip() or "\n" in text:
                msg = f"measure {self.name!r}: {name} must be one line of text"
                raise UsageError(msg)

    def __call__(self, checkpoint: Checkpoint) -> Reading | Refused:
        """The measure at a checkpoint, or why there is none.

        Before `Refused` a function returned the reason as text. For one version such a text is still taken as a
        refusal, with one DeprecationWarning per measure.
        """
        found: Reading | Refused | str = self.function(checkpoint)
        if not isinstance(found, str):
            return found
        if self.name not in _RETURN_TEXT:
            _RETURN_TEXT.add(self.name)
            text = f"measure {self.name} returns its reason as text: return Refused(reason) of hessdiag.errors"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
        return Refused(found)


_BUILT_IN: dict[str, Measure] = {}
_RETURN_TEXT: set[str] = set()  # names of measures whose user was told so


def measure(
    name: str, *, title: str, family: str, formula: str, source: str, cost: str, invariant: Iterable[str] = ()
) -> Callable[[Function], Measure]:
    """Make a `Measure` of a function of a checkpoint; in hessdiag's own modules also register it.

    In another package, name the result in an entry point of group "hessdiag.measures".

    Args:
        name: see `Measure`, as are the others.
        title: for people.
        family: one of `FAMILIES`.
        formula: one line.
        source: paper and section.
        cost: in forward passes, gradients and products.
        invariant: out of `INVARIANCES`.

    Raises:
        UsageError: a gap in the description, or a name taken twice.
    """

    def made(function: Function) -> Measure:
        one = Measure(name, title, family, formula, source, frozenset(invariant), cost, function)
        # functions made in a loop have no text of their own
        one.__dict__["__doc__"] = function.__doc__ or f"{title}: {formula}. Source: {source}. Cost: {cost}."
        if function.__module__.startswith("hessdiag."):
            _add(_BUILT_IN, one, "hessdiag")
        return one

    return made


def built_in() -> Mapping[str, Measure]:
    """The measures of hessdiag itself by name: in the order of `MODULES`, whichever was imported first."""
    places = {import_module(f"hessdiag.gap.measures.{name}").__name__: at for at, name in enumerate(MODULES)}
    in_order = sorted(_BUILT_IN.values(), key=lambda one: places.get(one.function.__module__, len(places)))
    return {one.name: one for one in in_order}


def registry() -> Mapping[str, Measure]:
    """Every measure by name: the built-in ones in their order, then those of other packages.

    A plugin that cannot be loaded is one warning, not an end.

    Raises:
        UsageError: two measures of one name.
    """
    every = dict(built_in())
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            plugin: Any = entry.load()
        except Exception as error:  # a plugin's import can raise anything
            warnings.warn(
                f"measure {entry.name} ({entry.value}) does not load: {one_line(error, 160)}", stacklevel=2
            )
            continue
        if not isinstance(plugin, Measure):
            kind = type(plugin).__name__
            warnings.warn(
                f"measure {entry.name} ({entry.value}) is {kind}: decorate it with @measure", stacklevel=2
            )
            continue
        _add(every, plugin, entry.value)
    return every


def _add(measures: dict[str, Measure], one: Measure, origin: str) -> None:
    if one.name in measures:
        msg = f"measure {one.name!r} of {origin} exists already: give it another name"
        raise UsageError(msg)
    measures[one.name] = one
