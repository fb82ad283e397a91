"""Promise: what test examples tell apart is forecast, and a refusal names the option that helps. (15 s)

Oracles: simulated checkpoints of known difference, counted; AUROC by its definition, over all pairs; the refused
test made again as its refusal says.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hessdiag.errors import BudgetError, HessdiagError, ProblemError, UsageError
from hessdiag.problem import Problem
from hessdiag.shift import features, institutions, labels, power
from hessdiag.shift.compare import compare
from hessdiag.shift.curve import curve
from hessdiag.shift.experiments import augmented, covariate_shift
from hessdiag.shift.inputs import make_levels
from hessdiag.shift.institutions import by_findings, other_institution
from hessdiag.shift.labels import auroc_scores, f1_scores, hits, labelled
from hessdiag.shift.power import POWER, foreseen, powers
from hessdiag.shift.report import ShiftSettings, shift_curves
from tests.command import call
from tests.test_shift_verb_shows_the_tests import PROBLEM, linear

SEEDS = 300
BINARY = nn.BCEWithLogitsLoss()
DIFFERENCE, DIFFERING = 0.03, 0.2  # of accuracy, and the share of examples on which two checkpoints differ


def pair(seed: int, examples: int, difference: float) -> dict:
    """Two checkpoints of known difference: on DIFFERING of the examples one of the two is right."""
    rng = np.random.default_rng(seed)
    luck, both = rng.random(examples), rng.random(examples) < 0.8
    first = np.where(luck < (DIFFERING + difference) / 2, True, np.where(luck < DIFFERING, False, both))
    second = np.where(luck < (DIFFERING + difference) / 2, False, np.where(luck < DIFFERING, True, both))
    weights = np.ones((2, examples))
    found = {}
    for name, right in (("plain", second), ("other", first)):
        levels = make_levels(np.array([0.0, 1.0]), weights, np.stack([right] * 2).astype(float), "same")
        found[name] = curve(levels, test="made", parameter="x", resamples=100, seed=seed)
    return found


def found_in(examples: int, difference: float) -> float:
    """The share of test sets in which a difference is found, at 95%."""
    told = [compare(pair(seed, examples, difference), resamples=100, seed=seed)[0] for seed in range(SEEDS)]
    return float(np.mean([one.score.over_examples.pvalue < 0.05 for one in told]))


@functools.cache
def simulated() -> tuple[float, float]:
    """Power at the forecast number of examples, and the share found where there is nothing."""
    pilot = pair(999, 4000, DIFFERENCE)
    (told,) = powers(pilot, compare(pilot, resamples=1000))
    examples = round(told.needed * (power.POINT / DIFFERENCE) ** 2)
    return found_in(examples, DIFFERENCE), found_in(examples, 0.0)


def check_power() -> None:
    """80% and 5% over 300 seeds have standard errors of 2.3% and 1.3%; the pilot's own adds 2% to the first."""
    found, nothing = simulated()
    assert abs(found - POWER) < 0.10, found
    assert nothing < 0.10, nothing


def test_so_many_examples_find_so_large_a_difference():
    check_power()


def test_before_the_test_it_is_the_same_forecast():
    """(1.96 + 0.84)² · 0.1 / 0.01² = 7,849 examples find one point, and 2,000 find 1.98 points."""
    said = foreseen(2000, 0.95)
    assert "2,000 test examples tell two checkpoints 2 points of accuracy apart" in said
    assert "one point takes about 7,800 (`samples`)" in said
    same = pair(1, 8000, 0.0)
    (told,) = powers(same, compare(same, resamples=4000))
    assert told.needed == pytest.approx(7849 * DIFFERING / power.DISAGREEING, rel=0.1)
    assert told.detects == pytest.approx(0.01 * np.sqrt(told.needed / 8000), rel=1e-3)


def test_one_checkpoint_alone_is_forecast_by_its_change():
    rng = np.random.default_rng(0)
    right = np.stack([rng.random(900) < share for share in (0.9, 0.8, 0.7)]).astype(float)
    levels = make_levels(np.array([0.0, 1.0, 2.0]), np.ones_like(right), right, "same")
    alone = curve(levels, test="made", parameter="x")
    (told,) = powers({"a": alone}, ())
    spread = np.sqrt((right[0] - right[2]).var() / 900)  # of the first and last level, 900 pairs
    assert told.detects == pytest.approx(2.8016 * spread, rel=0.1) and told.examples == 900
    assert powers({}, ()) == ()


# labels


def data(seed: int, n: int = 400, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.random((n, k)) < np.array([0.3, 0.5, 0.2, 0.4, 0.4][:k])
    return np.round(rng.normal(size=(n, k)) + 1.2 * true - 0.6, 1), true  # rounded: some are ties


def by_pairs(logits: np.ndarray, true: np.ndarray) -> float:
    """AUROC by its definition: the share of pairs in the right order, ties half."""
    apart = logits[true][:, None] - logits[~true]
    return float(((apart > 0) + (apart == 0) / 2).mean())


def check_auroc() -> None:
    logits, true = data(0)
    assert auroc_scores(logits, true).mean() == pytest.approx(np.mean([by_pairs(*one) for one in columns(0)]))
    told = logits > 0
    each = [2 * (t & y).sum() / (t.sum() + y.sum()) for t, y in zip(told.T, true.T, strict=True)]
    assert f1_scores(logits, true).mean() == pytest.approx(np.mean(each))
    for score in (auroc_scores, f1_scores):
        # the spread over test sets drawn anew is what the numbers per example say
        seen = [score(*data(seed)) for seed in range(SEEDS)]
        spread = np.std([one.mean() for one in seen])
        said = np.mean([one.std(ddof=1) for one in seen]) / np.sqrt(400)
        assert said == pytest.approx(spread, rel=0.12), (score, said, spread)


def columns(seed: int):
    logits, true = data(seed)
    return zip(logits.T, true.T, strict=True)


def test_auroc_and_f1_are_means_of_numbers_with_their_variance():
    check_auroc()


def check_findings() -> None:
    """Labels 0 to 2 count, 3 and 4 are findings: the score falls with their number as the logits do."""
    logits, true = data(1, 3000, 5)
    number = true[:, 3:].sum(1)
    logits = logits + 0.7 * np.outer(number, [1, 1, 1, 0, 0]) * np.where(true, -1, 1)
    found = by_findings((logits, true), labels=(0, 1, 2))
    for point, level in zip(found.points, (0, 1, 2), strict=True):
        here = number == level
        each = [by_pairs(logits[here, k], true[here, k]) for k in range(3)]
        assert (point.shift, point.score) == (level, pytest.approx(np.mean(each)))
        assert point.effective == here.sum()
    assert found.slope.over_examples.hi < 0
    assert found.notes == ("AUROC, where accuracy is said, is the mean over 3 of 3 labels",)


def test_other_findings_put_examples_apart():
    check_findings()


def test_another_institution_is_scored_over_the_labels_both_have():
    (home, mine), (away, theirs) = data(2), data(3)
    theirs[:, 2] = False  # no example of the other has it
    for score, one in (("auroc", auroc_scores), ("f1", f1_scores)):
        found = other_institution((home, mine), (away, theirs), score=score)
        expected = one(away[:, :2], theirs[:, :2]).mean() - one(home[:, :2], mine[:, :2]).mean()
        assert found.slope.value == pytest.approx(expected)
        said = f"{score.upper()}, where accuracy is said, is the mean over 2 of 3 labels; 1 have too few examples"
        assert found.notes == (f"{said} with or without them",)


def several(targets: torch.Tensor, criterion: object = BINARY) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x = torch.randn(len(targets), 1, 2, 2)
    return Problem(
        model, {"train": (x, targets), "test": (x, targets), "far": (x + 1, targets)}, criterion=criterion
    )


def test_the_verbs_tests_take_problems_with_several_labels():
    true = (torch.rand(300, 3, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    problem = several(true)
    asked = ShiftSettings(
        tests=("covariate", "augmented", "other", "findings"), other="far", score="auroc", labels=(0, 1)
    )
    found = dict(shift_curves(problem, asked))
    logits, seen = labelled(problem, [problem.data["test"]])
    assert np.array_equal(seen, true.bool().numpy())
    share = hits(problem, torch.tensor(logits), true).mean()
    assert found["augmented"].points[0].score == pytest.approx(float(share))
    assert found["other"].points[0].score == pytest.approx(auroc_scores(logits[:, :2], seen[:, :2]).mean())
    assert [point.shift for point in found["findings"].points] == [0, 1]
    classes = several(torch.randint(0, 3, (300,)), "cross_entropy")
    refused = dict(shift_curves(classes, ShiftSettings(tests=("findings",), labels=(0,))))["findings"]
    assert "examples have not several labels" in refused.reason and "\n" not in refused.reason


TRUE = data(0)[1]
REFUSED = {
    "no such label": (lambda: by_findings(data(0), labels=(7,)), UsageError, "`labels=7`: labels are 0 to 2"),
    "no findings": (lambda: by_findings(data(0), labels=(0, 1, 2)), UsageError, "others be findings"),
    "one level": (
        lambda: by_findings((data(0)[0], TRUE & [[True, True, False]]), labels=(0, 1)),
        BudgetError,
        "`samples`",
    ),
    "rare labels": (
        lambda: other_institution((data(0)[0], TRUE & False), data(1)),
        UsageError,
        "give more `samples`",
    ),
    "other columns": (lambda: other_institution(data(0), data(1, k=2)), UsageError, "3 labels at home and 2"),
    "no such score": (
        lambda: other_institution(data(0), data(1), score="loss"),
        UsageError,
        "allowed: accuracy, auroc",
    ),
    "one outcome": (lambda: auroc_scores(data(0)[0], TRUE | True), UsageError, "with it and some without"),
    "never": (lambda: f1_scores(data(0)[0], TRUE & False), UsageError, "leave it out of `labels`"),
    "classes": (
        lambda: labelled(several(torch.rand(9, 3)), [several(torch.rand(9, 3)).data["test"]]),
        ProblemError,
        "`score='accuracy'`",
    ),
}


@pytest.mark.parametrize(("ask", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_scored_is_one_line(ask, kind, words):
    with pytest.raises(HessdiagError) as refusal:
        ask()
    assert type(refusal.value) is kind and words in str(refusal.value) and "\n" not in str(refusal.value)


# refusals and options


def check_way_out() -> None:
    """The scale that a refusal names is enough, and not ten times too small."""
    rng = np.random.default_rng(0)
    x, right = rng.normal(size=(300, 8)), (rng.random(300) < 0.7).astype(float)
    with pytest.raises(BudgetError) as refusal:
        covariate_shift(x, right, reference=x, shifts=100, scale=2.0)
    named = float(re.search(r"`scale=([0-9.e-]+)`", str(refusal.value))[1])
    assert 0.2 < named < 2.0
    covariate_shift(x, right, reference=x, shifts=100, scale=named, resamples=100)
    with pytest.raises(BudgetError):
        covariate_shift(x, right, reference=x, shifts=100, scale=1.6 * named, resamples=100)


def test_the_scale_that_a_refusal_names_is_enough():
    check_way_out()


def test_refusals_name_what_helps():
    few = torch.rand(40, 1, 4, 4)
    with pytest.raises(BudgetError, match=r"needs about 10 more test examples \(`samples`\)$"):
        augmented(few, lambda moved: torch.zeros(40))
    many = torch.rand(90, 1, 4, 4)
    why = augmented(many, lambda moved: torch.ones(90)).cannot_tell
    assert why.endswith("needs 10 more: take more test examples (`samples`), or `strengths` beyond 2")
    x, right = np.random.default_rng(0).normal(size=(90, 2)), np.ones(90)
    assert covariate_shift(x, right, reference=x).cannot_tell.endswith("take more test examples (`samples`)")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("problem.py").write_text(PROBLEM)
    for seed in range(2):
        torch.save(linear(seed).state_dict(), f"run{seed}.pt")
    return tmp_path


def shift(*more: str) -> tuple[int, str, str]:
    return call("shift", "problem.py:small", "-c", "run*.pt", *more)


def test_the_options_reach_the_tests(folder):
    asked = (
        "--scale",
        "0.02",
        "--shifts",
        "40",
        "--exclude",
        "0,1,10",
        "--strengths",
        "0,1,3",
        "--samples",
        "300",
    )
    code, out, err = shift("--tests", "covariate,augmented", "--components", "9", *asked, "-o", "out")
    assert code == 0, err
    plain = json.loads(Path("out/shift.json").read_text())
    settings = plain["settings"]
    assert (settings["scale"], settings["shifts"], settings["exclude"]) == (0.02, 40, [0, 1, 10])
    curves = plain["curves"]["run0"]
    assert [point["shift"] for point in curves["augmented"]["points"]] == [0, 1, 3]
    assert len(curves["covariate"]["points"]) == 40
    assert max(point["shift"] for point in curves["covariate"]["points"]) < 9 * 0.02 * 4
    # said before anything is tested, once; and of what was found, on the terminal, in the page and in the file
    assert err.count("300 test examples tell two checkpoints 5.1 points of accuracy apart") == 1
    assert "(--samples)" in err
    told = plain["power"]["augmented"][0]
    assert told["examples"] == 300 and told["what"] == "mean accuracy of run1 against run0"
    sentence = power.Power(**told).sentence
    for text in (re.sub(r"\s+", " ", out), Path("out/shift.html").read_text()):
        assert sentence in text
    assert "`" not in Path("out/shift.html").read_text().split("<style")[0]


def test_bad_options_are_one_line(folder):
    for arguments, words in {
        ("--scale", "0"): "--scale 0.0: it must be more than 0",
        ("--shifts", "2"): "--shifts 2: a line needs at least 3, 1 more",
        ("--strengths", "1"): "--strengths: a line needs at least two different ones",
        ("--strengths", "0,x"): "--strengths x: it must be a number",
        ("--exclude", "-1"): "--exclude -1: at least 0",
        ("--exclude", "0.5"): "--exclude 0.5: it must be a whole number",
        ("--exclude", "64", "--tests", "covariate"): "--exclude 64: features are 0 to 63",
        ("--tests", "findings"): "name them as labels",
        ("--score", "roc"): "'roc' is not one of",
        ("--tests", "covariate", "--scale", "3"): "(--samples), or --scale 0.",
    }.items():
        code, _, err = shift(*arguments)
        assert code in (2, 4), arguments
        assert words in err, (arguments, err)
        assert "Traceback" not in err


BROKEN = {
    "half of the power": ((power, "POWER", 0.5), check_power),
    "half of the error": ((power, "_errors", lambda confidence: 1.4), check_power),
    "the examples of a level are not counted": ((power, "_examples", lambda one: 1000), check_power),
    "ties in favour": ((labels, "rankdata", lambda x: _ranks(x, method="max")), check_auroc),
    "no influence": ((labels, "_auroc", lambda x, y: np.full(len(x), by_pairs(x, y))), check_auroc),
    "every label counts": (
        (institutions, "chosen", lambda true, places, asked: list(range(true.shape[1]))),
        check_findings,
    ),
    "any scale": ((features.Weighted, "fitting", lambda self, scale, least, share: scale * 0.9), check_way_out),
}
_ranks = labels.rankdata


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch):
    (place, part, wrong), check = BROKEN[name]
    simulated.cache_clear()
    monkeypatch.setattr(place, part, wrong)
    try:
        with pytest.raises((AssertionError, HessdiagError)):
            check()
    finally:
        simulated.cache_clear()
