"""``run.json`` read back, and its JSON Schema."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessdiag.errors import UsageError
from hessdiag.folders import complete
from hessdiag.results.analysis import SCHEMA, Analysis
from hessdiag.results.metrics import MEASURABLE, Bound, Estimate, Metric, RitzValue

RENAMED = (
    ("", "companions", "other_bounds"),
    ("self_test", "ways_agree", "methods_agree"),
    ("self_test", "slope", "gradient_error"),
    ("environment", "way", "method"),
    ("environment", "way_reason", "method_reason"),
)


def load_run(path: str | Path) -> Analysis:
    """Read a ``run.json`` back.

    Args:
        path: the file, or the folder it lies in.

    Raises:
        UsageError: no such file, not a run.json, or of a newer schema.

    >>> import hessdiag, tempfile, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(64, 5), torch.randint(3, (64,))
    >>> asked = {"quantities": ["lambda_max", "trace"]}
    >>> found = hessdiag.analyze(nn.Linear(5, 3), nn.CrossEntropyLoss(), (x, y), **asked)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = found.save(folder)
    ...     hessdiag.load_run(folder)["trace"].value == found["trace"].value
    True
    """
    file = Path(path)
    complete(file if file.is_dir() else file.parent)
    file = file / "run.json" if file.is_dir() else file
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise UsageError(_no_run(file, error)) from error
    return read_run(text, str(file))


def _no_run(file: str | Path, error: Exception) -> str:
    return f"{file} is not a run.json ({type(error).__name__}): give the folder that analyze -o wrote"


def read_run(text: str, file: str) -> Analysis:
    """The analysis that a ``run.json`` holds.

    Args:
        text: of the file.
        file: its name, for refusals.

    Raises:
        UsageError: it is no run.json, or of a newer schema.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        content = json.loads(text)
        schema = content.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(_no_run(file, error)) from error
    if schema != SCHEMA:
        msg = f"{file} has schema {schema}, this hessdiag reads {SCHEMA}: update hessdiag or measure again"
        raise UsageError(msg)
    _rename(content)
    history = content.get("convergence", {})
    for name, unknown in (("certificate_max", math.inf), ("certificate_min", -math.inf)):
        history[name] = [unknown if value is None else value for value in history.get(name, ())]
    found = content.get("metrics", {})
    order = sorted(found, key=lambda name: MEASURABLE.index(name) if name in MEASURABLE else len(MEASURABLE))
    content["metrics"] = {name: _metric_type(found[name]) for name in order}
    try:
        return TypeAdapter(Analysis).validate_python(content)
    except ValidationError as error:
        msg = f"{file} is not a valid run.json: {error.error_count()} faults, first {error.errors()[0]['loc']}"
        raise UsageError(msg) from error


def _rename(content: dict[str, Any]) -> None:
    """Names of earlier versions of the same schema become today's."""
    for part, former, today in RENAMED:
        held = (content.get(part) or {}) if part else content
        if former in held:
            held.setdefault(today, held.pop(former))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``run.json`` (all metric types)."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Analysis).json_schema()
    kinds = TypeAdapter(Estimate | RitzValue | Bound).json_schema()
    schema["$defs"] |= kinds.pop("$defs", {})
    schema["properties"]["metrics"] = {"type": "object", "additionalProperties": kinds}
    schema["properties"]["schema"] = {"const": SCHEMA}
    return schema


def _metric_type(entry: Mapping[str, Any]) -> Metric:
    from pydantic import TypeAdapter

    kinds: dict[str, type[Metric]] = {"ritz": RitzValue, "bound": Bound}
    return TypeAdapter(kinds.get(entry.get("kind", ""), Estimate)).validate_python(entry)
