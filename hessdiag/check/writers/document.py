"""The check as data: one JSON document with everything in it, and a flat file of numbers for ``dvc metrics``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from hessdiag.check.budgets import Claim, Level
from hessdiag.check.verdict import Interval, Report, Row
from hessdiag.results.plain import as_json

SCHEMA = 1
OVERALL = {0: "pass", 1: "fail"}


class IntervalDocument(TypedDict):
    """A value and its interval; null where it is not finite."""

    value: float | None
    lo: float | None
    hi: float | None
    method: str


class RowDocument(TypedDict):
    """One limit decided: the fields of `hessdiag.check.verdict.Row`, and what it does to the check."""

    name: str
    budget: str
    metric: str
    scope: str
    level: Level
    limit: str
    limit_kind: Literal["min", "max", "max_increase", "max_decrease"]
    threshold: float | None
    relative: bool
    verdict: Literal["pass", "fail", "cannot tell", "no verdict"]
    fails: bool
    undecided: bool
    measured: IntervalDocument | None
    baseline: float | None
    tested: IntervalDocument | None
    claim: Claim
    reason: str
    file: str | None
    line: int | None


class Document(TypedDict):
    """What ``hessdiag check`` found."""

    schema: Literal[1]
    verdict: Literal["pass", "fail", "no verdict"]
    exit_code: int
    headline: str
    strict: bool
    rows: list[RowDocument]
    problems: list[str]
    warnings: list[str]
    notes: list[str]
    checkpoint: str
    baseline: str
    cost: int
    environment: dict[str, Any]
    fingerprints: dict[str, Any]


def document(report: Report, fingerprints: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Everything a check found, as what `json.dumps` takes; described by `check_schema`.

    Args:
        report: what was found.
        fingerprints: by the label of their scope: what must agree before anything is compared.
    """
    found = {
        "schema": SCHEMA,
        "verdict": OVERALL.get(report.exit_code, "no verdict"),
        "exit_code": report.exit_code,
        "headline": report.headline,
        "strict": report.strict,
        "rows": [_row(report, row) for row in report.rows],
        "problems": report.problems,
        "warnings": report.warnings,
        "notes": report.notes,
        "checkpoint": report.checkpoint,
        "baseline": report.baseline,
        "cost": report.cost,
        "environment": report.environment,
        "fingerprints": fingerprints or {},
    }
    plain: dict[str, Any] = as_json(found)
    return plain


def json_text(report: Report) -> str:
    """The document of a report as text, UTF-8 at every character."""
    text = json.dumps(document(report), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    # a lone surrogate has no UTF-8: Python's escape for it is JSON's own
    return text.encode("utf-8", "backslashreplace").decode()


def metrics(report: Report) -> dict[str, float]:
    """What was measured, ``{"train/lambda_max": 80.1}``, for ``dvc metrics diff``: finite numbers only."""
    return {
        f"{row.scope}/{row.metric}": float(row.measured.value)
        for row in report.rows
        if row.measured is not None and math.isfinite(row.measured.value)
    }


def check_schema() -> dict[str, Any]:
    """The JSON Schema of the document."""
    return TypeAdapter(Document).json_schema()


def _row(report: Report, row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "budget": row.budget,
        "metric": row.metric,
        "scope": row.scope,
        "level": row.level,
        "limit": row.limit,
        "limit_kind": row.limit_kind,
        "threshold": row.threshold,
        "relative": row.relative,
        "verdict": row.verdict.value,
        "fails": report.fails(row),
        "undecided": report.undecided(row),
        "measured": _interval(row.measured),
        "baseline": row.baseline,
        "tested": _interval(row.tested),
        "claim": row.claim,
        "reason": row.reason,
        "file": row.file,
        "line": row.line,
    }


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {"value": interval.value, "lo": interval.lo, "hi": interval.hi, "method": interval.method}
