"""One option of a measurement: its default, range and words, said once; and what is wrong with a value of it.

A class declares its fields by `option`. The command line, the tables of a configuration and the docstring are
made from `options_of`; each of them spells the name and the value of a `Fault` in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from hessdiag.errors import BudgetError, FaultsError

T = TypeVar("T")
FEW = 5  # so many names are all listed
NUMBERS: Mapping[type, tuple[Any, str]] = {int: (Integral, "a whole number"), float: (Real, "a number")}


class Fault(NamedTuple):
    """What is wrong with one option.

    Attributes:
        field: its name in Python.
        given: the value, or the part of it that is wrong; None where there is nothing to show.
        text: what is allowed, and the way out; it names no flag.
        scarce: whether it is too little for an uncertainty.
    """

    field: str
    given: Any
    text: str
    scarce: bool = False

    def __str__(self) -> str:
        """As Python spells it."""
        return f"{self.field}{'' if self.given is None else f'={self.given!r}'}: {self.text}"


class OptionError(FaultsError):
    """Options that do not exist, are out of range or contradict each other (exit code 2).

    Attributes:
        faults: every `Fault`; the text says the first, as Python spells it.
    """


class ScarceError(OptionError, BudgetError):
    """The first fault is too little for an uncertainty (exit code 2)."""


def refuse(*faults: Fault) -> None:
    """Raise what is wrong, if anything is.

    Raises:
        OptionError: there is a fault; a BudgetError too, where the first is too few probes or steps.
    """
    if faults:
        raise (ScarceError if faults[0].scarce else OptionError)(faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What `option` was told, with what the class says of the field.

    Attributes:
        name: in Python.
        kind: bool, int, float or str: of the value, or of each of `many`.
        default: where nothing is given.
        help: one sentence.
        more: further sentences, for the docstring alone.
        metavar: what the command line calls the value.
        instead: what to show for the default where that says too little, for example "all" for None.
        choices: all that exist.
        many: whether the value is a sequence.
        at_least: lowest value.
        above: a value that all are above.
        below: a value that all are below.
        needed_by: the uncertainty that `at_least` is for, for example "a standard error".
        or_zero: whether zero is allowed beside the range.
        read: raises OptionError for what cannot be read.
        formerly: its name in earlier versions, still taken.
    """

    name: str = ""
    kind: type = str
    default: Any = None
    help: str
    more: str = ""
    metavar: str | None = None
    instead: str | None = None
    choices: Sequence[str] = ()
    many: bool = False
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    needed_by: str = ""
    or_zero: bool = False
    read: Callable[[Any], Any] | None = None
    formerly: str = ""

    def faults(self, value: Any) -> list[Fault]:
        """What is wrong with a value; None is allowed where it is the default."""
        if value is None:
            missing = Fault(self.name, None, "None is no value; leave it out for the default")
            return [] if self.default is None else [missing]
        if self.many and self.kind in NUMBERS:
            return self._faults_of_numbers(value)
        if self.many:
            return self._faults_of_names(value)
        if self.choices and value not in self.choices:
            return [Fault(self.name, value, f"allowed: {', '.join(self.choices)}")]
        if self.read is not None:
            try:
                self.read(value)
            except OptionError as error:
                return list(error.faults)
        return self._faults_of_number(value) if self.kind in NUMBERS else []

    def _faults_of_names(self, value: Any) -> list[Fault]:
        single = isinstance(value, str) or not isinstance(value, Collection)  # of a text each letter would be one
        if single or not all(isinstance(name, str) for name in value):
            example = f", for example [{value!r}]" if isinstance(value, str) else ""
            return [Fault(self.name, value, f"a list of names is needed{example}")]
        if not self.choices:
            return []
        if not value:
            text = f"no {self.name} asked; give at least one of {', '.join(self.choices)}"
            return [Fault(self.name, None, text)]
        wrong = [name for name in value if name not in self.choices]
        listed = f"allowed: {', '.join(self.choices)}" if len(self.choices) <= FEW else None
        text = "there is none of this name; "
        return [Fault(self.name, name, text + (listed or hint(name, self.choices))) for name in wrong]

    def _faults_of_numbers(self, value: Any) -> list[Fault]:
        if isinstance(value, str) or not isinstance(value, Collection):
            return [Fault(self.name, value, f"a list is needed, each {NUMBERS[self.kind][1]}")]
        return [fault for one in value for fault in self._faults_of_number(one)]

    def _faults_of_number(self, value: Any) -> list[Fault]:
        base, words = NUMBERS[self.kind]
        if isinstance(value, bool) or not isinstance(value, base):
            return [Fault(self.name, value, f"it must be {words}")]
        low, high, least = self.above, self.below, self.at_least
        inside = (
            (low is None or value > low) and (high is None or value < high) and (least is None or value >= least)
        )
        if inside or (self.or_zero and value == 0):
            return []
        if least is None:
            below = "" if high is None else f" and less than {high}"
            return [Fault(self.name, value, f"it must be more than {low}{below}")]
        if high is not None:
            return [Fault(self.name, value, f"it must be {least} to less than {high}")]
        if self.needed_by:
            text = f"{self.needed_by} needs at least {least}, {least - value} more"
            return [Fault(self.name, value, text, scarce=True)]
        return [Fault(self.name, value, f"at least {least} is needed")]

    def schema(self) -> dict[str, Any]:
        """The range, in the words of JSON Schema."""
        words = {
            "enum": [*self.choices, *([None] if self.default is None else [])] if self.choices else None,
            "minimum": 0 if self.or_zero else self.at_least,
            "exclusiveMinimum": self.above,
            "exclusiveMaximum": self.below,
        }
        return {name: value for name, value in words.items() if value is not None}


def option(default: T, **words: Any) -> T:
    """A field of a dataclass with the words of `Option`.

    Args:
        default: of the field.
        **words: fields of `Option` except name, kind and default; help is needed.
    """
    return field(default=default, metadata={"option": Option(**words)})


@cache
def options_of(cls: type[Any]) -> Mapping[str, Option]:
    """The options of a class by name, in the order written."""
    hints = get_type_hints(cls)
    return {
        one.name: replace(one.metadata["option"], name=one.name, kind=_kind(hints[one.name]), default=one.default)
        for one in fields(cls)
    }


def _kind(hint: Any) -> type:
    """The plain type of a hint: of ``int | None`` int; text where there is none."""
    return next((kind for kind in (bool, int, float) if hint is kind or kind in get_args(hint)), str)


def faults_of(cls: type[Any], given: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with each value by itself; a name that does not exist is a fault too."""
    known = options_of(cls)  # type: ignore[arg-type]  # a class can be hashed
    found = []
    for name, value in given.items():
        if name in known:
            found += known[name].faults(value)
        else:
            found.append(Fault(name, value, f"no such option; {hint(name, tuple(known))}"))
    return found


def hint(name: Any, allowed: Sequence[str]) -> str:
    """The nearest allowed name, or all of them."""
    near = get_close_matches(str(name), allowed, 1)
    return f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}"
