"""The seed papers' claims, tried again at CPU scale: one file per paper, a verdict per claim."""

from __future__ import annotations

from importlib import import_module

from benchmarks.papers.claims import Outcome

PAPERS = ("sandler2021", "zhang2023", "omae2026", "gatmiry2023", "kaur2022")


def reproduce(name: str, data: str | None, quick: bool) -> Outcome:
    """The outcome of one paper's file; ``quick`` runs every line of it in seconds and judges nothing."""
    run = import_module(f"benchmarks.papers.{name}").run
    outcome: Outcome = run(data, quick)
    return outcome
