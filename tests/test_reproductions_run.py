"""Promise: every paper's reproduction runs anywhere, and its verdicts follow from its seeds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.papers import PAPERS, reproduce
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


@pytest.fixture(scope="module", params=PAPERS)
def outcome(request):
    return reproduce(request.param, None, quick=True)


def test_a_quick_run_is_complete(outcome):
    assert faults(outcome) == []


BROKEN = {
    "a verdict of its own": lambda o: o.claims.append(Claim("more", "more or less", "1 of 2")),
    "no evidence": lambda o: o.claims.append(Claim("more", HOLDS, "as all know")),
    "no claims": lambda o: o.claims.clear(),
    "an empty table": lambda o: o.tables.update(more=o.raw.iloc[:0]),
    "no picture": lambda o: o.figure.clear(),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    outcome = reproduce("gatmiry2023", None, quick=True)
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
