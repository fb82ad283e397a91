"""Promise: losses, accuracies, gaps and calibration errors come with intervals that cover, or with a reason."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import norm

from hessdiag.errors import UsageError
from hessdiag.gap.performance import Examples, performance
from hessdiag.gap.statistics import means
from hessdiag.gap.statistics.calibration import calibration_error

SEEDS = 400  # a true 95% shows 91.7 to 98.3% (3 sigma)
BAND = (0.9, 0.99)


def losses(rng, n, margin):
    """Logistic losses with normal margins: the skew of a trained network."""
    return np.log1p(np.exp(-rng.normal(margin, 2, n)))


def mean_loss(margin):
    grid = np.linspace(-10, 10, 20001)  # of the standard normal; the sum is exact to 1e-9
    return float(np.sum(np.log1p(np.exp(-(margin + 2 * grid))) * norm.pdf(grid)) * (grid[1] - grid[0]))


@functools.cache
def measured_gaps():
    """Value, lo and hi of the gaps of loss and accuracy, (seeds, 2, 3)."""
    rows, rng = [], np.random.default_rng(0)
    for _ in range(SEEDS):
        train = Examples(loss=losses(rng, 400, 4), score=rng.random(400) < 0.97)
        test = Examples(loss=losses(rng, 200, 2), score=rng.random(200) < 0.85)
        found = performance({"train": train, "test": test})
        rows.append([(gap.value, gap.lo, gap.hi) for gap in (found.loss_gap, found.score_gap)])
    return np.array(rows)


def gaps(widen=1.0):
    """Share of seeds whose interval, widened, holds the true gap of the loss and of the accuracy."""
    value, lo, hi = np.moveaxis(measured_gaps(), 2, 0)
    truth = np.array([mean_loss(2) - mean_loss(4), 0.85 - 0.97])
    return ((value + widen * (lo - value) <= truth) & (truth <= value + widen * (hi - value))).mean(axis=0)


def test_gaps_cover():
    shares = gaps()
    assert np.all((shares >= BAND[0]) & (shares <= BAND[1])), shares


@pytest.mark.parametrize(("n", "margin"), [(30, 3), (100, 3), (300, 3), (1000, 5)])
def test_means_cover(n, margin):
    rng, truth = np.random.default_rng(1), mean_loss(margin)
    found = [means.mean_score(losses(rng, n, margin), 0.95) for _ in range(SEEDS)]
    assert BAND[0] <= np.mean([s.lo <= truth <= s.hi for s in found]) <= BAND[1]


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 1.0])
def test_shares_cover(p):
    rng = np.random.default_rng(2)
    found = [means.mean_score(rng.random(50) < p, 0.95, share=True) for _ in range(SEEDS)]
    assert np.mean([s.lo <= p <= s.hi for s in found]) >= 0.93  # exact: never less than it says, but for noise


def test_the_bootstrap_agrees_where_there_is_enough_data():
    x = losses(np.random.default_rng(3), 1500, 3)
    hall, bca = (means.mean_score(x, 0.95, method=how, rng=np.random.default_rng(0)) for how in ("hall", "bca"))
    width = hall.hi - hall.lo
    assert bca.method.startswith("BCa")
    assert abs(hall.lo - bca.lo) < 0.08 * width  # the resampled ends move by 3% of the width, twice that at most
    assert abs(hall.hi - bca.hi) < 0.08 * width


def test_differences_add_in_squares():
    one, two = means.Score(value=1.0, lo=0.7, hi=1.4, n=50), means.Score(value=3.0, lo=2.6, hi=3.3, n=40)
    found = means.difference(one, two)
    # (b − b_lo, a_hi − a) = (.4, .4) and (b_hi − b, a − a_lo) = (.3, .3)
    assert (found.value, found.n) == (2.0, 40)
    assert (found.lo, found.hi) == pytest.approx((2 - 0.4 * 2**0.5, 2 + 0.3 * 2**0.5))
    newcombe = means.difference(*2 * [means.mean_score([1.0] * 30, 0.95, share=True)])
    assert newcombe.lo < 0 < newcombe.hi  # all right on both: still not known to be equal


def draw(rng, n, over):
    confidence = 0.5 + 0.5 * rng.beta(2, 2, n)
    return (rng.random(n) < confidence - over).astype(float), confidence


@pytest.mark.parametrize(("over", "n"), [(0.0, 1000), (0.05, 1000), (0.15, 2000)])
def test_calibration_errors_cover(over, n):
    # the confidence less a constant stays a probability: in every bin the true gap is `over`
    rng = np.random.default_rng(4)
    found = [calibration_error(*draw(rng, n, over), 0.95, rng) for _ in range(80)]
    assert all(lo <= value <= hi for value, lo, hi in found)
    assert np.mean([lo <= over <= hi for _, lo, hi in found]) >= 0.86  # 80 repetitions of 95%: 3.7 sigma
    assert np.mean([hi - lo for _, lo, hi in found]) < 0.07


def test_calibration_error_matches_its_definition():
    correct, confidence = draw(np.random.default_rng(5), 600, 0.1)
    order = np.argsort(confidence)
    expected = np.mean([abs(correct[o].mean() - confidence[o].mean()) for o in order.reshape(15, 40)])
    assert calibration_error(correct, confidence, 0.95, np.random.default_rng(0))[0] == pytest.approx(expected)


def splits(**changes):
    rng = np.random.default_rng(6)
    made = {}
    for name, n in (("train", 600), ("test", 400)):
        correct, confidence = draw(rng, n, 0.0)
        made[name] = Examples(loss=losses(rng, n, 3), score=correct, confidence=confidence)
    return made | changes


def test_the_floor_is_judged_by_the_interval():
    rng = np.random.default_rng(7)
    low = Examples(loss=rng.exponential(0.002, 500), score=np.ones(500))
    assert performance(splits(train=low)).loss_floor == "yes"
    assert performance(splits(train=low)).accuracy_floor == "yes"
    assert performance(splits()).loss_floor == "no"
    assert performance(splits()).accuracy_floor == "no"
    near = Examples(loss=rng.exponential(0.01, 100), score=np.ones(100))
    assert performance(splits(train=near)).loss_floor == "cannot tell"
    assert performance(splits(train=near)).accuracy_floor == "cannot tell"  # 100 of 100 is no proof of 99%


def test_missing_and_broken_numbers_give_reasons():
    found = performance({"train": splits()["train"], "val": splits()["test"]})
    assert found.loss_gap.reason == "cannot tell: no split 'test'; there are train, val"
    assert found.splits[1].loss.value is not None
    few = performance(splits(test=Examples(loss=np.ones(12))))
    assert few.loss_gap.reason == "cannot tell: 12 examples, needs 18 more"
    assert few.splits[1].score.reason == "cannot tell: no metric per example; give the problem a metric"
    broken = performance(splits(test=Examples(loss=np.r_[np.ones(97), np.nan, np.inf, np.nan])))
    assert broken.loss_gap.reason == "cannot tell: 3 of 100 examples are not finite"
    equal = performance(splits(train=Examples(loss=np.zeros(50))))
    assert equal.loss_gap.value is not None
    assert equal.splits[0].loss.method == "all examples are equal"
    small = splits(test=Examples(loss=np.ones(100), score=np.ones(100), confidence=np.full(100, 0.9)))
    assert performance(small).splits[1].calibration.reason == "cannot tell: 100 examples, needs 200 more"
    for report in (found, few, broken, equal):
        json.dumps(asdict(report), allow_nan=False)
    assert performance(splits()) == performance(splits())
    with pytest.raises(UsageError, match=r"split test: 9 values of score for 40 losses"):
        performance(splits(test=Examples(loss=np.ones(40), score=np.ones(9))))
    with pytest.raises(UsageError, match=r"allowed: 'hall' and 'bca'"):
        means.mean_score(np.ones(40), 0.95, method="normal")


def test_confidences_are_held_to_be_probabilities():
    rng = np.random.default_rng(8)
    scores = Examples(loss=losses(rng, 400, 3), score=np.ones(400), confidence=rng.normal(size=400))
    assert (
        performance({"test": scores}).splits[0].calibration.reason
        == "cannot tell: a confidence is not a probability"
    )
    real = Examples(loss=losses(rng, 400, 3), score=rng.normal(size=400), confidence=np.ones(400))
    assert "not right or wrong" in performance({"test": real}).splits[0].calibration.reason


BROKEN = {"a standard error halved": 0.5, "widths of one sample only": 0.6, "a standard error doubled": 2.0}


@pytest.mark.parametrize("widen", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(widen):
    shares = gaps(widen)
    assert not np.all((shares >= BAND[0]) & (shares <= BAND[1]))
