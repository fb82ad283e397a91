"""Promise: every plot, table and printed number shows the result it was given, and nothing else.

Oracles: closed-form Gaussians, the two-probe bootstrap (its band is [min, max]), `Spectrum.mass`, pixels of
matplotlib's own transform. Artists' data are read, not pixels of a rendered image.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colors
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import beta

from hessdiag.errors import UsageError
from hessdiag.formatting import format_ends, format_interval, format_metric, format_number
from hessdiag.present import Plots, notebook, png, reading, svg, terminal_table
from hessdiag.present.convergence import convergence, convergence_frame
from hessdiag.present.cumulative import cumulative, cumulative_caption, cumulative_frame
from hessdiag.present.density import density, density_caption, density_frame
from hessdiag.present.layers import layers, layers_frame
from hessdiag.present.words import kind_in_words
from hessdiag.results import Analysis, Quadrature, Spectrum
from hessdiag.track.page import evolution_frame
from hessdiag.track.plots import evolution
from hessdiag.track.trajectory import Point, Trajectory
from tests import example_analysis as example

ANALYSIS = example.build_analysis()


def with_id(ax, gid):
    return [artist for artist in ax.get_children() if artist.get_gid() == gid]


def written(ax):
    return "\n".join(text.get_text() for text in [*ax.texts, ax.title, ax._left_title])


def faithful(truth: Analysis, drawn: Analysis) -> bool:
    """Whether the plots of ``drawn`` show what ``truth`` holds."""
    return all(check(truth, drawn) for check in (_density, _cumulative, _convergence, _layers))


def _density(truth: Analysis, drawn: Analysis) -> bool:
    ax = density(drawn)
    spectrum = truth.spectrum
    (mean,) = with_id(ax, "mean")
    largest = max(abs(node) for node, _ in spectrum.merged())
    linthresh = max(spectrum.resolution, 1e-3 * largest, min(spectrum.unresolved, 0.1 * largest))
    sigma = density_frame(drawn).attrs["sigma"]
    x, y = mean.get_data()
    expected = np.zeros_like(x)
    for node, weight in spectrum.merged():
        distance = (decades(x, linthresh) - decades(np.array(node), linthresh)) / sigma
        expected += weight * np.exp(-0.5 * distance**2) / (sigma * math.sqrt(2 * math.pi))
    there = np.isfinite(y)
    (outliers,) = with_id(ax, "outliers")
    (largest,) = with_id(ax, "lambda_max")
    (centre,) = with_id(ax, "mean_eigenvalue")
    share = truth.metrics["negative_mass"].value
    return (
        # float64 sums of some hundred terms: 1e-9 is a thousand times their rounding
        np.allclose(y[there], expected[there], rtol=1e-9)
        and np.isclose(ax.xaxis.get_transform().linthresh, linthresh)
        and list(outliers.get_xdata()) == list(spectrum.outliers)
        and largest.get_xdata()[0] == truth.metrics["lambda_max"].value
        and np.isclose(centre.get_xdata()[0], truth.metrics["trace"].value / spectrum.dimension)
        and (f"{100 * share:.1f}%" in written(ax)) == truth.metrics["negative_mass"].resolved
        and hatched(ax) == [spectrum.unresolved] * bool(spectrum.unresolved)
    )


def hatched(ax):
    """Half widths of the zones that are marked, all of them about zero."""
    zones = [patch.get_path().get_extents(patch.get_patch_transform()) for patch in with_id(ax, "unresolved")]
    assert all(zone.x0 == -zone.x1 for zone in zones)
    return [zone.x1 for zone in zones]


def _cumulative(truth: Analysis, drawn: Analysis) -> bool:
    ax = cumulative(drawn)
    (stairs,) = with_id(ax, "share")
    x, y = stairs.get_data()
    if hatched(ax) != [truth.spectrum.unresolved] * bool(truth.spectrum.unresolved):
        return False
    floor = 0.5 / truth.spectrum.dimension
    # the first point is the riser's foot; every seventh corner keeps the oracle's quadratic cost low
    expected = [truth.spectrum.mass(-math.inf, at) for at in x[1::7]]
    return bool(np.allclose(y[1::7], np.clip(expected, floor, 1 - floor), atol=1e-12) and y[0] == floor)


def _convergence(truth: Analysis, drawn: Analysis) -> bool:
    lines = {line.get_label(): line.get_ydata() for line in convergence(drawn).lines}
    (mean,) = with_id(convergence(drawn, of="trace"), "mean")
    certificate = np.array(truth.convergence.certificate_max)
    return (
        np.array_equal(lines["Ritz value, λ_max"], truth.convergence.ritz_max)
        and np.array_equal(lines["Ritz value, λ_min"], truth.convergence.ritz_min)
        and np.array_equal(
            lines["certificate, λ_max"], np.where(np.isinf(certificate), np.nan, certificate), equal_nan=True
        )
        and np.array_equal(mean.get_ydata(), truth.convergence.trace_mean)
        and list(mean.get_xdata()) == list(range(2, 2 + len(truth.convergence.trace_mean)))
    )


def _layers(truth: Analysis, drawn: Analysis) -> bool:
    ax = layers(drawn)
    bars, whiskers = ax.containers
    widths = [layer.trace / layer.size for layer in truth.layers]
    ends = [(layer.lo / layer.size, layer.hi / layer.size) for layer in truth.layers]
    segments = [(s[0, 0], s[1, 0]) for s in whiskers.lines[2][0].get_segments()]
    names = [label.get_text() for label in ax.get_yticklabels()]
    return (
        np.allclose([bar.get_width() for bar in bars], widths)
        and np.allclose(segments, ends)
        and names == [layer.name for layer in truth.layers]
        and ax.yaxis_inverted()
    )


def decades(values, linthresh):
    """Axis units of a symlog axis, from its definition."""
    size = np.maximum(np.abs(values) / linthresh, 1e-300)
    return np.sign(values) * np.where(size <= 1, size / 0.9, 1 / 0.9 + np.log10(np.maximum(size, 1)))


def _spectrum(**changes):
    return dataclasses.replace(ANALYSIS, spectrum=dataclasses.replace(ANALYSIS.spectrum, **changes))


def _metric(name, **changes):
    changed = dataclasses.replace(ANALYSIS.metrics[name], **changes)
    return dataclasses.replace(ANALYSIS, metrics={**ANALYSIS.metrics, name: changed})


def _history(**changes):
    return dataclasses.replace(ANALYSIS, convergence=dataclasses.replace(ANALYSIS.convergence, **changes))


def _layer(**changes):
    first, *rest = ANALYSIS.layers
    return dataclasses.replace(ANALYSIS, layers=(dataclasses.replace(first, **changes), *rest))


EMPTY = Quadrature(nodes=(), weights=())
HISTORY, SPECTRUM = ANALYSIS.convergence, ANALYSIS.spectrum
OWN = example.build_own()
BROKEN = {
    "a zone of signs that are all resolved": lambda: _spectrum(unresolved=1e-3),
    "one probe forgotten": lambda: _spectrum(probes=SPECTRUM.probes[1:]),
    "the known part forgotten": lambda: _spectrum(known=EMPTY),
    "an outlier forgotten": lambda: _spectrum(outliers=SPECTRUM.outliers[1:]),
    "linear zone from the resolution alone": lambda: _spectrum(resolution=0.01),
    "λ_max at the end of its interval": lambda: _metric("lambda_max", value=ANALYSIS.metrics["lambda_max"].hi),
    "trace not divided by n": lambda: _spectrum(dimension=1),
    "another negative mass": lambda: _metric("negative_mass", value=ANALYSIS.metrics["negative_mass"].hi),
    "Ritz values one step late": lambda: _history(ritz_max=(HISTORY.ritz_max[0], *HISTORY.ritz_max[:-1])),
    "certificates swapped": lambda: _history(certificate_max=HISTORY.certificate_min),
    "trace history from the first probe": lambda: _history(
        trace_mean=HISTORY.trace_mean[1:], trace_half_width=HISTORY.trace_half_width[1:]
    ),
    "trace not per parameter": lambda: _layer(size=1),
    "one whisker one-sided": lambda: _layer(lo=ANALYSIS.layers[0].trace),
    "layers sorted": lambda: dataclasses.replace(ANALYSIS, layers=ANALYSIS.layers[::-1]),
}


def test_plots_keep_the_promise():
    assert faithful(ANALYSIS, ANALYSIS)
    assert faithful(OWN, OWN)


@pytest.mark.parametrize("width", [0.0, OWN.spectrum.unresolved / 2])
def test_a_zone_forgotten_or_too_narrow_would_be_noticed(width):
    drawn = dataclasses.replace(OWN, spectrum=dataclasses.replace(OWN.spectrum, unresolved=width))
    assert not faithful(OWN, drawn)


def marks_stand_apart(ax) -> None:
    """No text covers another, the legend or an outlier; the zone is named once, inside the axes."""
    renderer = ax.figure.canvas.get_renderer()
    ax.figure.draw(renderer)
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in ax.texts}
    boxes |= {"legend": ax.get_legend().get_window_extent(renderer)} if ax.get_legend() else {}
    assert sum("signs not resolved" in text for text in boxes) == 1
    for (one, first), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one, other)
    (name,) = (text for text in boxes if "signs not resolved" in text)
    assert ax.bbox.x0 <= boxes[name].x0 and boxes[name].x1 <= ax.bbox.x1
    for line in with_id(ax, "mean"):
        places = ax.transData.transform(line.get_xydata())
        assert not any(boxes[name].contains(*place) for place in places)
    for mark in with_id(ax, "outliers"):
        places = ax.transData.transform(mark.get_xydata())
        assert not any(boxes[name].contains(*place) for place in places)


ZONES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # of the largest |λ|


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("plot", [density, cumulative])
def test_the_zones_name_stands_apart_from_other_marks(plot, sign, zone):
    own = example.build_own(sign=sign)
    marks_stand_apart(plot(_with_zone(own, zone), show_caption=False))


def test_where_nothing_is_negative_the_zones_name_stands_apart_too():
    upright = lambda rule: dataclasses.replace(rule, nodes=tuple(map(abs, rule.nodes)))  # noqa: E731
    spectrum = OWN.spectrum
    rules = {"known": upright(spectrum.known), "probes": tuple(map(upright, spectrum.probes))}
    psd = dataclasses.replace(OWN, spectrum=dataclasses.replace(spectrum, **rules))
    for zone in (1e-4, 1e-3, 0.1):
        for plot in (density, cumulative):
            marks_stand_apart(plot(_with_zone(psd, zone), show_caption=False))


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("number", [2, 8])
def test_of_several_spectra_the_widest_zone_is_marked(number, zone):
    shown = {f"checkpoint {i}": _with_zone(example.build_own(), zone / (1 + i)) for i in range(number)}
    ax = density(shown, show_caption=False)
    assert hatched(ax) == [max(one.spectrum.unresolved for one in shown.values())]
    marks_stand_apart(ax)


def _with_zone(analysis: Analysis, share: float) -> Analysis:
    largest = analysis.spectrum.merged()[-1][0] if share else 0.0
    changed = dataclasses.replace(analysis.spectrum, unresolved=share * abs(largest) or 1e-3)
    return dataclasses.replace(analysis, spectrum=changed)


def test_a_name_on_other_marks_would_be_noticed(monkeypatch):
    beside = lambda ax, _x, _y, text, *_: ax.text(0.02, 0.93, text, transform=ax.transAxes)  # noqa: E731
    monkeypatch.setattr("hessdiag.present.signs._note", beside)
    with pytest.raises(AssertionError):
        marks_stand_apart(density(OWN, show_caption=False))


def the_stairs_of_one_start_have_the_band_of_its_law() -> None:
    """Ends are the shares for which the weight seen is the 5% or 95% quantile, by scipy's own Beta law."""
    frame, spectrum = cumulative_frame(OWN), OWN.spectrum
    count = spectrum.dimension - len(spectrum.known.nodes)
    left = count / spectrum.dimension
    for _, row in frame.iloc[5:-15:9].iterrows():
        known = sum(weight for node, weight in zip(spectrum.known.nodes, spectrum.known.weights, strict=True)
                    if node <= row["eigenvalue"])  # fmt: skip
        seen, low, high = ((row[name] - known) / left for name in ("share", "lo", "hi"))
        if row["lo"] > 2 * frame.attrs["floor"]:
            assert beta.sf(seen, low * count / 2, (1 - low) * count / 2) == pytest.approx(0.05, rel=1e-6)
        if row["hi"] < 1 - 2 * frame.attrs["floor"]:
            assert beta.cdf(seen, high * count / 2, (1 - high) * count / 2) == pytest.approx(0.05, rel=1e-6)
    width = (frame["hi"] - frame["lo"]).max()
    assert width == pytest.approx(
        2 * 1.645 * math.sqrt(2 * 0.25 / (count + 2)) * left, rel=0.1
    )  # its normal limit


def test_the_stairs_of_one_start_have_the_band_of_its_law():
    the_stairs_of_one_start_have_the_band_of_its_law()


def test_a_narrower_band_would_be_noticed(monkeypatch):
    monkeypatch.setattr("hessdiag.present.cumulative.TAIL", 0.1)
    with pytest.raises(AssertionError):
        the_stairs_of_one_start_have_the_band_of_its_law()


def test_captions_say_what_one_start_leaves_open():
    error = f"{100 * OWN.spectrum.error:.0f}% of the mean |λ|"
    for plot in (density, cumulative):
        text = " ".join(plot(OWN).texts[-1].get_text().split())
        for said in ("the run's own start, 40 steps", error, "an estimate", "Hatched: signs are not resolved"):
            assert said in text
        assert "probe" not in text
    assert "depth is not in it" in cumulative_caption(OWN)
    assert "Hatched" not in density_caption(ANALYSIS) and "own start" not in density_caption(ANALYSIS)
    both = density_caption({"one": OWN, "two": ANALYSIS})
    assert error in both and "Band: 90% bootstrap over probes" in both
    known = Spectrum(known=OWN.spectrum.known, probes=(EMPTY,), dimension=16, steps=16)
    assert "every eigenvalue" in density_caption(known) and "probe" not in density_caption(known)


def levels_are_those_of_each_checkpoint(trajectory: Trajectory) -> None:
    ax = evolution(trajectory).axes[0]
    zones = [point.analysis.spectrum.unresolved for point in trajectory.points]
    drawn = sorted(patch.get_data().values.tolist() for patch in ax.patches if patch.get_gid() == "unresolved")
    assert drawn == sorted([zones, [-zone for zone in zones]])
    assert "signs not resolved between" in [text.get_text() for text in ax.get_legend().get_texts()]
    shares = [name for name in evolution_frame(trajectory) if name.startswith("share")]
    ends = [abs(float(end)) for name in shares for end in re.findall(r"-?[0-9.]+(?:e-?[0-9]+)?", name)]
    assert min(ends) >= 0.99 * max(zones)  # no count from inside the zone of any checkpoint; two digits are shown


def test_along_training_every_zone_is_marked_and_no_count_begins_in_one():
    levels_are_those_of_each_checkpoint(_trajectory())
    resolved = Trajectory(points=tuple(Point(name=n, path=n, analysis=ANALYSIS) for n in "ab"))
    ax = evolution(resolved).axes[0]
    assert not [patch for patch in ax.patches if patch.get_gid() == "unresolved"]


def test_a_count_from_inside_the_zone_would_be_noticed(monkeypatch):
    monkeypatch.setattr("hessdiag.track.page.widest", lambda _: 0.0)
    monkeypatch.setattr("hessdiag.track.page.threshold", lambda *_: 1e-3)
    with pytest.raises(AssertionError):
        levels_are_those_of_each_checkpoint(_trajectory())


def _trajectory() -> Trajectory:
    wide = (0.3, 0.004, 0.02)  # of λ_max; the first is beyond what an axis is linear in
    points = [Point(name=f"epoch{i}", path="", analysis=_with_zone(OWN, zone)) for i, zone in enumerate(wide)]
    return Trajectory(points=tuple(points))


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert not faithful(ANALYSIS, breakage())


def test_a_lone_eigenvalue_is_a_gaussian_of_unit_mass_on_the_axis():
    spectrum = Spectrum(
        known=EMPTY, probes=(Quadrature(nodes=(0.5,), weights=(1.0,)),), dimension=10, steps=1, resolution=1e-3
    )
    frame = density_frame(spectrum, sigma=0.1)
    units = decades(frame["eigenvalue"].to_numpy(), 1e-3)
    # what lies below the floor, a hundredth of this peak, is 0.25% of a Gaussian's mass
    assert np.trapezoid(frame["mean"].fillna(0.0), units) == pytest.approx(1.0, abs=4e-3)
    assert frame["mean"].max() == pytest.approx(1 / (0.1 * math.sqrt(2 * math.pi)), rel=2e-2)
    assert "lo" not in frame  # one probe has no band


def test_the_grid_is_uniform_on_the_axis_it_is_drawn_on():
    ax = density(ANALYSIS)
    (mean,) = with_id(ax, "mean")
    pixels = ax.transData.transform(np.column_stack([mean.get_xdata(), np.ones(len(mean.get_xdata()))]))[:, 0]
    steps = np.diff(pixels)
    assert steps.min() > 0
    assert steps.max() / steps.min() == pytest.approx(1.0, abs=1e-6)
    assert ax.get_xscale() == "symlog"
    assert ax.get_yscale() == "log"


def curves_end_at_the_extremes() -> None:
    """The kernel spreads mass beyond λ_max and λ_min, where there is known to be none."""
    low, high = (ANALYSIS.metrics[name] for name in ("lambda_min", "lambda_max"))
    frame = density_frame(ANALYSIS)
    drawn = frame.set_index("eigenvalue").dropna(how="all", subset=["mean", "lo", "hi"]).index
    assert low.lo <= drawn.min() and drawn.max() <= high.hi
    assert frame["eigenvalue"].max() > high.hi  # the grid goes on
    unknown = {name: one for name, one in ANALYSIS.metrics.items() if not name.startswith("lambda")}
    free = density_frame(dataclasses.replace(ANALYSIS, metrics=unknown))
    assert free.dropna(subset=["mean"])["eigenvalue"].max() > high.hi
    inside = free["eigenvalue"].between(low.lo, high.hi)
    np.testing.assert_array_equal(frame["mean"][inside], free["mean"][inside])
    point = Spectrum(known=EMPTY, probes=SPECTRUM.probes, dimension=10, steps=1, resolution=1e-3)
    narrow = dataclasses.replace(low, value=0.0, lo=0.0, hi=0.0)
    alone = {"lambda_min": narrow, "lambda_max": dataclasses.replace(narrow, quantity="lambda_max")}
    assert density_frame(dataclasses.replace(ANALYSIS, spectrum=point, metrics=alone))["mean"].notna().any()


def test_curves_end_at_the_extremes():
    curves_end_at_the_extremes()


def test_a_curve_beyond_them_would_be_noticed(monkeypatch):
    everywhere = lambda _, eigenvalues: np.ones(len(eigenvalues), dtype=bool)  # noqa: E731
    monkeypatch.setattr("hessdiag.present.density.within", everywhere)
    with pytest.raises(AssertionError):
        curves_end_at_the_extremes()


def intervals_are_whole(width: int) -> None:
    """On a terminal of any width no interval, name or word is cut or broken over two lines."""
    out = io.StringIO()
    Console(file=out, width=width).print(terminal_table({"": ANALYSIS}, width))
    text = out.getvalue()
    for name, metric in ANALYSIS.metrics.items():
        assert name in text, (width, name)
        assert format_metric(metric)[1] in text, (width, format_metric(metric)[1])
        for word in kind_in_words(metric).split():
            assert word in text, (width, word)
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [40, 50, 60, 72, 80, 99, 100, 120, 200])
def test_intervals_are_whole(width):
    intervals_are_whole(width)


@pytest.mark.parametrize("width", [50, 72])
def test_a_broken_interval_would_be_noticed(width, monkeypatch):
    monkeypatch.setattr("hessdiag.present.tables.WIDE", 10)
    with pytest.raises(AssertionError):
        intervals_are_whole(width)


def test_two_probes_have_the_band_from_least_to_most():
    # a bootstrap of two draws one of them twice with probability 1/4 each, so its 5% and 95% points are they
    pair = dataclasses.replace(SPECTRUM, probes=SPECTRUM.probes[:2])
    frame = density_frame(pair)
    lines = frame[["probe_0", "probe_1"]].fillna(frame.attrs["floor"])
    np.testing.assert_allclose(frame["lo"], lines.min(axis=1), rtol=1e-12)
    np.testing.assert_allclose(frame["hi"], lines.max(axis=1), rtol=1e-12)
    assert (frame["hi"] > 1.01 * frame["lo"]).any()


def test_frames_are_what_is_drawn():
    ax, frame = density(ANALYSIS), density_frame(ANALYSIS)
    np.testing.assert_array_equal(with_id(ax, "mean")[0].get_ydata(), frame["mean"])
    for number, line in enumerate(with_id(ax, "probe")):
        np.testing.assert_array_equal(line.get_ydata(), frame[f"probe_{number}"])
    assert frame.attrs["floor"] == ax.get_ylim()[0]
    assert f"{frame.attrs['floor']:.1e}" in written(ax)
    stairs = with_id(cumulative(ANALYSIS), "share")[0]
    np.testing.assert_array_equal(stairs.get_xydata(), cumulative_frame(ANALYSIS)[["eigenvalue", "share"]])
    assert len(layers_frame(ANALYSIS)) == len(layers(ANALYSIS).containers[0])
    assert list(convergence_frame(ANALYSIS)["step"]) == list(HISTORY.steps)


def test_several_spectra_share_grid_and_are_told_apart_without_colour():
    shown = {name: example.build_analysis(sharpness=s) for name, s in (("a", 1.0), ("_b", 0.4), ("$c$", 3.0))}
    ax = density(shown)
    lines = with_id(ax, "mean")
    assert len({tuple(line.get_xdata()) for line in lines}) == 1
    assert len({line.get_linestyle() for line in lines}) == 3
    assert len({line.get_color() for line in lines}) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "_b", "$c$"]
    assert set(density_frame(shown)["series"]) == set(shown)


def test_the_caption_holds_what_is_needed_to_repeat_the_picture():
    text = " ".join(density(ANALYSIS).texts[-1].get_text().split())
    for fact in ("2,410 parameters", "10 probes", "40 steps", "1,024 samples", "float32", "hessian", "seed 0"):
        assert fact in text
    assert f"kernel of {density_frame(ANALYSIS).attrs['sigma']:.2g} decades" in text


@pytest.mark.parametrize("name", ["density", "cumulative", "convergence", "layers"])
def test_every_plot_draws_on_the_axes_given_and_leaves_no_global_state(name):
    given_axes = Figure().add_subplot()
    assert getattr(Plots(ANALYSIS), name)(ax=given_axes) is given_axes
    own = getattr(ANALYSIS.plot, name)()
    assert own.figure is not given_axes.figure
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


HARD = {
    "negative trace, one probe": example.build_analysis(example.ODD, probes=1, sign=-1.0, tensors=50),
    "all zero": example.all_zero(),
    "no settings known": example.without(ANALYSIS, "fingerprint", "metrics", "title"),
}


@pytest.mark.parametrize("analysis", HARD.values(), ids=HARD)
def test_hard_cases_are_drawn(analysis):
    for name in ("density", "cumulative", "convergence", "layers"):
        ax = getattr(analysis.plot, name)()
        drawing = svg(ax)
        assert drawing.startswith("<svg")
        assert not re.search(r"\b(nan|inf)\b", drawing)
    assert png(ax, dpi=40)[:4] == b"\x89PNG"


def test_names_are_shown_as_they_are():
    ax = density(example.build_analysis(example.ODD, probes=1))
    assert ax.get_title(loc="left") == example.ODD.replace("\x07", "\N{REPLACEMENT CHARACTER}")
    assert "<script>" not in svg(ax)


def test_more_tensors_than_fit_keep_the_largest_in_network_order():
    analysis = example.build_analysis(tensors=50)
    shown = list(layers_frame(analysis)["name"])
    largest = sorted(analysis.layers, key=lambda layer: -abs(layer.trace))[:40]
    assert shown == [layer.name for layer in analysis.layers if layer in largest]


REFUSED = {
    "spectrum": (lambda: density(example.without(ANALYSIS, "spectrum")), "`quantities`"),
    "nine": (lambda: density({str(i): ANALYSIS for i in range(9)}), "1 to 8"),
    "sigma": (lambda: density(ANALYSIS, sigma=0.0), "positive"),
    "layers": (lambda: layers(example.without(ANALYSIS, "layers")), "`quantities`"),
    "history": (lambda: convergence(example.without(ANALYSIS, "convergence"), of="trace"), "recorded: none"),
}


@pytest.mark.parametrize(("ask", "way_out"), REFUSED.values(), ids=REFUSED)
def test_what_was_not_measured_is_refused_with_the_way_out(ask, way_out):
    with pytest.raises(UsageError, match=way_out) as refusal:
        ask()
    assert "\n" not in str(refusal.value)


NUMBERS = [
    ((226.5766, 226.5760, 226.5801), "226.577", "[226.576, 226.581]"),
    ((20.394, 19.966, 20.823), "20.39", "[19.96, 20.83]"),
    ((2.0e-5, 1.9e-5, 2.2e-5), "2.00×10⁻⁵", "[1.90, 2.20]×10⁻⁵"),
    ((-0.02, -0.0213, -0.0199), "−0.02000", "[−0.02130, −0.01990]"),
    ((0.0, 0.0, 0.0), "0", "[0, 0]"),
    ((31.9179512345, 31.9179512345, 31.9179512345), "31.9180", "[31.9179, 31.9180]"),
    ((123456789.0, 1.2e8, 1.3e8), "1.235×10⁸", "[1.200, 1.300]×10⁸"),
    ((8570.173, 7670.173, 9470.173), "8,570", "[7,670, 9,480]"),
    ((0.009, 0.0089, 0.009099999999999999), "0.00900", "[0.00890, 0.00910]"),
]


@pytest.mark.parametrize(("numbers", "value", "interval"), NUMBERS)
def test_digits_are_those_the_interval_justifies(numbers, value, interval):
    assert format_number(*numbers) == value
    assert format_interval(*numbers) == interval
    # a check spells them otherwise, but to the same digits
    shown = [parsed(text.replace("e", "×10").replace("+", "")) for text in format_ends(*numbers)]
    assert shown == [[one] for one in (*parsed(value), *parsed(interval.replace(", ", " ")))]


def parsed(text):
    body, _, exponent = text.replace("−", "-").replace(",", "").partition("×10")
    power = int(exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)
    return [float(part) * 10.0**power for part in body.strip("[]").split()]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_printed_intervals_never_claim_more_than_the_result(value, half):
    lo, hi = value - half, value + half
    low, high = parsed(format_interval(value, lo, hi).replace(", ", " "))
    slack = 1e-12 * max(abs(lo), abs(hi))  # parsing back multiplies by a power of ten, which rounds
    assert low <= lo + slack
    assert high >= hi - slack


def test_the_table_holds_every_number_its_kind_and_the_caveats():
    texts = []
    for analyses in ({"[red]one": ANALYSIS}, {"[red]one": ANALYSIS, "two": example.all_zero()}):
        out = io.StringIO()
        Console(file=out, width=200).print(terminal_table(analyses))
        texts.append(out.getvalue())
    for text in texts:
        for name in ANALYSIS.metrics:
            assert name in text
        for shown in ("20.39", "[red]one", "[2.64000, 2.64040]"):
            assert shown in text
        assert text.count("Flatter is not better") == 1
    for shown in ("95% interval over 10 probes", "1.55×", "no guarantee", "± 0.60"):
        assert shown in texts[0]


def test_the_reading_says_what_is_not_a_guarantee():
    sentences = " ".join(reading(ANALYSIS))
    for said in ("[2.64000, 2.64040]", "not a minimum", "No guarantee", "ws_upper", "Flatter is not better"):
        assert said in sentences
    assert "not measured" in " ".join(reading(example.all_zero()))


def test_a_notebook_gets_numbers_and_density_in_its_own_colours():
    fragment = notebook(ANALYSIS)
    assert "20.39" in fragment
    assert "currentColor" in fragment
    assert "<script" not in fragment
    assert "<style" not in fragment
    assert "<svg" not in notebook(example.without(ANALYSIS, "spectrum"))
    assert ANALYSIS._repr_html_() == fragment


def test_one_svg_serves_light_and_dark():
    drawing = svg(density(ANALYSIS))
    painted = {colors.to_hex(value) for value in set(_hexes(drawing))}
    assert "currentColor" in drawing
    assert not painted & {"#000000", "#ffffff", "#010203"}


def _hexes(text):
    return re.findall(r"(?:fill|stroke): (#[0-9a-fA-F]{6})", text)


def test_importing_the_room_imports_nothing_heavy():
    code = (
        "import sys, hessdiag.present\n"
        "print(*{'matplotlib', 'pandas', 'jinja2', 'rich', 'scipy'} & set(sys.modules))"
    )
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy.stdout.strip() == ""
