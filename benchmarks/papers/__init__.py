"""The seed papers' claims, tried again at CPU scale: one file per paper, a verdict per claim."""

from __future__ import annotations

import time
from importlib import import_module

import pandas as pd

from benchmarks.papers.claims import Claim, Outcome

PAPERS = ("sandler2021", "zhang2023", "omae2026", "gatmiry2023", "kaur2022")


def reproduce(name: str, data: str | None, quick: bool) -> Outcome:
    """The outcome of one paper's file; ``quick`` runs every line of it in seconds and judges nothing."""
    run = import_module(f"benchmarks.papers.{name}").run
    begun = time.process_time()
    outcome: Outcome = run(data, quick)
    outcome.minutes = (time.process_time() - begun) / 60
    return outcome


def judged(name: str, runs: pd.DataFrame) -> list[Claim]:
    """The claims of a paper, judged once more by the runs that its file of values has."""
    judge = import_module(f"benchmarks.papers.{name}").judged
    claims: list[Claim] = judge(runs)
    return claims
