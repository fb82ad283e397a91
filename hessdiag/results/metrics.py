"""Numbers with their intervals, one type per kind of knowledge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hessdiag.errors import BudgetError, NonFiniteError, UsageError
from hessdiag.presenter import presenter

QUANTITIES = (
    "lambda_max",
    "lambda_min",
    "trace",
    "frobenius_squared",
    "ws_lower",
    "ws_upper",
    "effective_rank",
    "negative_mass",
    "density",
)
"""What ``analyze`` measures where nothing is said; all but ``density`` are names in ``Analysis.metrics``."""

MEASURABLE = (*QUANTITIES, "preconditioned_lambda_max")
"""Everything it can be asked for; the last needs the state of an optimizer."""

Kind = Literal["exact", "probes", "ritz", "bracket", "bound"]

WIDEST_BRACKET = 0.1  # of all eigenvalues: 5% on either side


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Enough to repeat the measurement, and nothing that changes when it is repeated."""

    method: str  # "deflated Hutchinson"
    settings: Mapping[str, int | float | str] = field(default_factory=dict)  # {"probes": 32, "seed": 0}
    products: int = 0  # products that went into it, shared ones included: counted, not asked for
    dtype: str = ""  # of the products, "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataError:
    """How well the sample set stands for the population it was drawn from."""

    stderr: float  # units of the quantity
    lo: float
    hi: float
    blocks: int  # independent pieces of data behind ``stderr``: examples or batches
    method: str
    block_values: tuple[float, ...] = field(
        default=(), repr=False
    )  # the quantity per batch: what pairs this error with another checkpoint's
    block_weights: tuple[float, ...] = field(default=(), repr=False)  # what each batch's mean stands for
    block_examples: tuple[int, ...] = field(
        default=(), repr=False
    )  # examples per batch, in the order of the sample set


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Metric:
    """A number with its interval; the base of every result."""

    quantity: str
    value: float  # units of loss / parameter² for eigenvalues and traces
    lo: float
    hi: float
    kind: Kind
    confidence: float  # that [lo, hi] holds the truth on this sample set; 1.0 where only rounding is left
    provenance: Provenance
    data: DataError | None = None

    @property
    def resolved(self) -> bool:
        """Whether the value alone says something.

        The interval reaches less far from it than zero, and a bracket, of which the value is the certain end, is
        no wider than 10% of all eigenvalues.
        """
        narrow = self.kind != "bracket" or self.hi - self.lo <= WIDEST_BRACKET
        return narrow and max(self.hi - self.value, self.value - self.lo) <= abs(self.value)

    def __repr__(self) -> str:
        """One line: value, interval and how it is known."""
        return str(presenter().line(self))

    def __post_init__(self) -> None:
        """Refuse what is not a finite number inside its own interval."""
        if not (math.isfinite(self.value) and math.isfinite(self.lo) and math.isfinite(self.hi)):
            msg = (
                f"{self.quantity}: {self.value} in [{self.lo}, {self.hi}] is not finite; the loss or its "
                "gradient overflows at this checkpoint: try `dtype='float64'`"
            )
            raise NonFiniteError(msg)
        if not self.lo <= self.value <= self.hi:
            msg = f"{self.quantity}: {self.value} lies outside its interval [{self.lo}, {self.hi}]"
            raise NonFiniteError(msg)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Estimate(Metric):
    """A number known exactly, or up to sampling error over probes.

    >>> import hessdiag, torch
    >>> found = hessdiag.trace(torch.diag(torch.tensor([3.0, 2.0, -1.0])), probes=3)
    >>> isinstance(found, hessdiag.Estimate), found.kind, round(found.value, 3)
    (True, 'exact', 4.0)
    """

    stderr: float  # same units; 0.0 only where kind is "exact"
    per_probe: tuple[float, ...] = field(
        default=(), repr=False
    )  # values, one per probe, of mean ``value``: what makes pairs possible
    per_draw: tuple[float, ...] = field(
        default=(), repr=False
    )  # tr(G) per draw of output signs where probes see R only: an error of its own


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RitzValue(Metric):
    """An eigenvalue found by iteration, checked by one fresh product.

    An eigenvalue lies within ``residual + floor`` of ``value``. For the extremes, [lo, hi] says more: one
    end is the Rayleigh quotient, which no maximum can fall below, the other the Lanczos certificate.

    >>> import hessdiag, torch
    >>> found = hessdiag.extremes(torch.diag(torch.tensor([3.0, 2.0, -1.0]))).lambda_max
    >>> isinstance(found, hessdiag.RitzValue), found.lo <= 3 <= found.hi
    (True, True)
    """

    residual: float  # ‖Hy − θy‖ of a fresh product, ‖y‖ = 1
    floor: float  # measured rounding of the products, absolute

    @property
    def over_threshold(self) -> tuple[float, float, float] | None:
        """(value, lo, hi) as shares of the optimizer's threshold, of ``preconditioned_lambda_max``; else None."""
        threshold = self.provenance.settings.get("threshold")
        if not isinstance(threshold, int | float):
            return None
        return self.value / threshold, self.lo / threshold, self.hi / threshold


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Bound(Metric):
    """A bound on ``of``. It is a guarantee only if ``exact_inputs``.

    >>> import hessdiag
    >>> found = hessdiag.wolkowicz_styan(4.0, 14.0, 3).upper
    >>> isinstance(found, hessdiag.Bound), found.of, found.value >= 3
    (True, 'lambda_max', True)
    """

    of: str  # "lambda_max"
    side: Literal["upper", "lower"]
    exact_inputs: bool
    looseness: float | None = None  # bound / measured value of ``of``, where that was measured
    per_probe: tuple[float, ...] = field(default=(), repr=False)  # linearized, as of `Estimate`


def a_share(value: float, name: str, example: float = 0.95) -> None:
    """Refuse what is no probability or relative size.

    Raises:
        UsageError: ``value`` outside (0, 1).
    """
    if not 0 < value < 1:
        msg = f"{name}={value}: it must lie in (0, 1), for example {example}"
        raise UsageError(msg)


def at_least(number: int, needed: int, what: str, why: str) -> None:
    """Refuse a budget too small for an uncertainty.

    Raises:
        BudgetError: ``number < needed``.
    """
    if number < needed:
        msg = f"{what}={number}: {why} needs at least {needed}, {needed - number} more"
        raise BudgetError(msg)
