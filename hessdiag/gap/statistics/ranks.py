"""Which measure goes with the generalization gap over a set of runs, and how far that can be trusted.

Two uncertainties are kept apart. The interval of tau is over *checkpoints*: other runs of the same kind would give
another tau. The range of the *readings* keeps the checkpoints and lets every measure and gap vary in its own
interval; as readings hold one error already and get a second, it leans towards 0, and tau may lie outside of it.
Runs that belong together (epochs of one run, seeds) are not independent: the interval is then too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import UsageError
from hessdiag.gap.statistics.environments import (
    PairSigns,
    Settings,
    axes_of,
    granulated,
    sign_error,
)
from hessdiag.gap.statistics.kendall import associate, reread, tau_of
from hessdiag.gap.statistics.rank_results import RankReport, RankStatistics, RunTable
from hessdiag.multiplicity import holm
from hessdiag.results import a_share

Array = NDArray[np.float64]

FEWEST = 8  # the 95% interval of 8 checkpoints spans 62% of [−1, 1] around no association: fewer tell nothing
SEEDS = ("seed",)  # hyper-parameters that only tell repetitions apart
REFERENCES = 200  # random measures and oracles that K(mu) is compared with


def rank_report(
    table: RunTable, *, hyperparameters: Sequence[str] | None = None, confidence: float = 0.95, seed: int = 0
) -> RankReport:
    """Rank statistics of every measure of the table against the gap.

    Args:
        table: the checkpoints.
        hyperparameters: to group by; None: all that vary, without ``seed``.
        confidence: of every interval.
        seed: names the random streams: readings, permutations, references.

    Raises:
        UsageError: a hyper-parameter that no checkpoint has, or ``confidence`` outside (0, 1).
    """
    a_share(confidence, "confidence")
    names = _hyperparameters(table, hyperparameters)
    found = [_one(table, measure, names, confidence, seed) for measure in table.measures]
    tested = [k for k, one in enumerate(found) if one.overall is not None]
    adjusted = holm([one.overall.p for one in found if one.overall is not None])
    for k, p in zip(tested, adjusted, strict=True):
        found[k] = replace(found[k], p_holm=p)
    random, oracle = _references(table, names, seed) if tested and names else (None, None)
    return RankReport(
        measures=tuple(found),
        tried=len(found),
        tested=len(tested),
        hyperparameters=tuple(names),
        random_information=random,
        oracle_information=oracle,
        confidence=confidence,
    )


def _hyperparameters(table: RunTable, asked: Sequence[str] | None) -> list[str]:
    known = list(dict.fromkeys(name for run in table.settings for name in run))
    if asked is None:
        varying = [name for name in known if len(set(axes_of(table.settings, [name]))) > 1]
        return [name for name in varying if name not in SEEDS]
    for name in asked:
        if name not in known:
            msg = f"hyper-parameter {name!r}: no checkpoint has it; there are {', '.join(known) or 'none'}"
            raise UsageError(msg)
    return list(asked)


def _one(table: RunTable, measure: str, names: list[str], confidence: float, seed: int) -> RankStatistics:
    x, x_lo, x_hi = table.measures[measure].arrays()
    y, y_lo, y_hi = table.gap.arrays()
    kept = np.isfinite(x) & np.isfinite(y)
    left_out = tuple(name for name, keep in zip(table.names, kept, strict=True) if not keep)
    x, x_lo, x_hi, y, y_lo, y_hi = (column[kept] for column in (x, x_lo, x_hi, y, y_lo, y_hi))
    base = RankStatistics(measure=measure, n=len(x), left_out=left_out)
    if reason := _refusal(measure, x, y, left_out):
        return replace(base, reason=reason)
    if bool(((y_lo <= 0) & (y_hi >= 0) & (y_lo < y_hi)).all()):
        return replace(base, reason=f"cannot tell: the interval of every gap, of {len(x)} checkpoints, holds 0")
    overall = associate(x, y, confidence, _stream(seed, "permutations", measure))
    if overall is None:
        which = "the gap" if _one_apart(y) else measure
        return replace(base, reason=f"cannot tell: {which} is the same at all {len(x)} checkpoints but one")
    base = replace(base, overall=overall)
    if bool((x_lo < x_hi).any() or (y_lo < y_hi).any()):
        rng = _stream(seed, "readings", measure)
        again = [reread(*column, table.confidence, rng) for column in ((x, x_lo, x_hi), (y, y_lo, y_hi))]
        lo, hi = np.quantile(tau_of(again[0], again[1]), [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()
        undecided = float((_overlap(x_lo, x_hi) | _overlap(y_lo, y_hi)).mean())
        base = replace(base, readings_lo=lo, readings_hi=hi, undecided=undecided)
    else:
        base = replace(
            base, notes=("measure and gap have no intervals: what their errors do to tau is not known",)
        )
    settings = [row for row, keep in zip(axes_of(table.settings, names), kept, strict=True) if keep]
    return _grouped(base, x, y, settings, names, confidence, table.n_test)


def _grouped(
    base: RankStatistics,
    x: Array,
    y: Array,
    settings: list[Settings],
    names: list[str],
    confidence: float,
    n_test: int | None,
) -> RankStatistics:
    if not names:
        note = "no groups: no hyper-parameter varies; record them in Problem.meta"
        return replace(base, notes=(*base.notes, note))
    axes = tuple(granulated(x, y, settings, names, confidence))
    if not axes:
        note = f"no groups: no two checkpoints differ in one of {', '.join(names)} alone; name fewer to group by"
        return replace(base, notes=(*base.notes, note), information=PairSigns(y, settings).information(x))
    error = sign_error(x, y, settings, names, n_test)
    note = (
        f"no sign error: {n_test} test examples cannot order the gap of any two settings that differ in one value"
    )
    return replace(
        base,
        axes=axes,
        psi=sum(axis.psi for axis in axes) / len(axes),
        sign_error=error,
        information=PairSigns(y, settings).information(x),
        notes=base.notes if error else (*base.notes, note),
    )


def _refusal(measure: str, x: Array, y: Array, left_out: tuple[str, ...]) -> str:
    if (n := len(x)) < FEWEST:
        without = f" ({len(left_out)} more have no finite {measure} or gap)" if left_out else ""
        return f"cannot tell: {n} checkpoint{'s' * (n != 1)}{without}, needs {FEWEST - n} more"
    for name, values in (("the gap", y), (measure, x)):
        if values.min() == values.max():
            return f"cannot tell: {name} is the same at all {n} checkpoints ({values[0]:.4g})"
    return ""


def _one_apart(values: Array) -> bool:
    return bool(np.unique(values, return_counts=True)[1].max() >= len(values) - 1)


def _overlap(lo: Array, hi: Array) -> NDArray[np.bool_]:
    i, j = np.triu_indices(len(lo), 1)
    return np.asarray((lo[i] <= hi[j]) & (lo[j] <= hi[i]))


def _references(table: RunTable, names: list[str], seed: int) -> tuple[tuple[float, float] | None, float | None]:
    y, lo, hi = table.gap.arrays()
    kept = np.isfinite(y)
    settings = [row for row, keep in zip(axes_of(table.settings, names), kept, strict=True) if keep]
    pairs, rng = PairSigns(y[kept], settings), _stream(seed, "references")
    random = [pairs.information(z) for z in rng.standard_normal((REFERENCES, int(kept.sum())))]
    again = reread(y[kept], lo[kept], hi[kept], table.confidence, rng, REFERENCES)
    oracle = [pairs.information(values) for values in again]
    numbers = [k for k in random if k is not None]
    if not numbers:
        return None, None
    middle, high = np.quantile(numbers, [0.5, 0.95])
    return (float(middle), float(high)), float(np.median([k for k in oracle if k is not None]))


def _stream(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng([seed, *"\0".join(names).encode()])
