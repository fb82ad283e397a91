"""A trajectory as a table, in words, and as one HTML file that needs no script and no network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from hessdiag.formatting import format_interval, format_metric, format_number
from hessdiag.pages import meanings
from hessdiag.present.density import shared_grid
from hessdiag.present.inputs import facts, threshold, widest
from hessdiag.present.lines import fits, one_line_each
from hessdiag.present.pictures import data_address, picture, rendered
from hessdiag.present.reproduce import reproduce
from hessdiag.present.words import CAVEAT
from hessdiag.results import Analysis
from hessdiag.shown import csv_text, encodable, listed, plain, single_spaced
from hessdiag.track.plots import evolution, limit_names, panel_frame, spectra_of
from hessdiag.track.trajectory import Point, Trajectory

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

EDGE = (
    "2/η is where full-batch gradient descent with learning rate η becomes unstable on a quadratic (the edge of "
    "stability, Cohen et al. 2021); with momentum β it lies at (2+2β)/η, with Nesterov's at (2+2β)/((1+2β)η). "
    "Mini-batch noise keeps λ_max lower, weight decay adds to every eigenvalue what these numbers leave out, and "
    "for Adam and its kin the line means nothing: theirs is the threshold of preconditioned_lambda_max."
)
DECADES = 3  # of the symlog axis that have a column of their own under the picture
MOST_NAME = 24  # characters of a checkpoint's name for which the interval of λ_max gives way


SHARE = "λ_max(P⁻¹H)/threshold"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: (value, interval) per column, or why there is none."""

    name: str
    cells: list[tuple[str, str]]
    error: str


EXPLAINS = {
    "λ_max": "lambda_max",
    "λ_min": "lambda_min",
    "trace": "trace",
    "λ_max·η/2": "stability_limit",
    SHARE: "preconditioned_lambda_max",
}
"""Columns and the pages that explain them."""


def columns(trajectory: Trajectory) -> list[str]:
    """Heads of the table; the last names the limit where it is known for some checkpoint."""
    names = limit_names(trajectory.points)
    relative = ["λ_max·η/2" if names == "2/η" else f"λ_max over {names}"] if names else []
    preconditioned = [SHARE] * any(point.over_threshold() for point in trajectory.points)
    return ["checkpoint", "loss", "λ_max", "λ_min", "trace", *relative, *preconditioned]


def rows(trajectory: Trajectory) -> list[Row]:
    """One row per checkpoint, under `columns`."""
    points = trajectory.points
    related = any(point.rate is not None for point in points)
    adaptive = any(point.over_threshold() for point in points)
    return [
        Row(plain(point.name), _cells(point, related=related, adaptive=adaptive), plain(point.error))
        for point in points
    ]


def _cells(point: Point, *, related: bool, adaptive: bool) -> list[tuple[str, str]]:
    if point.analysis is None:
        return []
    loss = point.value("loss")
    cells = [("—" if math.isnan(loss) else f"{loss:.4g}", "")]
    for name in ("lambda_max", "lambda_min", "trace"):
        metric = point.analysis.metrics.get(name)
        cells.append(("—", "") if metric is None else format_metric(metric))
    shares = [point.relative()] * related + [point.over_threshold()] * adaptive
    cells += [("—", "") if share is None else (format_number(*share), format_interval(*share)) for share in shares]
    return cells


def reading(trajectory: Trajectory) -> list[str]:
    """Sentences a newcomer can act on; the last one says what must not be concluded."""
    count, done = len(trajectory.points), len(trajectory.measured)
    if not done:
        return [f"None of {count} checkpoints could be measured."]
    said = [f"{done} of {count} checkpoints were measured, all on the same samples and parameters."]
    known = [(p, a.metrics["lambda_max"]) for p, a in trajectory.measured if "lambda_max" in a.metrics]
    if len(known) > 1:
        (first, begin), (last, end) = known[0], known[-1]
        apart = begin.hi < end.lo or end.hi < begin.lo
        way = ("rose" if end.value > begin.value else "fell") if apart else "did not measurably move"
        top, highest = max(known, key=lambda pair: pair[1].value)
        said.append(
            f"λ_max {way} from {format_metric(begin)[0]} ({plain(first.name)}) to {format_metric(end)[0]} "
            f"({plain(last.name)}); its largest value is {format_metric(highest)[0]}, at {plain(top.name)}."
        )
    shares = [(point.name, share) for point, _ in trajectory.measured if (share := point.over_threshold())]
    if shares:
        beyond = [name for name, (_, lo, _) in shares if lo > 1]
        where = f"at {listed(beyond)}" if beyond else "nowhere"
        said.append(
            f"λ_max(P⁻¹H), with the optimizer's preconditioner P, lies beyond the threshold of its steps {where}; "
            f"the largest share is {format_number(*max(share for _, share in shares))}."
        )
    relatives = [(point, relative) for point, _ in trajectory.measured if (relative := point.relative())]
    if relatives:
        beyond = [point.name for point, (_, lo, _) in relatives if lo > 1]
        where = f"at {listed(beyond)}" if beyond else "nowhere"
        said.append(f"λ_max lies beyond {limit_names(point for point, _ in relatives)} {where}. {EDGE}")
    return [*said, CAVEAT]


def terminal_trajectory(trajectory: Trajectory, width: int = 120) -> Group:
    """A rich table, a line per checkpoint, what it says below; the interval of λ_max where there is room."""
    from rich.console import Group
    from rich.text import Text

    heads = columns(trajectory)
    told, bare = [], []
    for row in rows(trajectory):
        cells = row.cells or [("failed", ""), *[("", "")] * (len(heads) - 2)]
        bare.append((row.name, *(value for value, _ in cells)))
        told.append((*bare[-1][:2], f"{cells[1][0]} {cells[1][1]}".strip(), *bare[-1][3:]))
    roomy = fits(heads, told, width, named=MOST_NAME)
    table, _ = one_line_each(heads, told if roomy else bare, width, bold=heads[1:] if not roomy else ())
    where = "Values to two digits of their intervals, which the page and the files have."
    lines = ["• " + sentence for sentence in (*([] if roomy else [where]), *reading(trajectory))]
    lines += ["! " + plain(note) for note in trajectory.notes]
    return Group(table, Text("\n".join(lines + [f"! {warning}" for warning in warnings(trajectory)])))


def warnings(trajectory: Trajectory) -> list[str]:
    """Every warning once, with the checkpoints it is about."""
    about: dict[str, list[str]] = {}
    for point, analysis in trajectory.measured:
        for warning in analysis.warnings:
            about.setdefault(plain(single_spaced(warning)), []).append(point.name)
    failed = [f"{plain(point.name)} was not measured: {plain(point.error)}" for point in trajectory.failed]
    return failed + [f"{listed(names)}: {warning}" for warning, names in about.items()]


def evolution_frame(trajectory: Trajectory) -> pd.DataFrame:
    """What the picture shows, a row per measured checkpoint.

    Beside the panels' values there are shares of the eigenvalues (raw quadrature, no kernel) below zero, around
    it, and per decade above: the heat map in numbers.
    """
    import pandas as pd

    frame = pd.DataFrame({"checkpoint": [encodable(point.name) for point, _ in trajectory.measured]})
    for of in ("loss", "lambda_max", "preconditioned", "trace"):
        one = panel_frame(trajectory, of).rename(columns={"value": of, "limit": "limit of λ_max"})
        kept = [column for column in ("checkpoint", of, "limit of λ_max") if column in one]
        frame = frame if one.empty else frame.merge(one[kept].drop_duplicates("checkpoint"), "left", "checkpoint")
    frame = frame.dropna(axis="columns", how="all")
    spectra = spectra_of(trajectory)
    if not spectra:
        return frame
    step = max(threshold(*spectra), widest(spectra))  # no count begins where signs are not resolved
    ends = [-math.inf, -step, step, *(step * 10.0**k for k in range(1, DECADES)), math.inf]
    for lo, hi in pairwise(ends):
        name = f"share {_bound(lo, hi)}"
        frame[name] = [_share(analysis, lo, hi) for _, analysis in trajectory.measured]
    return frame


def _bound(lo: float, hi: float) -> str:
    if lo == -math.inf:
        return f"λ<{hi:.2g}"
    return f"λ>{lo:.2g}" if hi == math.inf else f"{lo:.2g} to {hi:.2g}"


def _share(analysis: Analysis, lo: float, hi: float) -> float:
    if analysis.spectrum is None:
        return math.nan
    return analysis.spectrum.mass(lo, math.nextafter(hi, -math.inf))


def evolution_caption(trajectory: Trajectory) -> str:
    """What is needed to repeat and to read the picture, in one paragraph."""
    first = trajectory.measured[0][1]
    spectra = spectra_of(trajectory)
    text = f"{len(trajectory.measured)} checkpoints, each: {' · '.join(facts(first))}. "
    if spectra:
        smooth = shared_grid(spectra)
        linear = format_number(smooth.scale.linthresh, 0, smooth.scale.linthresh)
        text += (
            f"Top: density, Gaussian kernel of {smooth.sigma:.2g} decades, for the eye only; axis linear within "
            f"±{linear}; empty below {smooth.floor:.1e}, a tenth of a lone eigenvalue's peak. "
        )
        if widest(spectra):
            text += "Between the dotted levels signs are not resolved; shares in the table begin beyond them. "
    text += "Bars: intervals, where wider than the dot. The loss is that of these samples."
    names = limit_names(trajectory.points)
    if not names:
        return text
    return f"{text} Dashed: {names}, the edge of stability of full-batch descent, and of no other (see Summary)."


def trajectory_page(trajectory: Trajectory, command: str = "") -> str:
    """The whole report as HTML text, the same bytes for the same trajectory.

    Args:
        trajectory: measured or not.
        command: what was typed to make it, shown under Reproduce.
    """
    measured = trajectory.measured
    pictures = []
    if measured:
        drawn = evolution(trajectory)
        name = "Spectrum, λ_max, trace and loss along training"
        frame = evolution_frame(trajectory)
        ax = drawn.axes[0]
        pictures = [picture(ax, evolution_caption(trajectory), frame, "evolution", "trajectory.csv", name)]
    return rendered(
        "hessdiag.track",
        "trajectory.html.j2",
        title=f"{len(trajectory.points)} checkpoints along training",
        columns=columns(trajectory),
        rows=rows(trajectory),
        reading=reading(trajectory),
        notes=[plain(note) for note in trajectory.notes],
        warnings=warnings(trajectory),
        pictures=pictures,
        command=plain(command),
        products=f"{trajectory.products:,}",
        facts=reproduce(measured[0][1]) if measured else [],
        first=plain(measured[0][0].name) if measured else "",
        csv=data_address(csv_text(trajectory.to_frame())),
        explains=EXPLAINS,
        meanings=meanings(EXPLAINS.values()),
    )
