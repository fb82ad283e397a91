"""What goes into the rank statistics of a set of checkpoints, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import UsageError
from hessdiag.gap.statistics.environments import Axis, SignError
from hessdiag.gap.statistics.kendall import Association

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """One number per checkpoint, with its interval where there is one.

    Attributes:
        values: NaN or None where there is none.
        lo: lower ends, None for numbers without interval.
        hi: upper ends.
    """

    values: Sequence[float | None]
    lo: Sequence[float | None] | None = None
    hi: Sequence[float | None] | None = None

    def arrays(self) -> tuple[Array, Array, Array]:
        """Values, lower and upper ends; an end that is missing or not finite is the value."""
        values = np.array(self.values, float)
        ends = [values if end is None else np.array(end, float) for end in (self.lo, self.hi)]
        lo, hi = (np.where(np.isfinite(end), end, values) for end in ends)
        return values, np.minimum(lo, values), np.maximum(hi, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """What is known of a set of checkpoints.

    Attributes:
        names: of the checkpoints.
        gap: the generalization gap, larger is worse (test minus train loss or error).
        measures: by name.
        settings: per checkpoint its hyper-parameters, from ``Problem.meta``.
        confidence: of the intervals of the readings.
        n_test: examples in the test set where the gap is a difference of shares (error); None for a loss.
    """

    names: Sequence[str]
    gap: Readings
    measures: Mapping[str, Readings]
    settings: Sequence[Mapping[str, object]]
    confidence: float = 0.95
    n_test: int | None = None

    def __post_init__(self) -> None:
        """Refuse columns of unequal length.

        Raises:
            UsageError: a column that does not have one entry per checkpoint.
        """
        columns = {"gap": self.gap.values, "settings": self.settings}
        columns |= {name: column.values for name, column in self.measures.items()}
        for name, column in columns.items():
            if len(column) != len(self.names):
                msg = f"{name}: {len(column)} entries for {len(self.names)} checkpoints; give one for each"
                raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStatistics:
    """How one measure goes with the gap; where ``reason`` is not empty there is no number.

    Attributes:
        measure: its name.
        n: checkpoints that count.
        reason: why nothing can be told, and what is needed.
        overall: tau-b with the interval over checkpoints and its p.
        p_holm: p adjusted for having tried ``RankReport.tested`` measures.
        readings_lo: lower end of tau over the readings' own intervals, checkpoints fixed; None: none has one.
        readings_hi: upper end.
        undecided: share of the pairs of checkpoints whose intervals overlap, of the measure or of the gap.
        axes: granulated, per hyper-parameter.
        psi: mean over ``axes``.
        sign_error: over environments.
        information: K(mu), in [0, 1].
        left_out: checkpoints without a finite measure or gap.
        notes: what could not be computed, and why.
    """

    measure: str
    n: int
    reason: str = ""
    overall: Association | None = None
    p_holm: float | None = None
    readings_lo: float | None = None
    readings_hi: float | None = None
    undecided: float | None = None
    axes: tuple[Axis, ...] = ()
    psi: float | None = None
    sign_error: SignError | None = None
    information: float | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Axis | None:
        """The hyper-parameter that holds the worst group."""
        return min(self.axes, key=lambda axis: axis.worst, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """All measures of a table.

    Attributes:
        measures: in the order of the table.
        tried: how many measures there were.
        tested: how many got a p, which is what Holm's adjustment counts.
        hyperparameters: that vary, seeds not counted.
        random_information: K of random measures, median and 95% quantile, over all checkpoints with a gap:
            a K below the second tells nothing.
        oracle_information: K of the gap itself, read anew within its interval, median: the most there is to
            reach; 1 without intervals.
        confidence: of every interval.
    """

    measures: tuple[RankStatistics, ...]
    tried: int
    tested: int
    hyperparameters: tuple[str, ...]
    random_information: tuple[float, float] | None
    oracle_information: float | None
    confidence: float
