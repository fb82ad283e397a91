"""Pictures of a gap report: performance per checkpoint, sharpness against the gap, and tau of every measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hessdiag.errors import UsageError
from hessdiag.formatting import format_tau
from hessdiag.gap.record import CheckpointRecord
from hessdiag.gap.registry import Reading
from hessdiag.gap.report import GapReport
from hessdiag.present.axes import COLOURS, GREY, heading, ink, legend_above, legend_beside, plain_ticks, prepare
from hessdiag.shown import encodable, plain, table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Look = tuple[str, str]  # colour and marker
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHOWN = (
    *("lambda_max", "trace", "worst_sharpness_adaptive_box", "relative_flatness", "pac_bayes_flatness"),
    *("weight_norm", "inverse_margin", "gradient_noise"),
)
"""Measures that are drawn against the gap: one or two of every family, chosen before any result was seen."""
POINTS: dict[str, Any] = {"elinewidth": 1.0, "markersize": 4.5}  # with their intervals
MOST_NAMED = 40  # checkpoints named on an axis


def gap_scatter(report: GapReport, measure: str, ax: Axes | None = None) -> Axes:
    """A measure against the gap, with the intervals of both, and its tau.

    Args:
        report: the checkpoints.
        measure: by name.
        ax: where to draw; a new figure by default.

    Raises:
        UsageError: no checkpoint has both.
    """
    from matplotlib.lines import Line2D

    frame = scatter_frame(report, measure)
    ax = prepare(ax, height=3.2)
    looks, legend = _looks(report)
    for group, part in frame.groupby("group", sort=False):
        colour, marker = looks[str(group)]
        x, y = part[measure].to_numpy(), part["gap"].to_numpy()
        ax.errorbar(
            x,
            y,
            xerr=np.abs(part[[f"{measure}_lo", f"{measure}_hi"]].to_numpy().T - x),
            yerr=np.abs(part[["gap_lo", "gap_hi"]].to_numpy().T - y),
            fmt=marker,
            color=colour,
            ecolor=GREY,
            elinewidth=0.7,
            markersize=5,
        )
    if 0 < 20 * frame[measure].min() < frame[measure].max():
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
    ax.axhline(0.0, color=ink(ax), linewidth=0.6)
    if legend:
        dots = [Line2D([], [], linestyle="", marker=marker, color=colour) for colour, marker in legend.values()]
        legend_beside(ax, dots, list(legend))
    ax.set_xlabel(measure)
    ax.set_ylabel(f"{report.gap_kind} gap")
    heading(ax, f"{measure}: {tau_of(report, measure)}")
    return ax


def scatter_frame(report: GapReport, measure: str) -> pd.DataFrame:
    """What `gap_scatter` draws: checkpoint, group, measure and gap with their ends.

    Raises:
        UsageError: no checkpoint has both.
    """
    rows = []
    for record in report.records:
        one, gap = record.readings.get(measure), record.gap(report.gap_kind)
        if isinstance(one, Reading) and gap.value is not None:
            hi = one.hi if np.isfinite(one.hi) else one.value
            rows.append((record.name, _group(report, record), one.value, one.lo, hi, gap.value, gap.lo, gap.hi))
    columns = ["checkpoint", "group", measure, f"{measure}_lo", f"{measure}_hi", "gap", "gap_lo", "gap_hi"]
    return _frame(rows, columns, f"{measure}: no checkpoint has both this measure and the {report.gap_kind} gap")


def taus(report: GapReport, ax: Axes | None = None) -> Axes:
    """Kendall's tau-b of every measure with its interval, the worst group beside it.

    Raises:
        UsageError: no measure has one.
    """
    frame = taus_frame(report)
    ax = prepare(ax, height=1.2 + 0.2 * len(frame))
    rows = np.arange(len(frame))
    tau = frame["tau"].to_numpy()
    reach = np.abs(frame[["lo", "hi"]].to_numpy().T - tau)
    ax.errorbar(
        tau,
        rows,
        xerr=reach,
        fmt="o",
        color=COLOURS[0],
        **POINTS,
        label=f"tau-b, {report.confidence:.0%} interval over runs",
    )
    if frame["worst_group"].notna().any():
        ax.plot(
            frame["worst_group"], rows, linestyle="", marker="x", color=COLOURS[1], label="worst group of runs"
        )
    moved = frame["moved"] > 0
    names = [f"{name} *" if flag else name for name, flag in zip(frame["measure"], moved, strict=True)]
    ax.set_yticks(rows, names, fontsize=8)
    ax.set_ylim(len(frame) - 0.4, -0.6)
    ax.set_xlim(-1.05, 1.05)
    ax.axvline(0.0, color=ink(ax), linewidth=0.8)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.grid(axis="x", color=GREY, alpha=0.18, linewidth=0.6)
    legend_above(ax)
    ax.set_xlabel(f"Kendall's tau-b with the {report.gap_kind} gap (* moves when the layers are rescaled)")
    heading(ax, "Which measures go with the gap")
    return ax


def taus_frame(report: GapReport) -> pd.DataFrame:
    """What `taus` draws, sorted by tau: measure, tau, lo, hi, p_holm, worst_group, moved (checkpoints), n.

    Raises:
        UsageError: no measure has a tau.
    """
    rows = []
    for one in report.ranks.measures:
        if one.overall is None:
            continue
        verdicts = [r.guard[one.measure].verdict for r in report.records if one.measure in r.guard]
        worst = one.worst.worst if one.worst is not None else float("nan")
        o = one.overall
        rows.append((one.measure, o.tau, o.lo, o.hi, one.p_holm, worst, verdicts.count("moved"), one.n))
    first = report.ranks.measures[0].reason if report.ranks.measures else "no measures were taken"
    columns = ["measure", "tau", "lo", "hi", "p_holm", "worst_group", "moved", "n"]
    frame = _frame(rows, columns, f"nothing to draw: {first}")
    return frame.sort_values("tau", ascending=False, kind="stable")


def performances(report: GapReport, ax: Axes | None = None) -> Axes:
    """Error or loss of every split per checkpoint, with intervals: that whose gap is ranked."""
    frame, drawn = performances_frame(report), report.gap_kind
    ax = prepare(ax, height=1.4 + 0.2 * min(len(report.records), MOST_NAMED))
    order = [encodable(record.name) for record in report.records]
    place = {name: index for index, name in enumerate(order)}
    splits = frame["split"].nunique()
    for index, (split, part) in enumerate(frame.groupby("split", sort=False)):
        y = part["checkpoint"].map(place).to_numpy() + 0.16 * (index - (splits - 1) / 2)
        x = part[drawn].to_numpy()
        reach = np.abs(part[["lo", "hi"]].to_numpy().T - x)
        ax.errorbar(
            x,
            y,
            xerr=reach,
            fmt=MARKERS[index % 8],
            color=COLOURS[index % 8],
            label=plain(str(split)),
            **POINTS,
        )
    if 0 < 5 * frame[drawn].min() < frame[drawn].max():  # less has no two round numbers on a log axis
        ax.set_xscale("log")
        plain_ticks(ax.xaxis)
    shown = order if len(order) <= MOST_NAMED else order[:: -(-len(order) // MOST_NAMED)]
    ax.set_yticks([place[name] for name in shown], [plain(n)[-40:] for n in shown], fontsize=8, parse_math=False)
    ax.set_ylim(len(order) - 0.3, -0.7)
    ax.grid(visible=False, axis="y")
    legend_above(ax)
    ax.set_xlabel(f"mean {drawn}")
    heading(ax, f"{drawn.capitalize()} per split")
    return ax


def performances_frame(report: GapReport) -> pd.DataFrame:
    """What `performances` draws: checkpoint, split, error (1 − score) or loss, lo, hi."""
    kind, rows = report.gap_kind, []
    for record, split in ((one, split) for one in report.records for split in one.performance.splits):
        one = split.loss if kind == "loss" else split.score
        if one.value is not None and one.lo is not None and one.hi is not None:
            shown = (one.value, one.lo, one.hi) if kind == "loss" else (1 - one.value, 1 - one.hi, 1 - one.lo)
            rows.append((record.name, split.split, *shown))
    lacking = f"no checkpoint has {kind} with an interval: too few examples in every split"
    return _frame(rows, ["checkpoint", "split", kind, "lo", "hi"], lacking)


def _frame(rows: Sequence[tuple[object, ...]], columns: list[str], lacking: str) -> pd.DataFrame:
    """The rows as a table; without any, ``lacking`` says why."""
    if not rows:
        raise UsageError(lacking)
    return table(rows, columns)


def drawable(report: GapReport) -> list[str]:
    """Of the measures `SHOWN`, those that at least two checkpoints have together with the gap."""
    known = [one.readings for one in report.records if one.gap(report.gap_kind).value is not None]
    return [name for name in SHOWN if sum(isinstance(one.get(name), Reading) for one in known) > 1]


def tau_of(report: GapReport, measure: str) -> str:
    """A measure's tau with its interval over runs, or that there is none."""
    one = next((one for one in report.ranks.measures if one.measure == measure), None)
    if one is None or one.overall is None:
        return "no tau"
    o = one.overall
    return f"tau {format_tau(o.tau)} [{format_tau(o.lo)}, {format_tau(o.hi)}], n = {one.n}"


def _told(report: GapReport) -> list[str]:
    """Hyper-parameters that points are told apart by: the first two with no more levels than there are colours."""
    found = []
    for name in report.ranks.hyperparameters:
        levels = {_level(record, name) for record in report.records}
        found += [name] * (1 < len(levels) <= len(COLOURS))
    return found[:2]


def _group(report: GapReport, record: CheckpointRecord) -> str:
    return ", ".join(_level(record, name) for name in _told(report)) or "all"


def _level(record: CheckpointRecord, name: str) -> str:
    return f"{name}={record.meta.get(name, '?')}"


def _looks(report: GapReport) -> tuple[dict[str, Look], dict[str, Look]]:
    """Colour and marker of every group, and of every line of the legend.

    Each group has its own of both; where there are too many, the first hyper-parameter has the colours and the
    second the markers.
    """
    cells = {_group(report, record): [_level(record, name) for name in _told(report)] for record in report.records}
    if len(cells) <= len(COLOURS):
        looks = dict(zip(cells, zip(COLOURS, MARKERS, strict=True), strict=False))
        return looks, looks if len(looks) > 1 else {}
    one, two = (list(dict.fromkeys(column)) for column in zip(*cells.values(), strict=True))
    looks = {group: (COLOURS[one.index(a)], MARKERS[two.index(b)]) for group, (a, b) in cells.items()}
    legend = {level: (COLOURS[index], "o") for index, level in enumerate(one)}
    return looks, legend | {level: (GREY, MARKERS[index]) for index, level in enumerate(two)}
