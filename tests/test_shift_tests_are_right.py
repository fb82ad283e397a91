"""Promise: a shift test finds the score, slope and difference that are there, as surely as it says. (20 s)"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import nn

from hessdiag.errors import BudgetError, HessdiagError, NonFiniteError, ProblemError, UsageError
from hessdiag.problem import Problem
from hessdiag.samples import draw
from hessdiag.shift import images as shift_images
from hessdiag.shift.curve import line_weights, wilson
from hessdiag.shift.experiments import (
    augmented,
    by_distance,
    compare,
    covariate_shift,
    other_source,
)
from hessdiag.shift.features import Features, nearest
from hessdiag.shift.images import crop_and_rotate, scorer
from hessdiag.sources import datasets
from hessdiag.sources.digits import accuracy
from hessdiag.spectral.probes import stream

D, EXAMPLES, SEEDS, SHIFTS = 5, 300, 400, 12
TILT = np.array([0.9, -0.6, 0.4, 0.0, 0.3])  # log odds of being right per unit of each feature
FLAT = np.array([0.3, -0.6, 0.4, 0.0, 0.3])
BAND = (0.91, 0.985)  # 95% over 400 seeds has a standard error of 1.1%: 3.7 and 3.2 of them
NODES, MASS = np.polynomial.hermite_e.hermegauss(60)


@functools.cache
def reference() -> np.ndarray:
    """Training inputs of mean 3 and standard deviation 2 to rounding, so that their own error does not show."""
    drawn = np.random.default_rng(1).normal(size=(200, D))
    return 3.0 + 2.0 * (drawn - drawn.mean(0)) / drawn.std(0)


def shifted_means(tilt: np.ndarray, scale: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """|δ|₁ and the true accuracy under N(δ, I), by Gauss-Hermite quadrature along the tilt."""
    delta = scale * torch.randn(SHIFTS, D, generator=stream(0, "shift", "covariate"), dtype=torch.float64).numpy()
    logits = (1.0 + delta @ tilt)[:, None] + np.linalg.norm(tilt) * NODES
    return np.abs(delta).sum(1), (expit(logits) * MASS).sum(1) / MASS.sum()


def examples(seed: int, *tilts: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Inputs, and for each tilt who is right; the same luck for all, so that checkpoints agree on most."""
    rng = np.random.default_rng(seed)
    z, luck = rng.normal(size=(EXAMPLES, D)), rng.random(EXAMPLES)
    return 3.0 + 2.0 * z, [(luck < expit(1.0 + z @ tilt)).astype(float) for tilt in tilts]


def weighted(inputs, scores):
    return covariate_shift(inputs, scores, reference=reference(), shifts=SHIFTS, scale=0.2, resamples=200, seed=0)


@functools.cache
def covariate_runs() -> np.ndarray:
    """Over seeds (value, lo, hi) of: slope, difference of slopes, score at level 0; (seeds, 3, 3)."""
    found = []
    for seed in range(SEEDS):
        inputs, (one, other) = examples(seed, TILT, FLAT)
        first, second = weighted(inputs, one), weighted(inputs, other)
        gap = compare({"plain": second, "other": first}, resamples=200)[0].slope
        point = first.points[0]
        triples = [(s.value, s.over_examples.lo, s.over_examples.hi) for s in (first.slope, gap)]
        found.append([*triples, (point.score, point.lo, point.hi)])
    return np.array(found)


def covariate_truth() -> np.ndarray:
    (shifts, one), (_, other) = shifted_means(TILT), shifted_means(FLAT)
    k = line_weights(shifts)
    return np.array([k @ one, k @ (one - other), one[0]])


def honest(runs: np.ndarray, truth: np.ndarray) -> bool:
    """Unbiased to 4 standard errors and a 5% share of one (ratios are biased by 1/n), and covering as said."""
    cover = ((runs[..., 1] <= truth) & (truth <= runs[..., 2])).mean(0)
    spread = runs[..., 0].std(0)
    unbiased = np.abs(runs[..., 0].mean(0) - truth) < 4 * spread / np.sqrt(len(runs)) + 0.05 * spread
    return bool(((cover >= BAND[0]) & (cover <= BAND[1])).all() and unbiased.all())


def test_importance_weights_find_the_shifted_accuracy():
    runs, truth = covariate_runs(), covariate_truth()
    cover = ((runs[..., 1] <= truth) & (truth <= runs[..., 2])).mean(0)
    assert honest(runs, truth), (cover, runs[..., 0].mean(0), truth)


def around(runs: np.ndarray, factor: float) -> np.ndarray:
    return np.concatenate([runs[..., :1], runs[..., :1] + factor * (runs[..., 1:] - runs[..., :1])], 2)


@functools.cache
def unpaired_runs() -> np.ndarray:
    """Differences of slopes with the interval of two samples drawn apart: what pairing is there to beat."""
    runs = covariate_runs().copy()
    runs[:, 1, 1:] = runs[:, 1, :1] + np.sqrt(2) * (runs[:, 0, 1:] - runs[:, 0, :1])
    return runs


BROKEN = {
    "no weights": lambda runs, truth: (runs - np.array([runs[:, 0, 0].mean(), 0, 0])[:, None], truth),
    "sign of the shift": lambda runs, truth: (runs * np.array([-1, 1, 1])[:, None], truth),
    "a tenth too steep": lambda runs, truth: (runs * np.array([1.3, 1, 1])[:, None], truth),
    "halved intervals": lambda runs, truth: (around(runs, 0.5), truth),
    "doubled intervals": lambda runs, truth: (around(runs, 2.0), truth),
    "not paired": lambda runs, truth: (unpaired_runs(), truth),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert not honest(*breakage(covariate_runs(), covariate_truth()))


def test_each_uncertainty_falls_with_what_it_is_over():
    """Nine times the examples: a third of one, to 25% (one draw); nine times the shifts: of the other."""

    def errors(number, shifts):
        z, luck = np.random.default_rng(0).normal(size=(number, D)), np.random.default_rng(1).random(number)
        scores = (luck < expit(1.0 + z @ TILT)).astype(float)
        found = covariate_shift(3 + 2 * z, scores, reference=reference(), shifts=shifts, scale=0.2, resamples=200)
        return np.array([found.slope.over_examples.stderr, found.slope.over_levels.stderr])

    base = errors(300, 100)
    assert errors(2700, 100) / base == pytest.approx([1 / 3, 1.0], rel=0.25)
    assert (errors(300, 900) / base)[1] == pytest.approx(1 / 3, rel=0.25)


def test_weights_and_effective_size_are_the_formulas():
    inputs, (scores,) = examples(3, TILT)
    found = covariate_shift(
        inputs, scores, reference=reference(), shifts=3, scale=0.3, resamples=100, exclude=(1,)
    )
    z = ((inputs - 3.0) / 2.0)[:, [0, 2, 3, 4]]
    delta = 0.3 * torch.randn(3, 4, generator=stream(0, "shift", "covariate"), dtype=torch.float64).numpy()
    for point, d in zip(found.points, delta, strict=True):
        density = np.prod(np.exp(-((z - d) ** 2) / 2) / np.exp(-(z**2) / 2), axis=1)
        assert point.shift == pytest.approx(np.abs(d).sum())
        assert point.score == pytest.approx((density * scores).sum() / density.sum())
        assert point.effective == pytest.approx(density.sum() ** 2 / (density**2).sum())


def test_principal_components_are_white():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3)) @ np.array([[3.0, 1.0, 0.0], [0.0, 0.5, 0.2], [0.0, 0.0, 2.0]])
    known = Features.of(np.c_[x, np.full(500, 7.0)], components=2)
    assert known.dropped == 1
    np.testing.assert_allclose(np.cov(known(np.c_[x, np.full(500, 7.0)]).T, bias=True), np.eye(2), atol=1e-10)


def test_wide_inputs_have_the_same_components_as_their_covariance():
    """More features than examples go by the small product; the oracle is the dense covariance, up to sign."""
    x = np.random.default_rng(0).normal(size=(30, 80)) * np.linspace(3, 0.5, 80)
    spread, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    expected = (x - x.mean(0)) @ axes[:, -5:][:, ::-1] / np.sqrt(spread[-5:][::-1])
    np.testing.assert_allclose(np.abs(Features.of(x, components=5)(x)), np.abs(expected), atol=1e-9)


def test_correlated_features_are_noted():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 1)) + 0.1 * rng.normal(size=(2000, 12))
    scores = (rng.random(2000) < 0.7).astype(float)
    plain = covariate_shift(x, scores, reference=x, shifts=50, scale=0.2, resamples=100)
    white = covariate_shift(x, scores, reference=x, shifts=50, scale=0.2, resamples=100, components=12)
    assert any("not independent normals" in note for note in plain.notes)
    assert not any("not independent normals" in note for note in white.notes)


def test_other_source_is_the_change():
    """Against Welch's interval of two shares: the same to 10% with 2,000 resamples."""
    rng = np.random.default_rng(5)
    home, other = (rng.random(400) < 0.9).astype(float), (rng.random(250) < 0.7).astype(float)
    found = other_source(home, other, resamples=2000).slope
    stderr = np.sqrt(home.var() / 400 + other.var() / 250)
    assert found.value == pytest.approx(other.mean() - home.mean())
    assert found.over_examples.stderr == pytest.approx(stderr, rel=0.1)
    assert found.over_levels is None
    assert found.over_examples.pvalue < 1e-4


@pytest.mark.parametrize("measure", ["euclidean", "cosine"])
def test_distances_are_the_nearest(measure):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(70, 6))
    if measure == "cosine":
        cosines = (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T
        true = 1 - cosines.max(1)
    else:
        true = np.linalg.norm(x[:, None] - y[None], axis=2).min(1)
    np.testing.assert_allclose(nearest(x, y, measure), true, rtol=1e-9)


def binned(seed: int, copies: int) -> tuple[float, float, float]:
    """Slope over distance of examples at known distances, each original ``copies`` times in the test set."""
    rng = np.random.default_rng(seed)
    distance = np.repeat(rng.uniform(0, 4, 240), copies)
    scores = np.repeat((rng.random(240) < 0.95 - 0.15 * distance[::copies]).astype(float), copies)
    edges = np.linspace(0, 4, 5)
    found = by_distance(
        distance[:, None],
        scores,
        reference=np.zeros((1, 1)),
        bins=edges,
        groups=np.repeat(np.arange(240), copies),
        least=20,
        resamples=100,
    ).slope
    return found.value, found.over_examples.lo, found.over_examples.hi


@pytest.mark.parametrize("copies", [1, 3])
def test_bins_find_the_slope_and_groups_are_resampled_together(copies):
    """200 seeds: coverage 95% ± 1.5%; the score is linear in distance, so the slope of the bins is -0.15."""
    runs = np.array([binned(seed, copies) for seed in range(200)])
    assert abs(runs[:, 0].mean() + 0.15) < 4 * runs[:, 0].std() / np.sqrt(200)
    assert 0.90 <= ((runs[:, 1] <= -0.15) & (runs[:, 2] >= -0.15)).mean() <= 0.995


def test_copies_taken_for_examples_would_be_noticed():
    """What the groups guard against: three copies counted as three examples narrow the interval by √3."""
    rng = np.random.default_rng(0)
    distance, right = np.repeat(rng.uniform(0, 4, 240), 3), np.repeat((rng.random(240) < 0.7).astype(float), 3)
    told, untold = (
        by_distance(distance[:, None], right, reference=np.zeros((1, 1)), groups=groups, resamples=1000).slope
        for groups in (np.repeat(np.arange(240), 3), None)
    )
    ratio = told.over_examples.stderr / untold.over_examples.stderr
    assert ratio == pytest.approx(np.sqrt(3), rel=0.15)


def test_wilson_is_scipys():
    from scipy.stats import binomtest

    for right in (0, 3, 50):
        known = binomtest(right, 50).proportion_ci(0.95, method="wilson")
        assert wilson(right / 50, 50, 1.959963984540054) == pytest.approx((known.low, known.high), abs=1e-12)


def test_distortions_are_rotations_and_moves():
    """A quarter turn and a whole pixel are permutations of pixels, so bilinear sampling is exact to rounding."""
    picture = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    turned = rotated(picture, 90.0, (0.0, 0.0))
    torch.testing.assert_close(turned, torch.rot90(picture, 1, (2, 3)), atol=1e-9, rtol=0)
    moved = rotated(picture, 0.0, (0.25, 0.0))  # a quarter of half a side of 8: one pixel
    torch.testing.assert_close(moved[..., :-1], picture[..., 1:], atol=1e-9, rtol=0)
    assert float((moved[..., -1] - picture.min()).abs().max()) < 1e-9


def rotated(picture, degrees, move):
    """`crop_and_rotate` with its random numbers given: u in [0, 1] such that 2u − 1 is what is wanted."""
    strength = 6.0  # 15° and 1/8 of half a side per unit: 90° and 0.75 at most

    def given(*size, generator):
        wanted = (degrees / (strength * 15.0), move[0] / (strength / 8), move[1] / (strength / 8))
        return torch.tensor([[(w + 1) / 2] * size[1] for w in wanted], dtype=torch.float64)

    original = shift_images.torch.rand
    shift_images.torch.rand = given
    try:
        return crop_and_rotate(picture, strength, torch.Generator())
    finally:
        shift_images.torch.rand = original


@pytest.fixture(scope="module")
def classifier():
    """Ridge regression on the digits: a linear classifier, with dropout that evaluation must turn off."""
    train, test = datasets.digits()
    x = torch.stack([train[i][0] for i in range(len(train))]).flatten(1)
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    weights = torch.linalg.solve(ones.T @ ones + 0.1 * torch.eye(65), ones.T @ torch.eye(10)[train.targets])
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).train()
    with torch.no_grad():
        model[2].weight.copy_(weights[:64].T)
        model[2].bias.copy_(weights[64])
    return Problem(model, {"train": train, "test": test}, criterion="cross_entropy", metric=accuracy)


def test_augmented_digits_fall_and_pair(classifier):
    inputs, score = scorer(classifier, draw(classifier.data["test"], split="test"))
    found = augmented(inputs, score, resamples=200)
    again = augmented(inputs, score, resamples=200)
    test = classifier.data["test"]
    x = torch.stack([test[i][0] for i in range(len(test))]).flatten(1)
    right = (x @ classifier.model[2].weight.T + classifier.model[2].bias).argmax(1) == test.targets
    assert found.points[0].score == pytest.approx(float(right.double().mean()))
    assert found.points == again.points
    assert classifier.model.training and classifier.model[1].training
    assert found.slope.over_examples.hi < 0  # a linear classifier of raw pixels does not survive 30°
    same = compare({"a": found, "b": again})[0]
    assert same.slope is None and "needs 10 more" in same.cannot_tell


def test_means_over_draws_and_losses_are_scores_too(classifier):
    inputs, score = scorer(classifier, draw(classifier.data["test"], split="test"))
    found = augmented(inputs, score, strengths=(0, 1, 2), draws=3, resamples=100)
    assert not found.levels.binary and found.slope.over_examples.hi < 0
    losses = np.random.default_rng(0).exponential(size=(2, 80))
    assert other_source(*losses, resamples=100).points[0].lo < losses[0].mean()


def curves(number: int):
    """Checkpoints that are all equally good, by construction, each with its own luck."""
    rng = np.random.default_rng(number)
    home, other = rng.random((2, number + 1, 150)) < 0.8
    return {str(i): other_source(home[i], other[i], resamples=100) for i in range(number + 1)}


def test_several_comparisons_are_corrected():
    found = compare(curves(4), reference="0", resamples=100)
    plain = np.array([one.slope.over_examples.pvalue for one in found])
    order = np.argsort(plain)
    holm = np.minimum(1, np.maximum.accumulate(plain[order] * np.arange(4, 0, -1)))
    np.testing.assert_allclose(np.array([one.slope.adjusted for one in found])[order], holm)


RIGHT, X = np.r_[np.zeros(30), np.ones(70)], np.random.default_rng(0).normal(size=(100, 2))
REFUSED = {
    "too few examples": (lambda: covariate_shift(X[:30], RIGHT[15:45], reference=X), BudgetError, "more"),
    "weights too uneven": (
        lambda: covariate_shift(X, RIGHT, reference=X, scale=5.0),
        BudgetError,
        "or `scale=",
    ),
    "one shift": (lambda: covariate_shift(X, RIGHT, reference=X, shifts=1), BudgetError, "3 shifts"),
    "scores of others": (lambda: covariate_shift(X, RIGHT[:9], reference=X), UsageError, "each of 100"),
    "NaN inputs": (lambda: covariate_shift(X * np.nan, RIGHT, reference=X), UsageError, "NaN"),
    "NaN scores": (lambda: by_distance(X, RIGHT * np.nan, reference=X[:1]), UsageError, "NaN"),
    "other features": (lambda: covariate_shift(X, RIGHT, reference=X[:, :1]), UsageError, "2 features"),
    "constant reference": (lambda: covariate_shift(X, RIGHT, reference=0 * X), UsageError, "vary"),
    "no such feature": (lambda: covariate_shift(X, RIGHT, reference=X, exclude=(2,)), UsageError, "0 to 1"),
    "few for components": (
        lambda: covariate_shift(X, RIGHT, reference=X[:3], components=2),
        BudgetError,
        "at least 4, 1 more",
    ),
    "no such measure": (lambda: by_distance(X, RIGHT, reference=X, measure="l1"), UsageError, "cosine"),
    "all at home": (lambda: by_distance(X, RIGHT, reference=X), UsageError, "another reference"),
    "too many bins": (lambda: by_distance(X, RIGHT, reference=X[:1], bins=10), BudgetError, "more test examples"),
    "bins elsewhere": (lambda: by_distance(X, RIGHT, reference=X[:1], bins=[90, 91]), UsageError, "distances are"),
    "groups of others": (lambda: by_distance(X, RIGHT, reference=X[:1], groups=[1]), UsageError, "groups"),
    "no direction": (lambda: by_distance(0 * X, RIGHT, reference=X, measure="cosine"), UsageError, "zeros"),
    "one strength": (lambda: augmented(torch.ones(9, 1, 2, 2), len, strengths=(1,)), UsageError, "two"),
    "not pictures": (lambda: augmented(torch.ones(9, 4), lambda x: x[:, 0]), UsageError, "pictures"),
    "words": (lambda: other_source(["a"] * 99, RIGHT), UsageError, "one number"),
    "a tiny source": (lambda: other_source(RIGHT, RIGHT[:20]), BudgetError, "more test examples"),
    "confidence": (lambda: other_source(RIGHT, RIGHT, confidence=1.0), UsageError, "confidence"),
    "resamples": (lambda: other_source(RIGHT, RIGHT, resamples=3), BudgetError, "97 more"),
    "one curve": (lambda: compare({"a": other_source(RIGHT, RIGHT)}), UsageError, "two curves"),
    "no such reference": (lambda: compare(curves(1), reference="x"), UsageError, "reference"),
    "not pairs": (
        lambda: compare({"a": other_source(RIGHT, RIGHT), "b": other_source(RIGHT, RIGHT[:80])}),
        UsageError,
        "same examples",
    ),
}


@pytest.mark.parametrize(("ask", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused(ask, kind, words):
    with pytest.raises(HessdiagError) as refusal:
        ask()
    assert type(refusal.value) is kind and words in str(refusal.value) and "\n" not in str(refusal.value)


def test_few_mistakes_are_no_slope():
    scores = np.ones(200)
    scores[:4] = 0
    found = other_source(scores, scores)
    assert found.slope is None and "4 test examples are ever wrong" not in found.cannot_tell
    assert "8 test examples are ever wrong, needs 2 more" in found.cannot_tell
    assert found.points[0].lo < 0.98 < found.points[0].hi
    perfect = other_source(np.ones(200), np.ones(200))
    assert perfect.points[0].stderr == 0 and perfect.points[0].lo < 0.985


def test_uneven_levels_are_left_out_and_counted():
    inputs, (scores,) = examples(0, TILT)
    found = covariate_shift(inputs, scores, reference=reference(), shifts=200, scale=0.6, resamples=100)
    assert found.left_out > 0 and len(found.points) + found.left_out == 200
    assert all(point.effective >= found.least for point in found.points)


def test_models_that_cannot_be_scored_are_refused(classifier):
    numbers = replace(classifier, data={"test": (torch.rand(60, 1, 8, 8), torch.rand(60, 10))})
    inputs, score = scorer(numbers, draw(numbers.data["test"], split="test"))
    with pytest.raises(ProblemError, match="not classes"):
        score(inputs)
    broken = replace(classifier, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    nn.init.constant_(broken.model[1].bias, float("nan"))
    inputs, score = scorer(broken, draw(broken.data["test"], split="test"))
    with pytest.raises(NonFiniteError, match="NaN"):
        score(inputs)
    with pytest.raises(UsageError, match="keeps number and order"):
        score(inputs[:5])
