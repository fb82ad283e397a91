"""Promise: every paper's reproduction runs anywhere, and its verdicts follow from its seeds."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.func import functional_call

from benchmarks.papers import PAPERS, judged, reproduce, zhang2023_bound
from benchmarks.papers.claims import FAILS, HOLDS, UNSURE, Claim, Outcome, judge, markdown


def faults(outcome: Outcome) -> list[str]:
    """Everything that would make a reproduction's page worthless."""
    found = [f"{c.text}: {c.verdict}" for c in outcome.claims if c.verdict not in (HOLDS, FAILS, UNSURE)]
    found += [f"no evidence: {c.text}" for c in outcome.claims if not re.search(r"\d", c.evidence)]
    found += [f"no {part}" for part in ("claims", "tables") if not getattr(outcome, part)]
    found += [f"empty: {title}" for title, table in outcome.tables.items() if table.empty]
    if outcome.raw.empty or "seed" not in outcome.raw:
        found.append("no run is told by its seed")
    if not outcome.figure.axes or not any(axes.has_data() for axes in outcome.figure.axes):
        found.append("the picture is empty")
    text = markdown(outcome, "picture.png")
    found += [f"not on the page: {c.text}" for c in outcome.claims if c.text.replace("|", "/") not in text]
    return found


@cache
def quick(name):
    return reproduce(name, None, quick=True)


@pytest.fixture(scope="module", params=PAPERS)
def outcome(request):
    return quick(request.param)


def test_a_quick_run_is_complete(outcome):
    assert faults(outcome) == []


def test_a_page_says_what_its_run_cost(outcome):
    assert 0 < outcome.minutes < 2
    assert f"The whole run took {outcome.minutes:.3g} CPU minutes.\n" in markdown(outcome, None)
    assert "CPU minutes" not in markdown(replace(outcome, minutes=None), None)


def strangers(raw):
    """Ends of judged runs whose bound is of other weights."""
    part = raw[(raw.part != "bound") | (raw.arm != zhang2023_bound.EARLY)]
    losses = part[part.measure == "train loss"].groupby(["arm", "seed", "part"])["value"].last().unstack("part")
    return losses[losses["bound"] != losses["training"]]


def test_the_bound_is_of_the_weights_that_are_judged(outcome):
    if TITLES["zhang2023"] in outcome.title:
        assert strangers(outcome.raw).empty
        moved = outcome.raw.assign(value=outcome.raw.value + 1e-6 * (outcome.raw.part == "bound"))
        assert not strangers(moved).empty


def dense_bound(model, before, train, test):
    """The bound with constant 1, by single-example Hessians; C and alpha of the training and of all examples."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in weights.values()])

    def loss(theta, x, y):
        pieces = theta.split([p.numel() for p in weights.values()])
        named = {name: piece.view_as(p) for (name, p), piece in zip(weights.items(), pieces, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, named, x[None]), y[None])

    found = []
    distance = float((flat - torch.cat([p.detach().flatten() for p in before.parameters()])).norm())
    mean = float(torch.stack([loss(flat, *one) for one in zip(*train, strict=True)]).mean())
    for pairs in (list(zip(*train, strict=True)), [*zip(*train, strict=True), *zip(*test, strict=True)]):
        C = max(float(loss(flat, *one)) for one in pairs)
        alpha = max(
            float(torch.autograd.functional.hessian(lambda t, o=one: loss(t, *o), flat).trace()) for one in pairs
        )
        n = len(train[0])
        cost = C * 1.1**2 * math.log(20) / (0.2 * n)
        found.append(1.1 * mean + 1.1 * math.sqrt(C * alpha * distance**2 / n) + cost)
    return found


def test_the_bound_of_fine_tuning_is_made_of_dense_traces():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    before = deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 3
    train, test = (x[:12], y[:12]), (3 * x[12:], y[12:])
    found = zhang2023_bound.bound(model, before, train, test)
    expected = dense_bound(model, before, train, test)
    assert [found["bound"], found["bound of all"]] == pytest.approx(expected, rel=1e-9)
    assert expected[1] > 1.1 * expected[0]


def test_verdicts_can_be_judged_again(outcome):
    name = next(name for name in PAPERS if TITLES[name] in outcome.title)
    if name != "zhang2023":  # its quick run is smaller than what its verdicts are by default
        assert judged(name, outcome.raw) == outcome.claims


TITLES = {
    "gatmiry2023": "2306.13239",
    "kaur2022": "2206.10654",
    "omae2026": "2604.10202",
    "sandler2021": "2102.11210",
    "zhang2023": "2306.08553",
}


BROKEN = {
    "a verdict of its own": lambda o: o.claims.append(Claim("more", "more or less", "1 of 2")),
    "no evidence": lambda o: o.claims.append(Claim("more", HOLDS, "as all know")),
    "no claims": lambda o: o.claims.clear(),
    "an empty table": lambda o: o.tables.update(more=o.raw.iloc[:0]),
    "no picture": lambda o: setattr(o, "figure", Figure()),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    whole = quick("gatmiry2023")
    outcome = replace(whole, claims=list(whole.claims), tables=dict(whole.tables))
    breakage(outcome)
    assert faults(outcome) != []


def test_an_open_verdict_says_how_many_seeds_would_decide():
    """Samples of mean 0.5 and spread 1 are told from 0 by about 16 (t quantiles fall a little with more seeds)."""
    rng = np.random.default_rng(1)
    four = 0.5 + (lambda x: (x - x.mean()) / x.std(ddof=1))(rng.normal(size=8))
    open_ = judge("", four.tolist(), above=0.0)
    assert open_.verdict == UNSURE
    assert 16 <= int(re.search(r"about (\d+) seeds", open_.evidence)[1]) <= 23
    assert "not even 1,000" in judge("", (four - 0.5).tolist(), above=0.001).evidence
    assert "would decide" not in judge("", (four + 5).tolist(), above=0.0).evidence


def test_verdicts_hold_at_their_rate():
    """A claim at its very border is called true, or false, in 2.5% of studies each."""
    rng = np.random.default_rng(0)
    verdicts = [judge("", rng.normal(1.0, 0.3, 5).tolist(), above=1.0).verdict for _ in range(4000)]
    for verdict in (HOLDS, FAILS):
        assert abs(verdicts.count(verdict) / 4000 - 0.025) < 4 * (0.025 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("samples", "above", "below", "verdict"),
    [
        ([2.0, 2.1, 1.9], 1.0, None, HOLDS),
        ([2.0, 2.1, 1.9], None, 1.0, FAILS),
        ([2.0, 2.1, 1.9], 1.0, 3.0, HOLDS),
        ([0.0, 3.0], 1.0, None, UNSURE),
        ([2.0], 1.0, None, UNSURE),
    ],
)
def test_verdicts_follow_from_the_interval(samples, above, below, verdict):
    assert judge("", samples, above=above, below=below).verdict == verdict
