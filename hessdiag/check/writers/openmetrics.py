"""The check as OpenMetrics text: values, limits and verdicts as series for Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from hessdiag.check.verdict import Report, Row, Verdict
from hessdiag.shown import visible

Sample = tuple[Mapping[str, str], float]


def openmetrics(report: Report) -> str:
    """Gauges of what was measured and allowed, the verdicts as a state set; ends with ``# EOF``.

    Values are labelled by metric, scope and bound (value, lo or hi), limits and verdicts by budget, metric, scope
    and kind of limit. A limit of "15%" is 0.15.
    """
    families: tuple[tuple[str, str, str, Iterable[Sample]], ...] = (
        ("value", "gauge", "Metric as measured, with the ends of its interval", _values(report)),
        ("change", "gauge", "Change since the baseline that a limit is about", _changes(report)),
        ("limit", "gauge", "What a budget allows", _limits(report)),
        ("verdict", "stateset", "What the interval says of the limit", _verdicts(report)),
        ("exit_code", "gauge", "0 passed, 1 failed, 3 no verdict", [({}, float(report.exit_code))]),
        ("products", "gauge", "Hessian-vector products spent", [({}, float(report.cost))]),
    )
    lines = []
    for name, kind, said, samples in families:
        lines += [f"# TYPE hessdiag_{name} {kind}", f"# HELP hessdiag_{name} {said}"]
        distinct = {_labels(labels): value for labels, value in samples}
        lines += [f"hessdiag_{name}{labels} {_number(value)}" for labels, value in distinct.items()]
    return "\n".join([*lines, "# EOF"]) + "\n"


def escape_label(text: str) -> str:
    """``text`` inside the quotes of a label's value."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _values(report: Report) -> Iterator[Sample]:
    for row in report.rows:
        if row.measured is not None:
            labels = {"metric": row.metric, "scope": row.scope}
            for bound in ("value", "lo", "hi"):
                yield {**labels, "bound": bound}, getattr(row.measured, bound)


def _changes(report: Report) -> Iterator[Sample]:
    for row in report.rows:
        if row.tested is not None and row.baseline is not None:
            for bound in ("value", "lo", "hi"):
                yield {**_of(row), "bound": bound}, getattr(row.tested, bound)


def _limits(report: Report) -> Iterator[Sample]:
    for row in report.rows:
        yield {**_of(row), "relative": str(row.relative).lower(), "level": row.level}, row.threshold


def _verdicts(report: Report) -> Iterator[Sample]:
    for row in report.rows:
        for verdict in Verdict:
            yield {**_of(row), "hessdiag_verdict": verdict.value}, float(row.verdict is verdict)


def _of(row: Row) -> dict[str, str]:
    return {"budget": row.budget, "metric": row.metric, "scope": row.scope, "kind": row.limit_kind}


def _labels(labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{name}="{escape_label(visible(value))}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
