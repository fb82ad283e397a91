"""The spectrum without smoothing: the staircase of raw quadrature, both tails to one eigenvalue."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from hessdiag.formatting import power
from hessdiag.present.axes import COLOURS, Array, Symlog, bootstrap, caption, heading, ink, note, prepare
from hessdiag.present.inputs import Measured, brief, facts, left_open, spectra, sweep, threshold
from hessdiag.present.signs import zone_in_caption, zone_in_stairs
from hessdiag.results import Quadrature, Spectrum
from hessdiag.results.chance import least_share

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TAIL = 0.05  # on either side of the band
MOST_STEPS = 300  # corners drawn of the staircase: more cannot be seen


def cumulative(analysis: Measured, ax: Axes | None = None, *, show_caption: bool = True) -> Axes:
    """Draw the share of eigenvalues at or below λ, raw, with its 90% band over probes or of the one start.

    The share is on a logit axis, so both tails can be read down to half an eigenvalue. The zone next to zero in
    which signs are not resolved is hatched.

    Args:
        analysis: an `Analysis` or a `Spectrum`.
        ax: where to draw; a new figure by default.
        show_caption: write below the axes what is needed to repeat the picture.

    Returns:
        The axes; the figure is ``ax.figure``.

    Raises:
        UsageError: no spectrum was measured.
    """
    ((name, (whole, spectrum)),) = spectra(analysis).items()
    frame = cumulative_frame(analysis)
    x = frame["eigenvalue"].to_numpy()
    ax = prepare(ax)
    if "lo" in frame:
        lo, hi = frame["lo"].to_numpy(), frame["hi"].to_numpy()
        ax.fill_between(x, lo, hi, step="post", color=COLOURS[0], alpha=0.25, linewidth=0)
    ax.step(x, frame["share"].to_numpy(), where="post", color=COLOURS[0], linewidth=1.4, gid="share")
    scale = Symlog(threshold(spectrum))
    ends = scale.forward([min(x[0], 0.0), max(x[-1], 0.0)])
    margin = max(0.15, 0.04 * float(ends[1] - ends[0]))
    scale.apply(ax, *scale.backward([ends[0] - margin, ends[1] + margin]))
    _logit(ax, spectrum.dimension)
    ax.axvline(0.0, color=ink(ax), linewidth=0.8, zorder=1)
    zone_in_stairs(ax, spectrum)
    ax.set_xlabel("eigenvalue λ")
    ax.set_ylabel("share of eigenvalues ≤ λ")
    largest = whole.metrics.get("lambda_max")
    if largest is not None:
        ax.axvline(largest.value, color=ink(ax), linewidth=0.8, linestyle=(0, (4, 2)), gid="lambda_max")
        place = ax.get_xaxis_transform()
        note(ax, largest.value, 1.015, f"λ_max = {brief(largest)}", place, ha="right", va="bottom")
    heading(ax, name, pad=18)
    if show_caption:
        caption(ax, cumulative_caption(analysis))
    return ax


def cumulative_frame(analysis: Measured) -> pd.DataFrame:
    """Exactly what `cumulative` draws: eigenvalue, share, and lo, hi where there is a band.

    ``attrs["floor"]`` is the share of half an eigenvalue, to which both tails are cut.
    """
    import pandas as pd

    ((_, spectrum),) = spectra(analysis).values()
    x = np.unique([node for node, _ in spectrum.merged()])
    if len(x) > MOST_STEPS:
        x = x[np.unique(np.linspace(0, len(x) - 1, MOST_STEPS).round().astype(int))]
    known = _below(spectrum.known, x)
    lines = np.stack([known + _below(probe, x) for probe in spectrum.probes])
    floor = 0.5 / spectrum.dimension
    band = bootstrap(lines) if spectrum.error is None else _chance(spectrum, known, lines[0])
    columns = {"share": lines.mean(axis=0)}
    if band is not None:
        columns |= {"lo": band[0], "hi": band[1]}
    # the first row lets the staircase rise from the floor at the smallest node
    rises = {name: np.clip(np.concatenate([[0.0], shares]), floor, 1 - floor) for name, shares in columns.items()}
    frame = pd.DataFrame({"eigenvalue": np.concatenate([x[:1], x]), **rises})
    frame.attrs["floor"] = floor
    return frame


def cumulative_caption(analysis: Measured) -> str:
    """What is needed to repeat and to read the picture, in one paragraph."""
    ((_, (whole, spectrum)),) = spectra(analysis).items()
    band = left_open([spectrum], banded="90% bootstrap over probes")
    if spectrum.error is not None:
        band += " Band: 90%, of chance alone; depth is not in it."
    origin = " · ".join([sweep(spectrum), *facts(whole)])
    zone = zone_in_caption([spectrum])
    return f"{origin}. Raw quadrature, nothing smoothed. {band} {zone}Tails cut at half an eigenvalue."


def _chance(spectrum: Spectrum, known: Array, shares: Array) -> tuple[Array, Array]:
    """90% limits of the shares where one start saw ``shares``: what is counted one by one is known."""
    left = 1 - len(spectrum.known.nodes) / spectrum.dimension
    seen = ((shares - known) / left).clip(0, 1) if left else np.zeros_like(shares)
    count = spectrum.dimension - len(spectrum.known.nodes)
    low, high = least_share(seen, count, TAIL), 1 - least_share(1 - seen, count, TAIL)
    return known + left * low, known + left * high


def _below(quadrature: Quadrature, x: Array) -> Array:
    """Weight at or below each of ``x`` (ascending), (points,)."""
    order = np.argsort(quadrature.nodes)
    nodes = np.asarray(quadrature.nodes, dtype=np.float64)[order]
    steps = np.concatenate([[0.0], np.cumsum(np.asarray(quadrature.weights, dtype=np.float64)[order])])
    return np.asarray(steps[np.searchsorted(nodes, x, side="right")])


def _logit(ax: Axes, dimension: int) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    floor = 0.5 / dimension
    ax.set_yscale("logit")
    ax.set_ylim(floor, 1 - floor)
    deepest = max(1, math.floor(-math.log10(floor)))
    step = max(1, math.ceil(deepest / 4))
    tails = list(range(step, deepest + 1, step))
    ticks = {10.0**-k: power(-k) for k in reversed(tails)} | {0.5: "½"}
    ticks |= {1 - 10.0**-k: f"1 − {power(-k)}" for k in tails}
    ax.yaxis.set_major_locator(FixedLocator(list(ticks)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda _, position: list(ticks.values())[position or 0]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
