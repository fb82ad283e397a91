"""What a plot was given, as named analyses; and the facts a caption repeats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hessdiag.errors import UsageError
from hessdiag.formatting import format_number, format_percent
from hessdiag.results import Analysis, Metric, Spectrum

Measured = Analysis | Spectrum
Source = Measured | Sequence[Measured] | Mapping[str, Measured]

MOST_OVERLAID = 8  # colours and line styles a reader can still tell apart


def spectra(source: Source) -> dict[str, tuple[Analysis, Spectrum]]:
    """Each analysis under its name, with its spectrum.

    Raises:
        UsageError: nothing to draw, no spectrum in one of them, or more than eight.
    """
    named = _named(source)
    if not 1 <= len(named) <= MOST_OVERLAID:
        msg = f"{len(named)} spectra in one plot: it must be 1 to {MOST_OVERLAID}; draw several plots"
        raise UsageError(msg)
    out = {}
    for name, measured in named.items():
        analysis = Analysis(metrics={}, spectrum=measured) if isinstance(measured, Spectrum) else measured
        if analysis.spectrum is None:
            msg = f"{name or 'this analysis'} has no spectrum to draw: measure it with 'density' in `quantities`"
            raise UsageError(msg)
        out[name] = (analysis, analysis.spectrum)
    return out


def _named(source: Source) -> dict[str, Measured]:
    if isinstance(source, Mapping):
        return dict(source)
    if isinstance(source, Analysis | Spectrum):
        return {getattr(source, "title", ""): source}
    titles = [getattr(measured, "title", "") or "run" for measured in source]
    return {
        title if titles.count(title) == 1 else f"{title} ({number})": measured
        for number, (title, measured) in enumerate(zip(titles, source, strict=True), 1)
    }


def facts(analysis: Analysis) -> list[str]:
    """What is needed to repeat the measurement, as short phrases; what is not known is left out."""
    made = analysis.fingerprint
    measured = [metric.provenance.dtype for metric in analysis.metrics.values() if metric.provenance.dtype]
    dtype = made.dtype or next(iter(measured), None)
    said = []
    if isinstance(made.samples, int):  # a run.json may have been edited
        said.append(f"{made.samples:,} samples" + (f" ({made.split})" if made.split else ""))
    said += [str(text) for text in (made.operator, made.loss, dtype) if text]
    if made.seed is not None:
        said.append(f"seed {made.seed}")
    return said


def sweep(spectrum: Spectrum) -> str:
    """``2,410 parameters · the run's own start, 80 steps``, or ``10 probes of 80 steps``."""
    probes = len(spectrum.probes)
    steps = f"{spectrum.steps} step{'s' * (spectrum.steps != 1)}"
    seen = f"{probes} probe{'s' * (probes != 1)} of {steps}"
    if spectrum.whole:
        seen = "every eigenvalue"
    elif spectrum.error is not None:
        seen = f"the run's own start, {steps}"
    return f"{spectrum.dimension:,} parameters · {seen}"


def left_open(drawn: Sequence[Spectrum], banded: str) -> str:
    """What is not known of each spectrum drawn, in sentences.

    Args:
        drawn: the spectra.
        banded: what the band of several probes is.
    """
    said = []
    errors = [spectrum.error for spectrum in drawn if spectrum.error is not None]
    if errors:
        low, high = (format_percent(end, 0.0, 2 * end)[0] for end in (min(errors), max(errors)))
        size = low if low == high else f"{low} to {high}"
        said.append(
            f"One start{' each' * (len(errors) > 1)}, uniform on the sphere: what chance and depth leave is "
            f"{size} of the mean |λ|, an estimate of the area to the true cumulative density."
        )
    others = [spectrum for spectrum in drawn if spectrum.error is None and not spectrum.whole]
    if any(len(spectrum.probes) > 1 for spectrum in others):
        said.append(f"Band: {banded}.")
    elif others:
        said.append("One probe: no band can be given.")
    return " ".join(said or ["Every eigenvalue is known: there is no band."])


def widest(drawn: Iterable[Spectrum]) -> float:
    """The |λ| below which signs are not resolved in some of these; 0 for none."""
    return max((spectrum.unresolved for spectrum in drawn), default=0.0)


def threshold(*measured: Spectrum) -> float:
    """Where the symlog axis turns linear: a thousandth of the largest |λ|, or below that what is not resolved.

    Rounding hides what is smaller than the resolution, and the run what is smaller than `Spectrum.unresolved`:
    decades in there would show single nodes as if they were eigenvalues. A decade is always left.
    """
    largest = max((abs(node) for spectrum in measured for node, _ in spectrum.merged()), default=0.0)
    rounding = max(spectrum.resolution for spectrum in measured)
    hidden = max(rounding, 1e-3 * largest, min(widest(measured), 0.1 * largest))
    return hidden or 1.0  # an all-zero spectrum has no scale of its own


def brief(metric: Metric) -> str:
    """The value alone, to the digits its interval justifies."""
    return format_number(metric.value, metric.lo, metric.hi)
