"""The five findings of kaur2022: which cells they compare, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace

import numpy as np
import pandas as pd

from benchmarks.papers.claims import CONFIDENCE, FAILS, HOLDS, UNSURE, Claim, interval, judge, would_decide
from benchmarks.papers.kaur2022_training import Cell

RATES = {25: (0.05, 0.1, 0.4), 100: (0.1, 0.4, 1.0), 1000: (0.4, 1.0, 2.0)}
"""By batch size. At 1,000 the batch is full: gradient descent at 0.4 ends far from the edge 2/lr, where the
rate hardly matters; 2.0 must cross it."""
PLAIN = {25: Cell(25, 0.1), 100: Cell(100, 0.4), 1000: Cell(1000, 1.0)}  # what SAM and BatchNorm are added to
SCALED = tuple(Cell(batch, round(0.015 * batch, 3)) for batch in (20, 40, 80))
RHOS = (0.0, 0.05, 0.2)  # 0.05 is SAM's default
DROPOUTS = (0.0, 0.2, 0.5, 0.7, 0.8)  # the paper's list, and one "excessively high"
SMALL, LARGE = 25, 1000
MARGIN = 0.005
"""Half a point of accuracy counts as none: 4 of 797 digits."""
CHANGE = 1.1  # the factor by which lambda_max must differ to have changed
FINDINGS = {
    "F1": "a larger learning rate lowers λ_max at every batch size; at large batch the gain sometimes vanishes",
    "F2": "batch size and rate scaled together change λ_max, not generalization",
    "F3": "SAM lowers λ_max at every batch size; its gain is smaller at large batch",
    "F4": "too much dropout lowers λ_max yet hurts",
    "F5": "BatchNorm does not consistently lower λ_max yet helps",
}


def cells() -> list[Cell]:
    """Everything that is trained, each once."""
    rates = [Cell(batch, lr) for batch, several in RATES.items() for lr in several]
    sam = [replace(cell, rho=rho) for cell in PLAIN.values() for rho in RHOS]
    dropout = [replace(PLAIN[SMALL], dropout=p) for p in DROPOUTS]
    norm = [replace(cell, norm=True) for cell in PLAIN.values()]
    return sorted({*rates, *SCALED, *sam, *dropout, *norm})


def of(raw: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """The runs of a cell that reached the stopping level, by seed."""
    here = np.isclose(raw[["batch", "lr", "rho", "dropout", "norm"]].astype(float), astuple(cell)).all(1)
    return raw[here & raw["reached"].astype(bool)].set_index("seed")


def paired(raw: pd.DataFrame, first: Cell, second: Cell, column: str) -> pd.DataFrame:
    """Both cells' figures of the seeds that reached the level in both."""
    return pd.concat([of(raw, cell)[column] for cell in (first, second)], axis=1, join="inner", keys=["a", "b"])


def ratio(raw: pd.DataFrame, first: Cell, second: Cell) -> list[float]:
    """lambda_max of the second cell over that of the first, per seed."""
    both = paired(raw, first, second, "lambda_max")
    return list((both["b"] / both["a"]).astype(float))


def gain(raw: pd.DataFrame, first: Cell, second: Cell) -> list[float]:
    """Test accuracy of the second cell minus that of the first, per seed."""
    both = paired(raw, first, second, "test accuracy")
    return list((both["b"] - both["a"]).astype(float))


def less(raw: pd.DataFrame, first: tuple[Cell, Cell], second: tuple[Cell, Cell]) -> list[float]:
    """What the first pair gains in test accuracy minus what the second gains, per seed."""
    sides = [paired(raw, *pair, "test accuracy").diff(axis=1)["b"] for pair in (first, second)]
    both = pd.concat(sides, axis=1, join="inner", keys=["a", "b"])
    return list((both["a"] - both["b"]).astype(float))


def verdict(
    text: str,
    samples: Sequence[float],
    *,
    above: float | None = None,
    below: float | None = None,
    what: str = "accuracy gained",
) -> Claim:
    """As `judge`; without a seed that got there, nothing can be told."""
    if not samples:
        return Claim(text, UNSURE, "0 seeds reached the stopping level in both arms")
    return judge(text, samples, above=above, below=below, what=what)


def every(text: str, parts: dict[str, Claim]) -> Claim:
    """Holds if each part does, and fails if one fails."""
    verdicts = {part.verdict for part in parts.values()}
    whole = FAILS if FAILS in verdicts else UNSURE if UNSURE in verdicts else HOLDS
    return Claim(text, whole, "; ".join(f"{name}: {part.evidence}" for name, part in parts.items()))


def claims(raw: pd.DataFrame, name: str) -> list[Claim]:
    """All findings on one data set, the accuracy and the sharpness of each."""
    found = [*_rate(raw), *_scaled(raw), *_sam(raw), *_dropout(raw), *_norm(raw)]
    return [replace(claim, text=f"{name}, {claim.text}") for claim in found]


def _lower(raw: pd.DataFrame, text: str, pairs: dict[int, tuple[Cell, Cell]]) -> Claim:
    parts = {
        f"batch {batch}": verdict("", ratio(raw, *pair), below=1.0, what="ratio of λ_max")
        for batch, pair in pairs.items()
    }
    return every(text, parts)


def _rate(raw: pd.DataFrame) -> list[Claim]:
    ends = {batch: (Cell(batch, rates[0]), Cell(batch, rates[-1])) for batch, rates in RATES.items()}
    return [
        _lower(raw, "F1: the largest rate leaves a smaller λ_max than the smallest, at every batch size", ends),
        verdict(f"F1: it generalizes better at batch {SMALL}", gain(raw, *ends[SMALL]), above=0.0),
        verdict("F1: its gain is gone at full batch", gain(raw, *ends[LARGE]), below=MARGIN),
    ]


def _scaled(raw: pd.DataFrame) -> list[Claim]:
    first, last = SCALED[0], SCALED[-1]
    found = ratio(raw, first, last)
    falls = bool(found) and np.mean(found) < 1
    bounds = {"below": 1 / CHANGE} if falls else {"above": CHANGE}
    how = f"from batch {first.batch} to {last.batch} at a constant ratio to the rate"
    return [
        verdict(f"F2: {how} λ_max changes by more than a tenth", found, what="ratio of λ_max", **bounds),
        verdict(f"F2: {how} test accuracy stays", gain(raw, first, last), above=-MARGIN, below=MARGIN),
    ]


def _sam(raw: pd.DataFrame) -> list[Claim]:
    pairs = {batch: (cell, replace(cell, rho=RHOS[-1])) for batch, cell in PLAIN.items()}
    return [
        _lower(raw, f"F3: SAM (rho {RHOS[-1]:g}) lowers λ_max at every batch size", pairs),
        verdict(f"F3: SAM generalizes better at batch {SMALL}", gain(raw, *pairs[SMALL]), above=0.0),
        verdict(
            f"F3: SAM gains less at full batch than at batch {SMALL}",
            less(raw, pairs[SMALL], pairs[LARGE]),
            above=0.0,
            what="accuracy gained there minus that gained at full batch",
        ),
    ]


def _dropout(raw: pd.DataFrame) -> list[Claim]:
    most = replace(PLAIN[SMALL], dropout=DROPOUTS[-1])
    found = ratio(raw, PLAIN[SMALL], most)
    return [
        verdict(f"F4: dropout {most.dropout:g} lowers λ_max", found, below=1.0, what="ratio of λ_max"),
        verdict(f"F4: dropout {most.dropout:g} generalizes worse", gain(raw, PLAIN[SMALL], most), below=0.0),
    ]


def _norm(raw: pd.DataFrame) -> list[Claim]:
    pairs = {batch: (cell, replace(cell, norm=True)) for batch, cell in PLAIN.items()}
    ratios = {batch: ratio(raw, *pair) for batch, pair in pairs.items()}
    helps = {
        f"batch {batch}": verdict("", gain(raw, *pair), above=0.0, what="accuracy gained")
        for batch, pair in pairs.items()
    }
    return [
        not_always_lower("F5: BatchNorm does not lower λ_max at every batch size", ratios),
        every("F5: BatchNorm generalizes better at every batch size", helps),
    ]


def not_always_lower(text: str, ratios: dict[int, list[float]]) -> Claim:
    """Holds if one ratio is surely above 1 (Bonferroni), fails if all are surely below."""
    known = {batch: each for batch, each in ratios.items() if each}
    strict = 1 - (1 - CONFIDENCE) / max(len(known), 1)
    if any(interval(each, strict)[1] > 1 for each in known.values()):
        whole = HOLDS
    elif len(known) == len(ratios) and all(interval(each)[2] < 1 for each in known.values()):
        whole = FAILS
    else:
        whole = UNSURE
    told = [
        f"batch {batch}: ratio of λ_max {mean:.4g} [{low:.4g}, {high:.4g}] over {len(each)} seeds"
        for batch, each in known.items()
        for mean, low, high in [interval(each, strict)]
    ]
    told.append(f"asked: one > 1, at {100 * strict:.1f}% each")
    if whole == UNSURE:
        needed = [would_decide(each, -np.inf, 1.0) for each in known.values() if interval(each, strict)[2] > 1]
        told += [f"open ones: {'; '.join(needed)}"] if needed else []
    return Claim(text, whole, "; ".join(told))


def summary(found: list[Claim], names: Sequence[str]) -> pd.DataFrame:
    """Per finding and data set one verdict: that all its parts hold, or that one fails."""
    rows = []
    for key, text in FINDINGS.items():
        row = {"finding": f"{key}: {text}"}
        for name in names:
            parts = {c.text: c for c in found if c.text.startswith(f"{name}, {key}:")}
            row[name] = every("", parts).verdict
        rows.append(row)
    return pd.DataFrame(rows)
