"""The text of a baseline: JSON, sorted, one field per line, the same bytes however often it is written.

A diff shows what changed, and `DIGITS` significant digits keep out what was not measured.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hessdiag.check.recorded import DIGITS, Entry, Recorded
from hessdiag.errors import NonFiniteError
from hessdiag.installed import version

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMA = 1
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From a schema to the next: each takes the file's content and gives it in the form one later."""
LARGEST = sys.float_info.max
LARGEST_ROUNDED = 1.797693134e308  # the next one with 10 digits is infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What was recorded, and by what.

    Attributes:
        entries: by label of the scope, ``train`` or ``train@layer4.*``.
        tool: the hessdiag that wrote it.
        schema: of the file.
    """

    entries: Mapping[str, Entry]
    tool: str = field(default_factory=lambda: f"hessdiag {version()}")
    schema: int = SCHEMA


def sides(content: str) -> tuple[str, str] | None:
    """Both versions of a file that git could not merge, each whole; None where it holds no conflict."""
    ours, theirs, part, found = [], [], "both", False
    after = {("<<<<<<<", "both"): "ours", ("|||||||", "ours"): "base", ("=======", "ours"): "theirs"}
    after |= {("=======", "base"): "theirs", (">>>>>>>", "theirs"): "both"}
    for line in content.splitlines(keepends=True):
        if (line[:7], part) in after:
            part, found = after[line[:7], part], True
            continue
        ours += [line] if part in ("both", "ours") else []
        theirs += [line] if part in ("both", "theirs") else []
    return ("".join(ours), "".join(theirs)) if found and part == "both" else None


def agreed(content: str) -> Baseline | None:
    """What both sides of a merge conflict record alike; None where there is no conflict, or a side is damaged."""
    both = sides(content)
    try:
        one, other = map(parsed, both or ())
    except (ValueError, RecursionError):
        return None
    return Baseline(entries={k: v for k, v in one.entries.items() if other.entries.get(k) == v}, tool=one.tool)


class NewerSchemaError(ValueError):
    """A file of the future."""


def text(baseline: Baseline) -> str:
    """The baseline as its file holds it: the same for the same content, and for what was read back.

    Rounding keeps order, so an interval still holds its value.

    Raises:
        NonFiniteError: NaN or infinity, which no comparison can use.
    """
    content = {
        "schema": baseline.schema,
        "tool": baseline.tool,
        "entries": {
            label: asdict(entry) | {"fingerprint": dict(entry.fingerprint)}
            for label, entry in baseline.entries.items()
        },
    }
    if wrong := _not_finite(content):
        msg = f"{wrong}: a baseline holds finite numbers only; nothing is recorded"
        raise NonFiniteError(msg)
    # A lone surrogate, as in a reason typed in another encoding, is no character: UTF-8 has none.
    return (_laid_out(content) + "\n").encode("utf-8", "replace").decode()


def parsed(content: str) -> Baseline:
    """A baseline out of its file's text.

    Raises:
        NewerSchemaError: written by a later hessdiag.
        ValueError: what is wrong with it and where, as a clause of an error message.
    """
    from pydantic import ValidationError

    if conflict := re.search(r"^<{7}", content, re.MULTILINE):
        line = content.count("\n", 0, conflict.start()) + 1
        msg = f"an unresolved merge conflict at line {line}"
        raise ValueError(msg)
    current = _migrated(json.loads(content, object_pairs_hook=_without_repeats))
    if wrong := _not_finite(current):
        raise ValueError(wrong)
    try:
        baseline = _adapter().validate_json(json.dumps([current]))[0]
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"{_where(first['loc'][1:])}: {first['msg'].lower()} ({error.error_count()} faults)"
        raise ValueError(msg) from error
    for label, entry in baseline.entries.items():
        for name, recorded in entry.metrics.items():
            if wrong := _contradiction(recorded):
                msg = f"{_where(('entries', label, 'metrics', name))}: {wrong}"
                raise ValueError(msg)
    return baseline


@functools.cache
def _adapter() -> TypeAdapter[list[Baseline]]:
    from pydantic import ConfigDict, TypeAdapter

    # pydantic takes a configuration for what holds dataclasses only, not for one itself
    return TypeAdapter(list[Baseline], config=ConfigDict(extra="forbid", strict=True))


def _migrated(content: Any) -> dict[str, Any]:
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or "entries" not in content:
        msg = "no baseline, its keys are schema, tool and entries"
        if isinstance(content, dict) and "metrics" in content:
            msg += " (this looks like a run.json)"
        raise ValueError(msg)
    if schema > SCHEMA:
        msg = f"schema {schema}"
        raise NewerSchemaError(msg)
    for step in range(schema, SCHEMA):
        if step not in MIGRATIONS:
            msg = f"schema {step} is unknown"
            raise ValueError(msg)
        try:
            content = MIGRATIONS[step](content) | {"schema": step + 1}
        except (LookupError, TypeError, AttributeError) as error:
            msg = f"not in the form of its schema {step} ({type(error).__name__}: {error})"
            raise ValueError(msg) from error
    return dict(content)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            msg = f"key {key!r} twice in one object"
            raise ValueError(msg)
        found[key] = value
    return found


def _contradiction(recorded: Recorded) -> str:
    """What cannot be true of a recorded metric; empty if nothing."""
    if not recorded.lo <= recorded.value <= recorded.hi:
        return f"value {recorded.value} lies outside [{recorded.lo}, {recorded.hi}]"
    if not 0 < recorded.confidence <= 1:
        return f"confidence {recorded.confidence}: it must be more than 0 and at most 1"
    if len(recorded.per_probe) == 1:
        return "per_probe has 1 value, at least 2 make an interval"
    blocks = {len(recorded.block_values), len(recorded.block_weights), len(recorded.block_examples)}
    if len(blocks) > 1:
        return f"block_values, block_weights and block_examples differ in length ({sorted(blocks)})"
    if min(recorded.block_weights, default=0) < 0 or min(recorded.block_examples, default=1) < 1:
        return "block_weights or block_examples below what a batch can have"
    return ""


def _not_finite(content: Any, path: tuple[str | int, ...] = ()) -> str:
    """Where a number is no finite one, with that number; empty if nowhere."""
    if isinstance(content, int | float):
        return "" if -LARGEST <= content <= LARGEST else f"{_where(path)} is no finite number"
    items: Iterator[tuple[str | int, Any]] = iter(())
    if isinstance(content, Mapping):
        items = iter(content.items())
    elif isinstance(content, list | tuple):
        items = iter(enumerate(content))
    return next((wrong for key, item in items if (wrong := _not_finite(item, (*path, key)))), "")


def _where(path: tuple[str | int, ...]) -> str:
    """A place in the file, ``entries.train.metrics.trace.per_probe[3]``."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in path]
    return "".join(steps).removeprefix(".")


def _laid_out(content: Any, indent: str = "") -> str:
    """JSON with one key per line, sorted; lists on one line, empty ones left out."""
    if not isinstance(content, Mapping):
        return json.dumps(_rounded(content), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
    inner = indent + "  "
    lines = [
        f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_laid_out(content[key], inner)}"
        for key in sorted(content)
        if content[key] not in ((), [])
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}" if lines else "{}"


def _rounded(content: Any) -> Any:
    if isinstance(content, list | tuple):
        return [_rounded(item) for item in content]
    return rounded(content) if isinstance(content, float) else content


def rounded(number: float) -> float:
    """A number as a baseline keeps it, with `DIGITS` significant digits."""
    near = float(f"{number:.{DIGITS - 1}e}")
    return near if math.isfinite(near) else math.copysign(LARGEST_ROUNDED, number)
