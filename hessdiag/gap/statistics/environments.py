"""Does a measure follow the gap under every change of a hyper-parameter, or only on average?

Granulated Kendall (Jiang et al. 2020, "Fantastic generalization measures", section 3): psi_i is the mean, over all
settings of the other hyper-parameters, of tau over the values of hyper-parameter i alone; Psi the mean of psi_i.
Robust sign error (Dziugaite et al. 2020, "In search of robust measures of generalization"): per environment, which
is a pair of settings that differ in one hyper-parameter, how often the signs disagree; the worst counts.
Conditional mutual information (Jiang et al., equation 9): K = min over sets U of at most two hyper-parameters of
I(V_mu; V_g | U) / H(V_g | U), V the sign of the difference over pairs of runs.

Runs of equal settings are seeds: all their pairs across two settings count alike, and none within a setting.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hessdiag.gap.statistics.means import clopper_pearson

Array = NDArray[np.float64]
Settings = tuple[Hashable, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Granulated Kendall of one hyper-parameter.

    Attributes:
        name: of the hyper-parameter.
        psi: mean tau over groups, in [−1, 1].
        lo: end of its interval over groups, Clopper and Pearson's of (psi + 1)/2: exact where each tau is ±1,
            and wider than needed elsewhere, since a tau in between spreads less than a sign.
        hi: other end.
        groups: settings of the others at which this one takes more than one value.
        worst: tau of the worst group.
        worst_group: its setting, "batch_size=64, depth=3".
    """

    name: str
    psi: float
    lo: float
    hi: float
    groups: int
    worst: float
    worst_group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SignError:
    """Share of disagreeing signs over environments: 0 always right, 0.5 a coin, 1 always wrong.

    Attributes:
        mean: over environments.
        median: over environments.
        quantile_90: the error that nine in ten environments stay under.
        worst: the largest.
        worst_environment: "lr: 0.1 → 0.3 (batch_size=64)".
        errors: sorted, one per environment: with (i + 1)/len as ordinate the CDF.
        dropped: environments without one difference of the gap that the test set can resolve.
        n_test: examples behind the weights; None: unweighted.
    """

    mean: float
    median: float
    quantile_90: float
    worst: float
    worst_environment: str
    errors: tuple[float, ...]
    dropped: int
    n_test: int | None


def axes_of(settings: Sequence[Mapping[str, object]], names: Sequence[str]) -> list[Settings]:
    """The values of the named hyper-parameters per run; missing is None, and what cannot be compared its text."""

    def plain(value: object) -> Hashable:
        return value if isinstance(value, str | int | float | bool | None) else repr(value)

    return [tuple(plain(run.get(name)) for name in names) for run in settings]


def granulated(x: Array, y: Array, settings: Sequence[Settings], names: Sequence[str], level: float) -> list[Axis]:
    """psi_i with its interval and worst group, per hyper-parameter that ever varies alone.

    Args:
        x: (n,) the measure.
        y: (n,) the gap.
        settings: n tuples of values, in the order of ``names``.
        names: of the hyper-parameters.
        level: confidence of the intervals.
    """
    found = []
    for index, name in enumerate(names):
        taus: list[tuple[float, str]] = []
        for rest, members in _groups(settings, index).items():
            pairs = [(i, j) for i, j in combinations(members, 2) if settings[i][index] != settings[j][index]]
            if pairs:
                one, two = np.array(pairs).T
                tau = float((np.sign(x[one] - x[two]) * np.sign(y[one] - y[two])).mean())
                taus.append((tau, _words(names, index, rest)))
        if taus:
            psi, n = math.fsum(tau for tau, _ in taus) / len(taus), len(taus)
            lo, hi = clopper_pearson((psi + 1) / 2 * n, n, level)
            worst, where = min(taus)
            found.append(
                Axis(name=name, psi=psi, lo=2 * lo - 1, hi=2 * hi - 1, groups=n, worst=worst, worst_group=where)
            )
    return found


def sign_error(
    x: Array, y: Array, settings: Sequence[Settings], names: Sequence[str], n_test: int | None
) -> SignError | None:
    """The robust sign error; None without an environment that counts.

    Args:
        x: (n,) the measure.
        y: (n,) the gap; for the weights a difference of shares in [0, 1], accuracy or error.
        settings: n tuples of values, in the order of ``names``.
        names: of the hyper-parameters.
        n_test: examples of the test set. A pair counts by max(0, 1 − 2 exp(−2 n (|Δg|/2)²))² − 0.5, if positive:
            Hoeffding's probability that the gaps truly differ in this order. None: every pair counts alike.
    """
    found: list[tuple[float, str]] = []
    dropped = 0
    for index in range(len(names)):
        for rest, members in _groups(settings, index).items():
            by_value: dict[Hashable, list[int]] = defaultdict(list)
            for member in members:
                by_value[settings[member][index]].append(member)
            for (value, first), (other, second) in combinations(by_value.items(), 2):
                error = _weighted_error(x, y, first, second, n_test)
                if error is None:
                    dropped += 1
                else:
                    where = f" ({words})" if (words := _words(names, index, rest)) else ""
                    found.append((error, f"{names[index]}: {value} → {other}{where}"))
    if not found:
        return None
    errors = np.sort([error for error, _ in found])
    worst, where = max(found, key=lambda pair: pair[0])
    return SignError(
        mean=float(errors.mean()),
        median=float(np.median(errors)),
        quantile_90=float(np.quantile(errors, 0.9, method="inverted_cdf")),
        worst=worst,
        worst_environment=where,
        errors=tuple(errors.tolist()),
        dropped=dropped,
        n_test=n_test,
    )


class PairSigns:
    """Ordered pairs of runs, grouped by the values of every set of at most two hyper-parameters.

    Args:
        gap: (n,).
        settings: n tuples of values.
    """

    def __init__(self, gap: Array, settings: Sequence[Settings]) -> None:
        n = len(gap)
        self._i, self._j = np.nonzero(~np.eye(n, dtype=bool))
        self._gap = self._signs(gap)
        self._cells: list[NDArray[np.intp]] = []
        for size in range(3):
            for chosen in combinations(range(len(settings[0])), size):
                label = {
                    value: k
                    for k, value in enumerate(dict.fromkeys(tuple(s[c] for c in chosen) for s in settings))
                }
                run = np.array([label[tuple(s[c] for c in chosen)] for s in settings])
                pairs = run[self._i] * len(label) + run[self._j]
                self._cells.append(np.unique(pairs, return_inverse=True)[1])

    def information(self, measure: Array) -> float | None:
        """K(mu) in [0, 1]; None where the hyper-parameters leave nothing of the gap's sign to be known.

        A plug-in estimate: few pairs per cell make it too large, so compare with `reference` only.
        """
        signs, found = self._signs(measure), []
        for cells in self._cells:
            counts = np.bincount(9 * cells + 3 * signs + self._gap, minlength=9 * (cells.max() + 1))
            counts = counts.reshape(-1, 3, 3)
            both, mu, gap, cell = (
                _entropy(table) for table in (counts, counts.sum(2), counts.sum(1), counts.sum((1, 2)))
            )
            if gap - cell > 1e-12:
                found.append((mu + gap - both - cell) / (gap - cell))
        return max(min(found), 0.0) if found else None

    def _signs(self, values: Array) -> NDArray[np.intp]:
        return np.sign(values[self._i] - values[self._j]).astype(np.intp) + 1


def _groups(settings: Sequence[Settings], index: int) -> dict[Settings, list[int]]:
    """Runs that agree in everything but hyper-parameter ``index``."""
    groups: dict[Settings, list[int]] = defaultdict(list)
    for run, values in enumerate(settings):
        groups[values[:index] + values[index + 1 :]].append(run)
    return groups


def _words(names: Sequence[str], index: int, rest: Settings) -> str:
    others = [name for k, name in enumerate(names) if k != index]
    return ", ".join(f"{name}={value}" for name, value in zip(others, rest, strict=True))


def _weighted_error(x: Array, y: Array, first: list[int], second: list[int], n_test: int | None) -> float | None:
    i, j = (grid.ravel() for grid in np.meshgrid(first, second))
    change = y[i] - y[j]
    wrong = (1 - np.sign(x[i] - x[j]) * np.sign(change)) / 2
    weights = np.ones(len(i))
    if n_test is not None:
        sure = np.maximum(0, 1 - 2 * np.exp(-2 * n_test * np.square(change / 2))) ** 2
        weights = np.maximum(sure - 0.5, 0)
    total = float(weights.sum())
    return float((weights * wrong).sum()) / total if total > 0 else None


def _entropy(counts: NDArray[np.intp]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
