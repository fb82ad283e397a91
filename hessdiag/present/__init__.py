"""Results for the eye: plots, tables, the page. Takes results, computes only what drawing needs.

Nothing heavy is imported before something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hessdiag.present.tables import brief, line, terminal_table
from hessdiag.present.vector import png, svg
from hessdiag.present.words import reading
from hessdiag.results import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Plots", "brief", "line", "notebook", "page", "png", "reading", "svg", "terminal_table", "watched"]


class Plots:
    """``analysis.plot``: every method takes ``ax=``, returns the axes and opens no window.

    A notebook shows the axes that it is given back.

    The data behind each picture are in `hessdiag.present.density.density_frame` and others like it.
    """

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis

    def density(self, ax: Axes | None = None, **options: Any) -> Axes:
        """The smoothed spectrum; see `hessdiag.present.density.density`."""
        return self._draw("density", ax, options)

    def apart(self, **options: Any) -> Figure:
        """Bulk and outliers in two panels, on linear axes; see `hessdiag.present.apart.apart`."""
        figure: Figure = import_module("hessdiag.present.apart").apart(self._analysis, **options)
        figure._repr_svg_ = partial(svg, figure, title="bulk and outliers")  # type: ignore[attr-defined]
        return figure

    def cumulative(self, ax: Axes | None = None, **options: Any) -> Axes:
        """The raw staircase; see `hessdiag.present.cumulative.cumulative`."""
        return self._draw("cumulative", ax, options)

    def convergence(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Extremes over steps or trace over probes; see `hessdiag.present.convergence.convergence`."""
        return self._draw("convergence", ax, options)

    def layers(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Trace per parameter of each tensor; see `hessdiag.present.layers.layers`."""
        return self._draw("layers", ax, options)

    def _draw(self, name: str, ax: Axes | None, options: dict[str, Any]) -> Axes:
        axes: Axes = getattr(import_module(f"hessdiag.present.{name}"), name)(self._analysis, ax, **options)
        if ax is None:  # a notebook shows what can draw itself; pyplot would, and keep every figure
            axes._repr_svg_ = partial(svg, axes, title=name)  # type: ignore[attr-defined]
        return axes


def page(analyses: Mapping[str, Analysis], command: str = "") -> str:
    """One self-contained HTML document; see `hessdiag.present.report.page`."""
    return str(import_module("hessdiag.present.report").page(analyses, command))


def watched() -> Any:
    """For a measurement to show what it knows by then; see `hessdiag.present.watching.watched`."""
    return import_module("hessdiag.present.watching").watched()


def notebook(analysis: Analysis) -> str:
    """An HTML fragment for notebooks; see `hessdiag.present.fragment.notebook`."""
    return str(import_module("hessdiag.present.fragment").notebook(analysis))
