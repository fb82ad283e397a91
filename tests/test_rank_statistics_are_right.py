"""Promise: rank statistics agree with enumeration, their intervals cover, and too little data is refused."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import kendalltau, norm

from hessdiag.errors import UsageError
from hessdiag.gap.statistics import environments, kendall
from hessdiag.gap.statistics.rank_results import Readings, RunTable
from hessdiag.gap.statistics.ranks import rank_report
from hessdiag.multiplicity import holm

SAMPLES = 400  # a true 95% shows 91.7% and more (3 sigma)
BAND = (0.917, 1.0)  # few checkpoints cover more than they say
CASES = [(8, 0.0, None), (8, 0.6, None), (8, 0.95, None), (12, 0.85, None), (20, 0.6, None), (50, 0.3, None)]
TIED = [(8, 0.0, 3), (12, 0.6, 3), (20, 0.6, 4)]


def copula(n, tau, levels, samples, seed=0):
    """Normal copula with Kendall's tau = 2/pi arcsin(rho); the measure cut into equally likely levels."""
    rng, rho = np.random.default_rng(seed), np.sin(np.pi * tau / 2)
    x = rng.normal(size=(samples, n))
    y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=(samples, n))
    return (np.floor(norm.cdf(x) * levels) if levels else x), y


def true_tau(tau, levels):
    if not levels:
        return tau
    x, y = copula(4000, tau, levels, 1, seed=9)
    return kendalltau(x[0], y[0]).statistic


@functools.cache
def estimates(case):
    """Tau and its standard error, (samples, 2)."""
    pairs = [kendall.jackknife(x, y) for x, y in zip(*copula(*case, SAMPLES), strict=True)]
    return [pair for pair in pairs if not np.isnan(pair[0])]


def coverage(case, interval=kendall.tau_interval):
    n, tau, levels = case
    truth = true_tau(tau, levels)
    ends = [interval(found, stderr, n, 0.95) for found, stderr in estimates(case)]
    return np.mean([lo <= truth <= hi for lo, hi in ends])


@pytest.mark.parametrize("case", CASES + TIED, ids=str)
def test_tau_intervals_cover(case):
    assert BAND[0] <= coverage(case) <= BAND[1]


def test_tau_intervals_say_something():
    x, y = copula(30, 0.6, None, 100)
    widths = [np.diff(kendall.tau_interval(*kendall.jackknife(a, b), 30, 0.95)) for a, b in zip(x, y, strict=True)]
    assert np.mean(widths) < 0.42  # the normal theory's 1.96 sqrt(0.437/26) (1 − tau²) · 2 = 0.33


@pytest.mark.parametrize("levels", [None, 3])
def test_tau_and_its_standard_error_match_the_definition(levels):
    for x, y in zip(*copula(10, 0.4, levels, 20), strict=True):
        tau, stderr = kendall.jackknife(x, y)
        left = [kendalltau(np.delete(x, k), np.delete(y, k)).statistic for k in range(10)]
        assert tau == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)
        assert stderr == pytest.approx(np.sqrt(9 / 10 * np.sum((left - np.mean(left)) ** 2)), abs=1e-12)


def permuted(x, y):
    """Two-sided p by going through every pairing."""
    taus = np.array(
        [kendall.signs(x[list(order)]) @ kendall.signs(y) for order in itertools.permutations(range(7))]
    )
    seen = kendall.signs(x) @ kendall.signs(y)
    return min(1.0, 2 * min((taus >= seen).mean(), (taus <= seen).mean()))


@pytest.mark.parametrize("levels", [None, 2])
def test_p_is_exact_for_few(levels):
    x, y = (values[0] for values in copula(7, 0.5, levels, 1, seed=4))
    p, how = kendall.p_value(x, y, np.random.default_rng(0))
    assert how == "exact"
    assert p == pytest.approx(permuted(x, y), abs=1e-12)


def test_p_is_uniform_without_association():
    rng = np.random.default_rng(2)
    values = [kendall.p_value(x, y, rng)[0] for x, y in zip(*copula(12, 0.0, None, 800), strict=True)]
    assert abs(np.mean(np.array(values) <= 0.05) - 0.05) < 0.025  # 3 sigma of 800 is 0.023


def test_holm_matches_its_definition():
    p = [0.01, 0.04, 0.03, 0.005]
    # sorted .005·4, .01·3, .03·2, .04·1, and never falling
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])


SETTINGS = [{"lr": a, "width": b, "seed": s} for a in (0.1, 0.3, 1.0) for b in (16, 64) for s in (0, 1)]


def grid(seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    gap = np.array([-np.log(s["lr"]) + 0.3 * (s["width"] == 64) for s in SETTINGS]) + 0.1 * rng.normal(size=12)
    return gap, gap + noise * rng.normal(size=12)


def test_granulated_tau_matches_a_loop_over_the_grid():
    gap, measure = grid(noise=2.0)
    rows = environments.axes_of(SETTINGS, ["lr", "width"])
    axes = environments.granulated(measure, gap, rows, ["lr", "width"], 0.95)
    by_width = []
    for width in (16, 64):
        members = [k for k, s in enumerate(SETTINGS) if s["width"] == width]
        agree = [
            np.sign((measure[i] - measure[j]) * (gap[i] - gap[j]))
            for i in members
            for j in members
            if SETTINGS[i]["lr"] != SETTINGS[j]["lr"]
        ]
        by_width.append(np.mean(agree))
    assert axes[0].name == "lr"
    assert (axes[0].groups, axes[1].groups) == (2, 3)
    assert axes[0].psi == pytest.approx(np.mean(by_width))
    assert axes[0].worst == pytest.approx(min(by_width))
    assert all(axis.lo <= axis.psi <= axis.hi for axis in axes)


def test_sign_errors_weigh_by_what_the_test_set_resolves():
    gap, measure = np.array([0.0, 0.5, 0.51]), np.array([0.0, -1.0, 1.0])
    rows = [(1,), (2,), (3,)]
    found = environments.sign_error(measure, gap, rows, ["lr"], 100)
    assert found is not None
    assert found.dropped == 1  # 0.50 and 0.51 cannot be told apart by 100 examples
    assert found.errors == (0.0, 1.0)
    assert found.worst_environment == "lr: 1 → 2"
    plain = environments.sign_error(measure, gap, rows, ["lr"], None)
    assert plain is not None
    assert plain.errors == (0.0, 0.0, 1.0)
    assert plain.mean == pytest.approx(1 / 3)


def test_replicates_weigh_as_the_formula_says():
    gap, measure = np.array([0.1, 0.2, 0.45]), np.array([1.0, 0.0, 0.5])
    found = environments.sign_error(measure, gap, [(1,), (1,), (2,)], ["lr"], 200)
    weights = [max(0, 1 - 2 * np.exp(-400 * (d / 2) ** 2)) ** 2 - 0.5 for d in (0.35, 0.25)]
    assert min(weights) > 0
    assert found is not None
    assert found.mean == pytest.approx(weights[0] / sum(weights))  # the first of the two disagrees


def information_by_hand(measure, gap, settings):
    """I(V_mu; V_g | U) / H(V_g | U), the smallest over sets of at most two, from dictionaries of counts."""
    pairs = list(itertools.permutations(range(len(gap)), 2))
    least = np.inf
    for size in range(3):
        for chosen in itertools.combinations(range(len(settings[0])), size):
            cells = {}
            for i, j in pairs:
                key = tuple((settings[i][c], settings[j][c]) for c in chosen)
                table = cells.setdefault(key, np.zeros((2, 2)))
                table[int(measure[i] > measure[j]), int(gap[i] > gap[j])] += 1
            information = unknown = 0.0
            for table in cells.values():
                share, p = table.sum() / len(pairs), table / table.sum()
                rows, columns = p.sum(1), p.sum(0)
                for a, b in itertools.product(range(2), range(2)):
                    if p[a, b]:
                        information += share * p[a, b] * np.log2(p[a, b] / (rows[a] * columns[b]))
                unknown -= share * sum(q * np.log2(q) for q in columns if q)
            if unknown > 0:
                least = min(least, information / unknown)
    return least


def test_information_matches_its_definition():
    gap, measure = grid(noise=0.8)
    rows = environments.axes_of(SETTINGS, ["lr", "width"])
    pairs = environments.PairSigns(gap, rows)
    assert pairs.information(measure) == pytest.approx(information_by_hand(measure, gap, rows), abs=1e-12)
    assert pairs.information(gap) == pytest.approx(1.0)
    assert pairs.information(-gap) == pytest.approx(1.0)


def table(**measures):
    gap, measure = grid()
    columns = {"sharpness": Readings(values=measure, lo=measure - 0.2, hi=measure + 0.2), **measures}
    names = [f"run{k}" for k in range(12)]
    return RunTable(names=names, gap=Readings(values=gap), measures=columns, settings=SETTINGS)


def test_the_report_says_how_many_were_tried():
    noise = Readings(values=np.random.default_rng(5).normal(size=12))
    report = rank_report(table(noise=noise, constant=Readings(values=[1.0] * 12)))
    sharp, noise_found, constant = report.measures
    assert (report.tried, report.tested, report.hyperparameters) == (3, 2, ("lr", "width"))
    assert sharp.overall is not None
    assert sharp.p_holm == pytest.approx(2 * sharp.overall.p)
    assert sharp.overall.lo > 0
    assert noise_found.overall is not None
    assert noise_found.overall.lo < 0 < noise_found.overall.hi
    assert constant.reason == "cannot tell: constant is the same at all 12 checkpoints (1)"
    assert sharp.readings_lo is not None
    assert sharp.readings_lo < sharp.overall.tau
    assert noise_found.readings_lo is None
    assert noise_found.notes
    assert sharp.information is not None
    assert report.random_information is not None
    assert sharp.information > report.random_information[1]
    assert report.oracle_information == pytest.approx(1.0)
    json.dumps(asdict(report), allow_nan=False)
    assert rank_report(table(noise=noise)) == rank_report(table(noise=noise))


def test_readings_widen_with_their_own_error():
    gap, measure = grid()
    spans = []
    for error in (0.01, 1.0):
        again = [
            kendall.reread(v, v - error, v + error, 0.95, np.random.default_rng(k))
            for k, v in enumerate((measure, gap))
        ]
        spans.append(np.ptp(np.quantile(kendall.tau_of(*again), [0.025, 0.975])))
    assert spans[0] < 0.2 < spans[1]
    deviations = (
        kendall.reread(measure, measure - 1, measure + 2, 0.95, np.random.default_rng(0), 20_000) - measure
    )
    assert np.mean((deviations > -1) & (deviations < 2)) == pytest.approx(0.95, abs=0.005)


def shorter(keep, gap=None, measure=None):
    values, readings = grid()
    gap, measure = (values if gap is None else gap)[:keep], (readings if measure is None else measure)[:keep]
    names = [f"run{k}" for k in range(keep)]
    runs = RunTable(
        names=names, gap=Readings(values=gap), measures={"m": Readings(values=measure)}, settings=SETTINGS[:keep]
    )
    return rank_report(runs).measures[0]


def test_too_little_is_refused_with_what_is_needed():
    assert shorter(5).reason == "cannot tell: 5 checkpoints, needs 3 more"
    assert shorter(0).reason == "cannot tell: 0 checkpoints, needs 8 more"
    assert shorter(8).overall is not None
    holes = np.r_[[np.nan, np.inf, np.nan, np.nan, np.nan], np.arange(7.0)]
    found = shorter(12, measure=holes)
    assert found.reason == "cannot tell: 7 checkpoints (5 more have no finite m or gap), needs 1 more"
    assert found.left_out == ("run0", "run1", "run2", "run3", "run4")
    assert shorter(12, gap=np.ones(12)).reason == "cannot tell: the gap is the same at all 12 checkpoints (1)"
    assert "all 12 checkpoints but one" in shorter(12, measure=np.r_[1.0, np.zeros(11)]).reason
    assert shorter(12, measure=np.round(np.arange(12) / 4)).overall is not None


def test_groups_that_do_not_exist_are_said_so():
    gap, measure = grid()
    measures, names = {"m": Readings(values=measure)}, [str(k) for k in range(12)]
    unique = [{"lr": k, "width": k} for k in range(12)]
    alone = rank_report(RunTable(names=names, gap=Readings(values=gap), measures=measures, settings=unique))
    assert "no two checkpoints differ in one of lr, width alone" in alone.measures[0].notes[-1]
    bare = rank_report(RunTable(names=names, gap=Readings(values=gap), measures=measures, settings=[{}] * 12))
    assert "no hyper-parameter varies" in bare.measures[0].notes[-1]
    with pytest.raises(
        UsageError, match=r"hyper-parameter 'depth': no checkpoint has it; there are lr, width, seed"
    ):
        rank_report(table(), hyperparameters=["depth"])
    with pytest.raises(UsageError, match=r"m: 11 entries for 12 checkpoints"):
        table(m=Readings(values=measure[:11]))


def fisher(tau, stderr, n, confidence):
    z, half = np.arctanh(np.clip(tau, -0.999999, 0.999999)), 2.45 * stderr / (1 - min(tau**2, 0.999999))
    return np.tanh(z - half), np.tanh(z + half)


BROKEN = {
    "standard error halved": lambda t, s, n, c: kendall.tau_interval(t, s / 3, n, c),
    "Fisher's z": fisher,
    "no spread where all agree": lambda t, s, n, c: (t - 2 * s, t + 2 * s),
    "one-sided": lambda t, s, n, c: (t, kendall.tau_interval(t, s, n, c)[1]),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert any(not BAND[0] <= coverage(case, breakage) <= BAND[1] for case in CASES[:3])
