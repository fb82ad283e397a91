"""What a reproduction says: claims with verdicts, and the tables and picture they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t

from benchmarks.tables import circumstances
from hessdiag.files import write_whole
from hessdiag.present import png

CONFIDENCE = 0.95
MANY = 1000  # seeds that no study here can have
HOLDS, FAILS, UNSURE = "holds", "does not hold", "cannot tell"


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper and what became of it here.

    Attributes:
        text: the claim, with its place in the paper.
        verdict: "holds", "does not hold" or "cannot tell".
        evidence: the figure with its interval and the number of seeds.
    """

    text: str
    verdict: str
    evidence: str


@dataclass
class Outcome:
    """A reproduction.

    Attributes:
        title: the paper, with its number on arXiv.
        setting: what was run, at which scale, and how that differs from the paper.
        claims: in the order of the paper.
        tables: by title, means with standard errors.
        raw: one row per run and measurement, tidy.
        figure: the picture.
        remarks: what was noticed beside the claims.
        minutes: of CPU time that all runs took, where that was taken down.
    """

    title: str
    setting: str
    claims: list[Claim]
    tables: dict[str, pd.DataFrame]
    raw: pd.DataFrame
    figure: Figure
    remarks: list[str] = field(default_factory=list)
    minutes: float | None = None


def interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Mean of independent seeds and its t interval; of one seed, the whole line."""
    values = np.asarray(samples, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, -np.inf, np.inf
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def judge(
    text: str,
    samples: Sequence[float],
    *,
    above: float | None = None,
    below: float | None = None,
    what: str = "mean",
) -> Claim:
    """A claim that the mean of ``samples`` lies above, below or between: by its interval over seeds.

    Args:
        text: of the claim.
        samples: one figure per seed, paired differences or ratios where two arms are compared.
        above: what the mean must exceed.
        below: what it must stay under.
        what: the figure's name in the evidence.
    """
    mean, low, high = interval(samples)
    floor, ceiling = -np.inf if above is None else above, np.inf if below is None else below
    if low > floor and high < ceiling:
        verdict = HOLDS
    elif high <= floor or low >= ceiling:
        verdict = FAILS
    else:
        verdict = UNSURE
    asked = " and ".join(
        words for words in (above is not None and f"> {above:g}", below is not None and f"< {below:g}") if words
    )
    evidence = f"{what} {mean:.4g} [{low:.4g}, {high:.4g}] over {len(samples)} seeds; asked: {asked}"
    if verdict == UNSURE:
        evidence += f"; {would_decide(samples, floor, ceiling)}"
    return Claim(text, verdict, evidence)


def would_decide(samples: Sequence[float], floor: float, ceiling: float) -> str:
    """How many seeds would decide, if mean and spread stayed as they are."""
    if len(samples) < 2:
        return "more seeds would decide"
    mean, low, _ = interval(samples)
    near = min(abs(mean - bound) for bound in (floor, ceiling) if np.isfinite(bound))
    seeds = np.ceil(len(samples) * ((mean - low) / near) ** 2) if near else np.inf
    return f"about {seeds:,.0f} seeds would decide" if seeds <= MANY else f"not even {MANY:,} seeds would decide"


def falls_to(run: pd.DataFrame, by: str, level: float, column: str) -> float:
    """A column where another first falls to a level, interpolated in logarithms between the looks at a run.

    The first look's own value where it is there already, or where a value is 0; NaN where it never comes there.
    """
    x, y = run[by].to_numpy(float), run[column].to_numpy(float)
    there = np.flatnonzero(x <= level * (1 + 1e-12))
    if not len(there):
        return float("nan")
    place = int(there[0])
    if place == 0 or min(y[place - 1], y[place]) <= 0:
        return float(y[place])
    share = np.log(x[place - 1] / level) / np.log(x[place - 1] / x[place])
    return float(y[place - 1] ** (1 - share) * y[place] ** share)


def mean_and_error(frame: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Per group the mean ± standard error of each column over seeds, as text, with the number of seeds."""
    rows = []
    for key, part in frame.groupby(list(by), sort=False):
        row = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)) | {"seeds": len(part)}
        for column in columns:
            values = part[column].astype(float)
            error = f" ± {values.sem():.2g}" if len(values) > 1 else ""
            row[column] = f"{values.mean():.4g}{error}"
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(outcome: Outcome, picture: str | None) -> str:
    """The page of a reproduction."""
    parts = [f"# {outcome.title}", outcome.setting, circumstances()]
    if outcome.minutes is not None:
        parts.append(f"The whole run took {outcome.minutes:.3g} CPU minutes.")
    claims = pd.DataFrame(
        [(c.text, f"**{c.verdict}**", c.evidence) for c in outcome.claims],
        columns=["claim", "verdict", "evidence"],
    )
    parts.append(_table(claims))
    if picture:
        parts.append(f"![{outcome.title}]({picture})")
    for title, table in outcome.tables.items():
        parts += [f"## {title}", _table(table)]
    if outcome.remarks:
        parts += ["## Remarks", "\n".join(f"* {remark}" for remark in outcome.remarks)]
    return "\n\n".join(parts) + "\n"


def save(outcome: Outcome, folder: Path, name: str) -> None:
    """Write papers-``name``.md, .csv (every run) and .png."""
    write_whole(folder / f"papers-{name}.png", png(outcome.figure, dpi=110))
    write_whole(
        folder / f"papers-{name}.csv", outcome.raw.to_csv(index=False, lineterminator="\n", float_format="%.6g")
    )
    write_whole(folder / f"papers-{name}.md", markdown(outcome, f"papers-{name}.png"))


def _table(frame: pd.DataFrame) -> str:
    def cell(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "/").replace("\n", " ")

    lines = ["| " + " | ".join(map(cell, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines)
