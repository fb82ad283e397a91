"""Pictures of a gap report: performance per checkpoint, sharpness against the gap, and tau of every measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hessdiag.errors import UsageError
from hessdiag.generalization.registry import Reading
from hessdiag.generalization.report import GapReport
from hessdiag.present.axes import COLOURS, GREY, heading, ink, prepare
from hessdiag.present.text import plain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHOWN = (
    *("lambda_max", "trace", "worst_sharpness_adaptive_box", "relative_flatness", "pac_bayes_flatness"),
    *("weight_norm", "inverse_margin", "gradient_noise"),
)
"""Measures that are drawn against the gap: one or two of every family, chosen before any result was seen."""
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
    frame = scatter_frame(report, measure)
    ax = prepare(ax, height=3.2)
    groups = list(dict.fromkeys(frame["group"]))
    for index, group in enumerate(groups):
        part = frame[frame["group"] == group]
        x, y = part[measure].to_numpy(), part["gap"].to_numpy()
        ax.errorbar(
            x,
            y,
            xerr=np.abs(part[[f"{measure}_lo", f"{measure}_hi"]].to_numpy().T - x),
            yerr=np.abs(part[["gap_lo", "gap_hi"]].to_numpy().T - y),
            fmt=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            ecolor=GREY,
            elinewidth=0.7,
            markersize=5,
            label=plain(group),
        )
    positive = frame[measure].min() > 0
    if positive and frame[measure].max() > 20 * frame[measure].min():
        ax.set_xscale("log")
    ax.axhline(0.0, color=ink(ax), linewidth=0.6)
    if 1 < len(groups) <= len(COLOURS):
        ax.legend(frameon=False, fontsize=8, labelcolor=ink(ax))
    ax.set_xlabel(measure)
    ax.set_ylabel(f"{report.gap_kind} gap")
    heading(ax, f"{measure}: {_tau(report, measure)}")
    return ax


def scatter_frame(report: GapReport, measure: str) -> pd.DataFrame:
    """What `gap_scatter` draws: checkpoint, group, measure and gap with their ends.

    Raises:
        UsageError: no checkpoint has both.
    """
    import pandas as pd

    rows = []
    for record in report.records:
        one, gap = record.readings.get(measure), record.gap(report.gap_kind)
        if isinstance(one, Reading) and gap.value is not None:
            hi = one.hi if np.isfinite(one.hi) else one.value
            rows.append(
                (record.name, _group(report, record.meta), one.value, one.lo, hi, gap.value, gap.lo, gap.hi)
            )
    if not rows:
        msg = f"{measure}: no checkpoint has both this measure and the {report.gap_kind} gap"
        raise UsageError(msg)
    columns = ["checkpoint", "group", measure, f"{measure}_lo", f"{measure}_hi", "gap", "gap_lo", "gap_hi"]
    return pd.DataFrame(rows, columns=columns)


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
        ecolor=COLOURS[0],
        elinewidth=1,
        markersize=4.5,
        label=f"tau-b, {report.confidence:.0%} interval over runs",
    )
    if frame["worst_group"].notna().any():
        ax.plot(frame["worst_group"], rows, linestyle="", marker="x", color=COLOURS[1], label="worst group")
    moved = frame["moved"] > 0
    names = [f"{name} *" if flag else name for name, flag in zip(frame["measure"], moved, strict=True)]
    ax.set_yticks(rows, names, fontsize=8)
    ax.set_ylim(len(frame) - 0.4, -0.6)
    ax.set_xlim(-1.05, 1.05)
    ax.axvline(0.0, color=ink(ax), linewidth=0.8)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    below = -0.45 / (0.3 + 0.2 * len(frame))  # inches under the axis' label, as a share of the axes
    legend = ax.legend(frameon=False, fontsize=8, labelcolor=ink(ax), loc="upper center", ncols=2)
    legend.set_bbox_to_anchor((0.5, below))
    ax.set_xlabel(f"association with the {report.gap_kind} gap (* moves when the layers are rescaled)")
    heading(ax, "Which measures go with the gap")
    return ax


def taus_frame(report: GapReport) -> pd.DataFrame:
    """What `taus` draws, sorted by tau: measure, tau, lo, hi, p_holm, worst_group, moved (checkpoints), n.

    Raises:
        UsageError: no measure has a tau.
    """
    import pandas as pd

    rows = []
    for one in report.ranks.measures:
        if one.overall is None:
            continue
        verdicts = [r.guard[one.measure].verdict for r in report.records if one.measure in r.guard]
        worst = one.worst.worst if one.worst is not None else float("nan")
        o = one.overall
        rows.append((one.measure, o.tau, o.lo, o.hi, one.p_holm, worst, verdicts.count("moved"), one.n))
    if not rows:
        first = report.ranks.measures[0].reason if report.ranks.measures else "no measures were taken"
        msg = f"nothing to draw: {first}"
        raise UsageError(msg)
    columns = ["measure", "tau", "lo", "hi", "p_holm", "worst_group", "moved", "n"]
    return pd.DataFrame(rows, columns=columns).sort_values("tau", ascending=False, kind="stable")


def performances(report: GapReport, ax: Axes | None = None) -> Axes:
    """Loss of every split per checkpoint, with intervals."""
    frame = performances_frame(report)
    ax = prepare(ax, height=1.4 + 0.2 * min(len(report.records), MOST_NAMED))
    order = [record.name for record in report.records]
    place = {name: index for index, name in enumerate(order)}
    for index, (split, part) in enumerate(frame.groupby("split", sort=False)):
        y = part["checkpoint"].map(place).to_numpy() + 0.16 * index
        x = part["loss"].to_numpy()
        reach = np.abs(part[["lo", "hi"]].to_numpy().T - x)
        ax.errorbar(
            x,
            y,
            xerr=reach,
            fmt=MARKERS[index % 8],
            color=COLOURS[index % 8],
            markersize=4.5,
            elinewidth=1,
            label=plain(str(split)),
        )
    if frame["loss"].min() > 0:
        ax.set_xscale("log")
    shown = order if len(order) <= MOST_NAMED else order[:: -(-len(order) // MOST_NAMED)]
    ax.set_yticks([place[name] for name in shown], [plain(n)[-40:] for n in shown], fontsize=8, parse_math=False)
    ax.set_ylim(len(order) - 0.3, -0.7)
    ax.grid(visible=False, axis="y")
    ax.legend(frameon=False, fontsize=8, labelcolor=ink(ax))
    ax.set_xlabel("mean loss")
    heading(ax, "Loss per split")
    return ax


def performances_frame(report: GapReport) -> pd.DataFrame:
    """What `performances` draws: checkpoint, split, loss, lo, hi."""
    import pandas as pd

    rows = [
        (record.name, split.split, split.loss.value, split.loss.lo, split.loss.hi)
        for record in report.records
        for split in record.performance.splits
        if split.loss.value is not None
    ]
    if not rows:
        msg = "no checkpoint has a loss with an interval: too few examples in every split"
        raise UsageError(msg)
    return pd.DataFrame(rows, columns=["checkpoint", "split", "loss", "lo", "hi"])


def drawable(report: GapReport, measures: Sequence[str] = SHOWN) -> list[str]:
    """Of these measures, those that at least two checkpoints have together with the gap."""
    found = []
    for measure in measures:
        values = [r.readings.get(measure) for r in report.records if r.gap(report.gap_kind).value is not None]
        if sum(isinstance(value, Reading) for value in values) > 1:
            found.append(measure)
    return found


def _group(report: GapReport, meta: object) -> str:
    names = report.ranks.hyperparameters[:2]
    facts = meta if isinstance(meta, dict) else {}
    return ", ".join(f"{name}={facts[name]}" for name in names if name in facts) or "all"


def _tau(report: GapReport, measure: str) -> str:
    one = next((one for one in report.ranks.measures if one.measure == measure), None)
    if one is None or one.overall is None:
        return "no tau"
    return f"tau {one.overall.tau:+.2f} [{one.overall.lo:+.2f}, {one.overall.hi:+.2f}], n = {one.n}"
