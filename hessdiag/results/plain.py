"""Results in the types of JSON, and as text."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def as_json(value: Any) -> Any:
    """A dataclass and what it holds in the types of JSON; NaN and infinity, which it has not, become None."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [as_json(item) for item in value]
    if isinstance(value, Iterator | set | frozenset):
        return [as_json(item) for item in sorted(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def json_text(value: Mapping[str, Any]) -> str:
    """One document: keys sorted, the same text for the same content."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
