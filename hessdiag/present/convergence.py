"""How the numbers settled: were the steps and the probes enough?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from hessdiag.errors import UsageError
from hessdiag.formatting import format_interval, format_metric
from hessdiag.present.axes import COLOURS, LINES, caption, heading, ink, note, prepare
from hessdiag.present.inputs import facts
from hessdiag.results import Analysis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Of = Literal["extremes", "trace"]


def convergence(
    analysis: Analysis, ax: Axes | None = None, *, of: Of = "extremes", show_caption: bool = True
) -> Axes:
    """Draw how the extremes settled over steps, or the trace over probes.

    Args:
        analysis: the measurement.
        ax: where to draw; a new figure by default.
        of: "extremes" (Ritz values with their certificates) or "trace" (running mean with its interval).
        show_caption: write below the axes what is needed to repeat the picture.

    Returns:
        The axes; the figure is ``ax.figure``.

    Raises:
        UsageError: that history was not recorded.
    """
    frame = convergence_frame(analysis, of=of)
    ax = prepare(ax, height=3.2)
    (_draw_extremes if of == "extremes" else _draw_trace)(ax, analysis, frame)
    ax.margins(x=0.02)
    heading(ax, analysis.title)
    if show_caption:
        caption(ax, convergence_caption(analysis, of=of))
    return ax


def convergence_frame(analysis: Analysis, *, of: Of = "extremes") -> pd.DataFrame:
    """Exactly what `convergence` draws.

    Columns of the extremes: step, ritz_max, certificate_max, ritz_min, certificate_min (NaN while there is
    none). Of the trace: probe, mean, lo, hi.

    Raises:
        UsageError: that history was not recorded.
    """
    import pandas as pd

    history = analysis.convergence
    if of == "trace" and history.trace_mean:
        mean, half = pd.Series(history.trace_mean), pd.Series(history.trace_half_width)
        probes = range(2, 2 + len(mean))
        return pd.DataFrame({"probe": probes, "mean": mean, "lo": mean - half, "hi": mean + half})
    if of == "extremes" and history.steps and (history.ritz_max or history.ritz_min):
        names = ("ritz_max", "certificate_max", "ritz_min", "certificate_min")
        columns = {name: _padded(getattr(history, name), len(history.steps)) for name in names}
        return pd.DataFrame({"step": history.steps, **columns})
    known = [name for name, there in (("extremes", history.steps), ("trace", history.trace_mean)) if there]
    msg = (
        f"convergence of {of!r} was not recorded (recorded: {', '.join(known) or 'none'}): "
        "exact values have no history, sampled ones do"
    )
    raise UsageError(msg)


def convergence_caption(analysis: Analysis, *, of: Of = "extremes") -> str:
    """What is needed to repeat and to read the picture, in one paragraph."""
    origin = " · ".join(facts(analysis))
    if of == "extremes":
        text = (
            "Ritz values after each Lanczos step (no eigenvalue can lie inside them) and the certificates "
            "beyond which none lies, at the confidence stated with λ."
        )
    else:
        text = "Running mean over probes with its interval; a flat mean alone proves nothing, the width does."
    return f"{text} {origin}".strip() + ("." if origin else "")


def _padded(values: Sequence[float | None], length: int) -> list[float]:
    """Finite values or NaN: JSON has no infinity, so "no certificate yet" comes back as None."""
    finite = [math.nan if value is None or not math.isfinite(value) else value for value in values]
    return (finite + [math.nan] * length)[:length]


def _draw_extremes(ax: Axes, analysis: Analysis, frame: pd.DataFrame) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (side, name) in enumerate((("max", "λ_max"), ("min", "λ_min"))):
        ritz, certificate = frame[f"ritz_{side}"], frame[f"certificate_{side}"]
        if ritz.isna().all():
            continue
        colour = COLOURS[number]
        ax.plot(
            frame["step"], ritz, color=colour, linewidth=1.6, marker=".", markersize=4, label=f"Ritz value, {name}"
        )
        if not certificate.isna().all():
            line = {"color": colour, "linewidth": 1.1, "linestyle": LINES[1], "label": f"certificate, {name}"}
            ax.plot(frame["step"], certificate, **line)
            ax.fill_between(frame["step"], ritz, certificate, color=colour, alpha=0.12, linewidth=0)
        metric = analysis.metrics.get(f"lambda_{side}")
        if metric is not None:
            text = f"{name} {format_interval(metric.value, metric.lo, metric.hi)}"
            ax.annotate(
                text,
                (frame["step"].iloc[-1], float(ritz.dropna().iloc[-1])),
                (0, 5 if side == "max" else -5),
                textcoords="offset points",
                fontsize=8,
                color=ink(ax),
                ha="right",
                va="bottom" if side == "max" else "top",
            )
    _limit_to_values(ax, frame)
    ax.axhline(0.0, color=ink(ax), linewidth=0.8, zorder=1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("Lanczos step")
    ax.set_ylabel("eigenvalue λ")
    ax.legend(frameon=False, fontsize=8, labelcolor=ink(ax), ncols=2, loc="center right")


def _limit_to_values(ax: Axes, frame: pd.DataFrame) -> None:
    """Early certificates are orders of magnitude too wide: show the values, let those leave the frame."""
    inner = frame[["ritz_max", "ritz_min"]].stack().tolist()
    last = [frame[name].dropna().iloc[-1:].tolist() for name in ("certificate_max", "certificate_min")]
    spread = max(max([*inner, 0.0]) - min([*inner, 0.0]), math.ulp(0.0))
    reach = [end for ends in last for end in ends if abs(end) < 3 * spread]
    hi, lo = max([*inner, *reach, 0.0]), min([*inner, *reach, 0.0])
    if hi > lo:
        ax.set_ylim(lo - 0.22 * (hi - lo), hi + 0.22 * (hi - lo))


def _draw_trace(ax: Axes, analysis: Analysis, frame: pd.DataFrame) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.fill_between(frame["probe"], frame["lo"], frame["hi"], color=COLOURS[0], alpha=0.2, linewidth=0)
    ax.plot(frame["probe"], frame["mean"], color=COLOURS[0], linewidth=1.6, marker=".", markersize=4, gid="mean")
    metric = analysis.metrics.get("trace")
    if metric is not None:
        ax.axhline(metric.value, color=ink(ax), linewidth=0.8, linestyle=(0, (4, 2)), gid="trace")
        note(ax, 0.99, 0.96, f"tr H = {' '.join(format_metric(metric))}", ha="right", va="top")
    settled = frame.iloc[min(2, len(frame) - 1) :]
    lo, hi = float(settled["lo"].min()), float(settled["hi"].max())
    if hi > lo:
        ax.set_ylim(lo - 0.1 * (hi - lo), hi + 0.3 * (hi - lo))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("probes")
    ax.set_ylabel("trace, running mean")
