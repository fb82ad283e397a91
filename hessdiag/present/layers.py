"""Where the trace sits: each parameter tensor's mean curvature, in network order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hessdiag.errors import UsageError
from hessdiag.formatting import with_minus
from hessdiag.present.axes import COLOURS, Symlog, caption, heading, ink, prepare
from hessdiag.present.inputs import facts
from hessdiag.results import Analysis
from hessdiag.shown import plain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MOST_ROWS = 40  # tensors that fit on one screen with readable names


def layers(analysis: Analysis, ax: Axes | None = None, *, show_caption: bool = True) -> Axes:
    """Draw trace per parameter of each tensor with its interval, in network order, and its share of the trace.

    Args:
        analysis: the measurement.
        ax: where to draw; a new figure by default, as high as the tensors need.
        show_caption: write below the axes what is needed to repeat the picture.

    Returns:
        The axes; the figure is ``ax.figure``.

    Raises:
        UsageError: no layers were measured.
    """
    frame = layers_frame(analysis)
    ax = prepare(ax, height=1.3 + 0.215 * len(frame))
    rows = range(len(frame))
    value = frame["per_parameter"]
    reach = [value - frame["per_parameter_lo"], frame["per_parameter_hi"] - value]
    ax.barh(rows, value, height=0.62, color=COLOURS[0], alpha=0.75, linewidth=0)
    bars = {"fmt": "none", "ecolor": ink(ax), "elinewidth": 0.9, "capsize": 2}
    ax.errorbar(value, rows, xerr=reach, **bars)
    ax.set_ylim(len(frame) - 0.4, -0.6)
    names = [_short(name) for name in frame["name"]]
    ax.set_yticks(list(rows), names, fontsize=8, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    _scale(ax, frame)
    ax.axvline(0.0, color=ink(ax), linewidth=0.8)
    _shares(ax, frame)
    ax.set_xlabel("trace / parameters of the tensor")
    heading(ax, analysis.title, pad=16)
    if show_caption:
        caption(ax, layers_caption(analysis), width=104)
    return ax


def layers_frame(analysis: Analysis) -> pd.DataFrame:
    """Exactly what `layers` draws, in network order.

    Columns: name, size, trace, lo, hi, kind, per_parameter with its lo and hi, share (of the summed trace).
    Of more than forty tensors those with the largest |trace| are kept.

    Raises:
        UsageError: no layers were measured.
    """
    import pandas as pd

    if not analysis.layers:
        msg = "layers: none were measured; ask for 'trace' among `quantities`"
        raise UsageError(msg)
    fields = ("name", "size", "trace", "lo", "hi", "kind")
    frame = pd.DataFrame({field: [getattr(layer, field) for layer in analysis.layers] for field in fields})
    for column, of in (("per_parameter", "trace"), ("per_parameter_lo", "lo"), ("per_parameter_hi", "hi")):
        frame[column] = frame[of] / frame["size"].clip(lower=1)
    total = frame["trace"].sum()
    frame["share"] = frame["trace"] / total if total else float("nan")
    if len(frame) > MOST_ROWS:
        frame = frame.loc[frame["trace"].abs().nlargest(MOST_ROWS).index.sort_values()].reset_index(drop=True)
    return frame


def layers_caption(analysis: Analysis) -> str:
    """What is needed to repeat and to read the picture, in one paragraph."""
    count = len(analysis.layers)
    which = f"The {MOST_ROWS} of {count:,} tensors with the largest |trace|"
    if count <= MOST_ROWS:
        which = f"All {count} tensors" if count > 1 else "The only tensor"
    kinds = {layer.kind for layer in analysis.layers}
    sure = "exact" if kinds == {"exact"} else "whiskers: their intervals"
    origin = " · ".join(facts(analysis))
    return (
        f"{which}, in network order; {sure}; bars: trace per parameter; right: share of the summed trace. {origin}"
        + ("." if origin else "")
    )


def _scale(ax: Axes, frame: pd.DataFrame) -> None:
    """Linear where the tensors are alike, symlog where they span more than a factor of thirty."""
    ends = [*frame["per_parameter_lo"], *frame["per_parameter_hi"], 0.0]
    sizes = sorted(abs(value) for value in frame["per_parameter"] if value)
    if not sizes:
        ax.set_xlim(-1, 1)
        return
    ax.grid(visible=True, axis="x", color="#808080", alpha=0.18, linewidth=0.6)
    if sizes[-1] < 30 * sizes[0]:
        lo, hi = min(ends), max(ends)
        ax.set_xlim(lo - 0.03 * (hi - lo) * (lo < 0), hi + 0.03 * (hi - lo))
        return
    scale = Symlog(max(sizes[0] / 3, sizes[-1] * 1e-5))
    units = scale.forward([min(ends), max(ends)])
    lo, hi = units[0] - 0.15 * (units[0] < 0), units[1] + 0.15
    scale.apply(ax, *scale.backward([lo, max(hi, 0.15)]))


def _shares(ax: Axes, frame: pd.DataFrame) -> None:
    place = ax.get_yaxis_transform()
    style = {"transform": place, "fontsize": 8, "color": ink(ax), "ha": "left"}
    ax.text(1.015, 1.0, "share of trace", va="bottom", **(style | {"transform": ax.transAxes}))
    for row, share in enumerate(frame["share"]):
        if share == share:
            text = f"{100 * share:.1f}%" if abs(share) >= 0.0005 else "<0.1%"
            ax.text(1.015, row, with_minus(text), va="center", **style)


def _short(name: str, most: int = 38) -> str:
    """The name, its middle left out when it is long: both ends tell tensors apart."""
    name = plain(name)
    if len(name) <= most:
        return name
    return name[: most // 2 - 1] + "…" + name[-(most - most // 2) :]
