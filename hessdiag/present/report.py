"""The report: one HTML file that needs no script, no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hessdiag.errors import UsageError
from hessdiag.formatting import format_metric
from hessdiag.pages import meanings, pages
from hessdiag.present.apart import apart, apart_caption, apart_frame
from hessdiag.present.convergence import convergence, convergence_caption, convergence_frame
from hessdiag.present.cumulative import cumulative, cumulative_caption, cumulative_frame
from hessdiag.present.density import density, density_caption, density_frame
from hessdiag.present.inputs import MOST_OVERLAID
from hessdiag.present.layers import layers, layers_caption, layers_frame
from hessdiag.present.pictures import Picture, data_address, picture, rendered
from hessdiag.present.reproduce import reproduce
from hessdiag.present.tables import COLUMNS, companion_rows, metric_rows
from hessdiag.present.words import CAVEAT, data_in_words, label, reading
from hessdiag.results import Analysis
from hessdiag.shown import csv_text, plain

MOST_ANALYSES = 12  # keeps the page below two megabytes
MOST_LINEAR = 8  # analyses whose density is drawn on a linear axis too: for the same reason
HEADLINES = ("lambda_max", "trace", "negative_mass", "ws_upper")


@dataclass(frozen=True, slots=True)
class Run:
    """One analysis as the template wants it: text only."""

    key: str
    name: str
    headlines: list[dict[str, str]]
    rows: list[tuple[str, ...]]
    further: list[tuple[str, ...]]  # bounds that nobody asked for
    reading: list[str]
    notes: list[str]
    warnings: list[str]
    density: list[tuple[str, Picture]]  # the same on a linear and on a logarithmic axis
    spectrum: list[Picture]
    layers: list[Picture]
    convergence: list[Picture]
    facts: list[tuple[str, list[tuple[str, str]]]]
    csv: str  # data: address of the metrics


def page(analyses: Mapping[str, Analysis], command: str = "") -> str:
    """The whole report as HTML text.

    Args:
        analyses: names to analyses, at most twelve.
        command: what was typed to make this, shown under Reproduce.

    Returns:
        A complete document, below two megabytes, the same bytes for the same analyses.

    Raises:
        UsageError: none, or more than twelve analyses.
    """
    if not 1 <= len(analyses) <= MOST_ANALYSES:
        msg = f"{len(analyses)} analyses on one page: it must be 1 to {MOST_ANALYSES}; write several pages"
        raise UsageError(msg)
    linear = len(analyses) <= MOST_LINEAR
    named = enumerate(analyses.items(), 1)
    runs = [_run(f"run{number}", name, analysis, linear=linear) for number, (name, analysis) in named]
    quantities = list(dict.fromkeys(name for analysis in analyses.values() for name in analysis.metrics))
    names = [run.name for run in runs]
    title = names[0] if len(names) == 1 else f"{len(names)} analyses"
    return rendered(
        "hessdiag.present",
        "run.html.j2",
        title=title,
        runs=runs,
        columns=COLUMNS,
        comparison=_comparison(analyses, quantities) if len(analyses) > 1 else [],
        overlay=_overlay(analyses),
        caveat=CAVEAT,
        command=plain(command),
        has={
            part: any(getattr(run, part) for run in runs)
            for part in ("spectrum", "layers", "convergence", "warnings")
        },
        warned=sum(len(run.warnings) for run in runs),
        meanings=meanings(_terms(analyses, quantities)),
    )


def _terms(analyses: Mapping[str, Analysis], quantities: list[str]) -> list[str]:
    """What the page names: quantities, pictures and how sure all of it is."""
    if not quantities:
        return []
    further = ["ws_bounds"] * any(analysis.other_bounds for analysis in analyses.values())
    further += ["density"] * any(analysis.spectrum is not None for analysis in analyses.values())
    further += ["layers"] * any(analysis.layers for analysis in analyses.values())
    return [*quantities, *further, "intervals", "certificate", "flatter_is_not_better"]


def _short(name: str) -> str:
    """A term in a line; empty where it has no page."""
    page = pages().get(name)
    return page.summary.rstrip(".") if page is not None else ""


def _run(key: str, name: str, analysis: Analysis, *, linear: bool) -> Run:
    spectrum, settled = [], []
    if analysis.spectrum is not None:
        spectrum = [
            picture(
                cumulative(analysis, show_caption=False),
                cumulative_caption(analysis),
                cumulative_frame(analysis),
                f"{key}-cumulative",
                "spectrum.csv",
            ),
        ]
    for of in _histories(analysis):
        drawn = convergence(analysis, of=of, show_caption=False)
        frame, text = convergence_frame(analysis, of=of), convergence_caption(analysis, of=of)
        settled.append(picture(drawn, text, frame, f"{key}-{of}", "run.json"))
    bars = []
    if analysis.layers:
        frame = layers_frame(analysis)[["name", "size", "trace", "lo", "hi", "kind"]]
        drawn = layers(analysis, show_caption=False)
        bars = [picture(drawn, layers_caption(analysis), frame, f"{key}-layers", "layers.csv")]
    return Run(
        key=key,
        name=label(name, analysis),
        headlines=_headlines(analysis),
        rows=[tuple(map(plain, row)) for row in metric_rows(analysis)],
        further=[tuple(map(plain, row)) for row in companion_rows(analysis)],
        reading=reading(analysis)[:-1],
        notes=[plain(note) for note in analysis.notes],
        warnings=[plain(warning) for warning in analysis.warnings],
        density=_density(key, analysis, linear=linear) if spectrum else [],
        spectrum=spectrum,
        layers=bars,
        convergence=settled,
        facts=reproduce(analysis),
        csv=data_address(csv_text(analysis.to_frame())),
    )


def _density(key: str, analysis: Analysis, *, linear: bool) -> list[tuple[str, Picture]]:
    columns = _columns(analysis, ("eigenvalue", "mean", "lo", "hi"))
    logarithmic = picture(
        density(analysis, show_caption=False),
        density_caption(analysis),
        density_frame(analysis)[columns],
        f"{key}-density",
        "spectrum.csv",
    )
    told = [("logarithmic", logarithmic)]
    if linear:
        drawn, frame = apart(analysis, show_caption=False).axes[0], apart_frame(analysis)
        text, name = apart_caption(analysis), "Bulk and outliers"
        first = picture(drawn, text, frame, f"{key}-apart", "spectrum.csv", name)
        told.insert(0, ("linear: bulk and outliers", first))
    return told


def _histories(analysis: Analysis) -> list[Any]:
    history = analysis.convergence
    extremes = history.steps and (history.ritz_max or history.ritz_min)
    return ["extremes"] * bool(extremes) + ["trace"] * bool(history.trace_mean)


def _columns(analysis: Analysis, names: tuple[str, ...]) -> list[str]:
    single = analysis.spectrum is not None and len(analysis.spectrum.probes) < 2
    return [name for name in names if not (single and name in ("lo", "hi"))]


def _overlay(analyses: Mapping[str, Analysis]) -> Picture | None:
    """All spectra in one picture, where there are several, the first eight."""
    shown = {
        label(name, analysis): analysis for name, analysis in analyses.items() if analysis.spectrum is not None
    }
    if len(shown) < 2:
        return None
    shown = dict(list(shown.items())[:MOST_OVERLAID])
    frame = density_frame(shown)
    frame = frame.pivot_table("mean", "eigenvalue", "series", sort=False).reset_index()
    drawn = density(shown, show_caption=False)
    return picture(drawn, density_caption(shown), frame, "overlay", "spectrum.csv", "Spectra of all analyses")


def _headlines(analysis: Analysis) -> list[dict[str, str]]:
    known = [name for name, metric in analysis.metrics.items() if metric.resolved]
    shown = [name for name in HEADLINES if name in known] or known[:4]
    out = []
    for name in shown:
        value, interval = format_metric(analysis.metrics[name])
        data = data_in_words(analysis.metrics[name]) if analysis.metrics[name].data else ""
        card = {"name": name, "meaning": _short(name), "value": value, "interval": interval}
        out.append(card | {"data": data})
    return out


def _comparison(
    analyses: Mapping[str, Analysis], quantities: list[str]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """A row per quantity, a cell of value and interval per analysis: few analyses fit without scrolling."""
    return [
        (
            quantity,
            [
                format_metric(analysis.metrics[quantity]) if quantity in analysis.metrics else ("—", "")
                for analysis in analyses.values()
            ],
        )
        for quantity in quantities
    ]
