"""Promise: on linear axes every outlier is shown, the bulk beside them, and nothing that is not resolved. (10 s)

Oracles: the eigenvalues themselves, a Gaussian sum written here, the text of the labels; artists are read.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from hessdiag.errors import UsageError
from hessdiag.present import apart as drawing
from hessdiag.present import bulk as numbers
from hessdiag.present import svg
from hessdiag.present.apart import apart, apart_caption, apart_frame, outliers
from hessdiag.present.bulk import MOST_ROWS, bulk_of
from hessdiag.results import Analysis, Quadrature, Spectrum
from tests import example_analysis as example

OWN = example.build_own()
TEN = example.build_analysis()
FLIPPED = example.build_own(sign=-1.0)


def with_id(ax, gid):
    return [artist for artist in ax.get_children() if artist.get_gid() == gid]


def faithful(analysis: Analysis, figure=None) -> None:
    """The figure shows the spectrum it was given."""
    spectrum = analysis.spectrum
    left, right = (figure or apart(analysis)).axes
    (dots,) = with_id(right, "outliers")
    assert sorted(dots.get_xdata(), reverse=True) == list(spectrum.outliers)
    assert list(dots.get_ydata()) == list(range(len(spectrum.outliers)))
    said = [float(text.get_text().replace("−", "-")) for text in with_id(right, "value")]
    assert said == [pytest.approx(value, rel=0.051) for value in spectrum.outliers]
    (line,) = with_id(left, "bulk")
    x, y = line.get_data()
    frame = apart_frame(analysis)
    expected = sum_of_kernels(spectrum, x, frame.attrs["sigma"]) * spectrum.dimension * frame.attrs["unit"]
    there = np.isfinite(y)
    assert there.any() and np.allclose(y[there], expected[there], rtol=1e-9)
    assert not there[np.abs(x) < spectrum.unresolved].any()
    zones = [patch.get_path().get_extents(patch.get_patch_transform()).x1 for patch in with_id(left, "unresolved")]
    assert zones == [spectrum.unresolved] * bool(spectrum.unresolved)
    if spectrum.unresolved:
        (label,) = with_id(left, "unresolved label")
        held = spectrum.mass(-spectrum.unresolved, spectrum.unresolved)
        assert f"{100 * held:.0f}% of eigenvalues" in label.get_text()


def sum_of_kernels(spectrum: Spectrum, x: np.ndarray, sigma: float) -> np.ndarray:
    total = np.zeros_like(x)
    for node, weight in spectrum.merged():
        if node not in spectrum.outliers:
            total += weight * np.exp(-0.5 * ((x - node) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    return total


@pytest.mark.parametrize("analysis", [OWN, TEN, FLIPPED], ids=["one start", "ten probes", "negative"])
def test_the_figure_shows_the_spectrum(analysis):
    faithful(analysis)


def changed(analysis: Analysis, **parts) -> Analysis:
    return dataclasses.replace(analysis, spectrum=dataclasses.replace(analysis.spectrum, **parts))


BREAKAGES = {
    "an outlier forgotten": lambda: changed(OWN, outliers=OWN.spectrum.outliers[1:]),
    "an outlier elsewhere": lambda: changed(OWN, outliers=(9.0, *OWN.spectrum.outliers[1:])),
    "the zone too narrow": lambda: changed(OWN, unresolved=OWN.spectrum.unresolved / 2),
    "the zone forgotten": lambda: changed(OWN, unresolved=0.0),
    "another dimension": lambda: changed(OWN, dimension=241),
    "weights of another run": lambda: changed(OWN, probes=TEN.spectrum.probes[:1]),
}


@pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES)
def test_this_promise_would_notice(breakage):
    with pytest.raises(AssertionError):
        faithful(OWN, apart(breakage()))


def counts_are_those_of_the_eigenvalues() -> None:
    """Against the eigenvalues: how many the panel shows, and how many lie beyond it."""
    values = example.eigenvalues()
    drawn, spectrum = bulk_of(TEN.spectrum), TEN.spectrum
    rest = values[: -len(spectrum.outliers)]  # ten stand out, all of them positive
    width = drawn.eigenvalues[1] - drawn.eigenvalues[0]
    shown = float(np.nansum(drawn.counts)) * width / drawn.unit
    inside = int(((rest >= drawn.eigenvalues[0]) & (rest <= drawn.eigenvalues[-1])).sum())
    # ten probes know a share of 2,400 eigenvalues to some percent
    assert shown == pytest.approx(inside, rel=0.03)
    assert drawn.beyond == pytest.approx(len(rest) - inside, abs=0.005 * len(rest))


def test_counts_are_those_of_the_eigenvalues():
    counts_are_those_of_the_eigenvalues()


def test_outliers_counted_twice_would_be_noticed(monkeypatch):
    monkeypatch.setattr(numbers, "_without", lambda known, _: known)
    monkeypatch.setattr(numbers, "_window", lambda _: (-0.1, 3.0))
    with pytest.raises(AssertionError):
        counts_are_those_of_the_eigenvalues()


def test_a_lone_eigenvalue_peaks_near_one():
    """A unit is 1, 2 or 5 times a power of ten: at most 1.6 off the kernel's own width."""
    rule = Quadrature(nodes=(0.0, 0.5, 1.0), weights=(0.98, 0.01, 0.01))
    spectrum = Spectrum(known=Quadrature(nodes=(), weights=()), probes=(rule,), dimension=100, steps=3)
    drawn = bulk_of(spectrum)
    peak = np.nanmax(drawn.counts[np.abs(drawn.eigenvalues - 0.5) < drawn.sigma])
    assert 1 / 1.6 < peak < 1.6
    assert drawn.unit in {a * 10.0**k for a in (1, 2, 5) for k in range(-6, 6)}


SPREAD = (1e-4, 1e-3, 1e-2, 0.05)  # zones, of the largest |λ|


@pytest.mark.parametrize("zone", SPREAD)
@pytest.mark.parametrize("analysis", [OWN, FLIPPED], ids=["positive", "negative"])
def test_texts_stand_apart(analysis, zone):
    largest = max(abs(node) for node, _ in analysis.spectrum.merged())
    figure = apart(changed(analysis, unresolved=zone * largest), show_caption=False)
    texts_stand_apart(figure)


def texts_stand_apart(figure) -> None:
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    for ax in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
        for line in with_id(ax, "bulk"):
            places = ax.transData.transform(line.get_xydata()[np.isfinite(line.get_ydata())])
            assert not any(box.contains(*place) for place in places for box in boxes)
        for dots in with_id(ax, "outliers"):
            places = ax.transData.transform(dots.get_xydata())
            assert not any(box.contains(*place) for place in places for box in boxes)


def test_labels_on_the_curve_would_be_noticed(monkeypatch):
    monkeypatch.setattr(drawing, "log_axis", lambda ax, lo, hi: ax.set(yscale="log", ylim=(lo, hi**0.75)))
    with pytest.raises(AssertionError):
        texts_stand_apart(apart(OWN, show_caption=False))


def test_of_many_outliers_the_furthest_have_a_row():
    values = np.concatenate([np.geomspace(50, 1, 30), -np.geomspace(40, 1, 5)])
    many = changed(OWN, outliers=tuple(sorted(values.tolist(), reverse=True)))
    ax = outliers(many)
    (dots,) = with_id(ax, "outliers")
    assert sorted(np.abs(dots.get_xdata())) == pytest.approx(sorted(np.abs(values))[-MOST_ROWS:])
    assert "35 outliers, the 20 furthest out" in [text.get_text() for text in ax.texts]


def test_hard_cases_are_drawn():
    for analysis in (example.all_zero(), example.build_analysis(example.ODD, probes=1, sign=-1.0)):
        drawn = svg(apart(analysis))
        assert drawn.startswith("<svg") and "nan" not in drawn
    assert len(apart(example.all_zero()).axes) == 1  # no outliers: no panel of them
    with pytest.raises(UsageError, match="`quantities`"):
        apart(example.without(OWN, "spectrum"))


def test_the_caption_says_what_is_not_known():
    text = apart_caption(OWN)
    for said in (
        "2,410 parameters",
        "Hatched: signs are not resolved",
        "not resolved: [6, 81]%",
        "beyond the panel",
    ):
        assert said in text
    assert "29.6% [28.3, 30.8]%" in apart_caption(TEN)
    assert OWN.plot.apart()._repr_svg_().startswith("<svg")
