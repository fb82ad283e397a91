"""What the numbers say, and what they do not, in plain language."""

from __future__ import annotations

from hessdiag.formatting import format_metric, format_number
from hessdiag.present.inputs import brief
from hessdiag.present.signs import negative_in_words
from hessdiag.results import Analysis, Bound, Estimate, Metric, RitzValue
from hessdiag.shown import plain

CAVEAT = "Flatter is not better: curvature changes with the scale of the weights, the network's function need not."
"""Dinh et al. (2017), arXiv 1703.04933; Andriushchenko et al. (2023), arXiv 2302.07011."""

WIDE = 0.1  # an interval reaching more than 10% to either side is called wide


def kind_in_words(metric: Metric) -> str:
    """How the number is known, and what its interval stands for."""
    sure = f"{100 * metric.confidence:.6g}%"
    if isinstance(metric, Bound):
        loose = "" if metric.looseness is None else f", {_looseness(metric.looseness)}"
        worth = "a guarantee up to rounding" if metric.exact_inputs else "from estimates, no guarantee"
        return f"{metric.side} bound on {metric.of}{loose}; {worth}"
    if isinstance(metric, RitzValue):
        checked = f"checked by a fresh product, residual {metric.residual:.0e}"
        if metric.lo == metric.hi:
            return checked
        return f"{checked}; exact up to rounding" if metric.confidence == 1 else f"{checked}; certified {sure}"
    if metric.kind == "bracket":
        if metric.confidence == 1:
            return "bracket: every eigenvalue known, up to rounding"
        chance = "probe error" if isinstance(metric, Estimate) and metric.per_probe else "chance of the start"
        return f"quadrature bracket and {chance}, {sure}"
    probes = len(metric.per_probe) if isinstance(metric, Estimate) else 0
    if metric.kind == "probes":
        return f"{sure} interval" + (f" over {probes} probes" if probes else " over probes")
    return "exact up to rounding"


def _looseness(ratio: float) -> str:
    """``1.55×``, or how far above where three digits cannot say it."""
    return f"{ratio - 1:.0e} above" if 1 < ratio < 1.005 else f"{ratio:.3g}×"


def data_in_words(metric: Metric) -> str:
    """The second error bar: what another sample set would do to the number; a dash where it is not known."""
    data = metric.data
    if data is None:
        return "—"
    half = (data.hi - data.lo) / 2
    if metric.quantity == "negative_mass":
        return f"± {format_number(100 * half, 0, 100 * half)}%"
    return f"± {format_number(half, 0, 2 * half)}"


def reading(analysis: Analysis) -> list[str]:
    """Sentences a newcomer can act on; the last one says what must not be concluded."""
    writers = (_sharpest, _preconditioned, _lowest, _spread, negative_in_words, _bounds, _population, _wide)
    sentences = [sentence for write in writers if (sentence := write(analysis))]
    if not sentences:
        sentences = ["Nothing here can be put into words: no quantity was measured."]
    return [*sentences, CAVEAT]


def _sharpest(analysis: Analysis) -> str:
    metric = analysis.metrics.get("lambda_max")
    if metric is None:
        return ""
    value, interval = brief(metric), format_metric(metric)[1]
    if metric.value <= 0:
        return f"No direction curves upwards: the largest eigenvalue is {value}, within {interval}."
    rate = format_number(2 / metric.value, 2 / metric.value * 0.99, 2 / metric.value * 1.01)
    return (
        f"Along the sharpest direction the loss curves by {value}, within {interval}; "
        f"plain gradient descent on these samples is stable along it only below a learning rate of {rate}."
    )


def _preconditioned(analysis: Analysis) -> str:
    metric = analysis.metrics.get("preconditioned_lambda_max")
    if not isinstance(metric, RitzValue):
        return ""
    said, share = metric.provenance.settings, metric.over_threshold
    text = f"As {said.get('optimizer')} sees it, the sharpest direction curves by {brief(metric)}"
    if share is None:
        return f"{text}; there is no threshold while the learning rate is 0."
    limit, formula = float(said["threshold"]), str(said.get("formula"))
    number = format_number(limit, limit * 0.999, limit * 1.001)
    threshold = formula if formula.partition(",")[0] == number else f"{formula} = {number}"
    beyond = ", beyond it" if share[1] > 1 else ""
    return (
        f"{text}, {format_number(*share)} of the threshold {threshold}{beyond}: above that its steps diverge on a "
        "quadratic, full batch and preconditioner held still."
    )


def _lowest(analysis: Analysis) -> str:
    metric = analysis.metrics.get("lambda_min")
    if metric is None or metric.lo >= 0:
        return ""
    if metric.hi >= 0:
        return "The smallest eigenvalue cannot be told from zero."
    return f"The loss curves downwards in at least one direction (λ_min = {brief(metric)}): not a minimum."


def _spread(analysis: Analysis) -> str:
    trace, rank = analysis.metrics.get("trace"), analysis.metrics.get("effective_rank")
    if trace is None:
        return ""
    value, interval = format_metric(trace)
    text = f"Summed over all directions the curvature is {value}, within {interval}"
    if rank is not None:
        text += f", carried by effectively {format_number(rank.value, rank.lo, rank.hi)} directions"
        if rank.hi < 1:
            text += " (below 1: positive and negative eigenvalues cancel in the trace)"
    return text + "."


def _bounds(analysis: Analysis) -> str:
    bounds = [metric for metric in analysis.metrics.values() if isinstance(metric, Bound)]
    estimated = [bound.quantity for bound in bounds if not bound.exact_inputs]
    if estimated:
        return f"No guarantee, because their inputs were estimated: {', '.join(dict.fromkeys(estimated))}."
    return (
        "The bounds are guarantees, and bounds only: they say where a value cannot be, not where it is."
        if bounds
        else ""
    )


def _population(analysis: Analysis) -> str:
    said = {name: data_in_words(metric) for name, metric in analysis.metrics.items() if metric.data is not None}
    if not analysis.metrics:
        return ""
    if not said:
        return "All of this is about these samples; how another sample set would move it was not measured."
    moved = ", ".join(f"{name} by {words}" for name, words in said.items())
    return f"Other samples from the same source would move {moved}."


def _wide(analysis: Analysis) -> str:
    wide = [
        name
        for name, m in analysis.metrics.items()
        if m.kind == "probes" and max(m.hi - m.value, m.value - m.lo) > WIDE * abs(m.value)
    ]
    return f"Still wide, more `probes` narrow it: {', '.join(wide)}." if wide else ""


def label(name: str, analysis: Analysis) -> str:
    """What to call an analysis: the name it was given, else its title."""
    return plain(name or analysis.title or "analysis")
