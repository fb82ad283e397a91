"""The refusals: one line each, saying what was asked, what is allowed, and the way out.

Every error carries the exit code its command ends with (docs/exit_codes.md). `Refused` is the refusal of one
number: it stands in the place of that number, and the rest of the report goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hessdiag.shown import cut, single_spaced, visible

CODES = (
    "usage",
    "problem",
    "raised",
    "unreadable",
    "other_architecture",
    "not_finite",
    "out_of_memory",
    "cannot_be_believed",
    "does_not_apply",
    "no_verdict",
    "not_written",
    "not_kept",
    "claimed",
    "process_ended",
    "unexpected",
)
"""Every code of a refusal, for programs: texts are for people, and change. What each means is on the page
``refusals``."""


class HessdiagError(Exception):
    """Base of every refusal; its text is one line a user can act on.

    An option stands in backticks as Python spells it, `probes` or `method='auto'`; the command line makes its flag
    of that (`hessdiag.cli.spelling`).

    >>> import hessdiag
    >>> try:
    ...     hessdiag.trace("H", probes=4)
    ... except hessdiag.HessdiagError as error:
    ...     print(error)
    str of shape (): a square matrix or linear operator is needed
    """

    exit_code = 2
    page = ""
    """What ``hessdiag explain`` shows of it, where a page helps."""
    code = "usage"
    """Out of `CODES`: what a program may ask for."""

    def __str__(self) -> str:
        """The text, whatever the names and files that it quotes hold."""
        return visible(super().__str__())


class UsageError(HessdiagError):
    """What was asked for contradicts itself or does not exist (exit code 2)."""


class FaultsError(UsageError):
    """Several faults at once (exit code 2).

    Attributes:
        faults: all of them; the text says the first, and how many more there are.
    """

    def __init__(self, faults: Iterable[Any]) -> None:
        self.faults = tuple(faults)
        super().__init__(self.faults)  # so that it can be pickled

    def __str__(self) -> str:
        """The first fault."""
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return visible(f"{self.faults[0]}{more}")


class BudgetError(UsageError):
    """Too few probes, steps or samples for the uncertainty that was asked for (exit code 2)."""

    page = "intervals"


class NothingMatchedError(UsageError):
    """Globs on parameter names match none (exit code 2; in a check, 3: nothing was measured)."""


class ProblemError(UsageError):
    """The factory did not give a usable ``Problem`` (exit code 2)."""

    code = "problem"


class RaisedError(ProblemError):
    """Code of the user raised something, which is the ``__cause__`` (exit code 2)."""

    code = "raised"


class NoVerdictError(HessdiagError):
    """Nothing was measured that could be compared: neither passed nor failed (exit code 3)."""

    exit_code = 3
    page = "check"
    code = "no_verdict"


class LoadError(HessdiagError):
    """A checkpoint or data file could not be read, or does not fit the model (exit code 4)."""

    exit_code = 4
    code = "unreadable"


class MisfitError(LoadError):
    """A checkpoint was read, and is one of another model (exit code 4)."""

    code = "other_architecture"


class MeasurementError(HessdiagError):
    """The measurement ran, but its numbers would be meaningless (exit code 4)."""

    exit_code = 4
    page = "warnings"
    code = "cannot_be_believed"


class NonFiniteError(MeasurementError):
    """NaN or infinity in weights, loss or products (exit code 4)."""

    code = "not_finite"


class OutputError(HessdiagError):
    """The results could not be written (exit code 4); nothing half-written is left behind."""

    exit_code = 4
    code = "not_written"


@dataclass(frozen=True, slots=True)
class Refused:
    """What a function returns in place of a result that does not exist here.

    Attributes:
        reason: why, on one line; formatted into a text, a refusal is its reason.
        code: out of `CODES`; empty where nobody said, as in records of an earlier hessdiag.
    """

    reason: str
    code: str = ""

    def __str__(self) -> str:
        """The reason."""
        return self.reason


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of any exception on one line, cut to ``limit`` characters."""
    text = single_spaced(error) or type(error).__name__
    if not isinstance(error, HessdiagError):
        text = text.replace("`", "'")  # what stands in backticks is an option of ours
    return cut(text, limit)
