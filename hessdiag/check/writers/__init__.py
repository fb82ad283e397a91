"""A check's report in every format asked for: functions of the report alone, that measure and decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path

from hessdiag.check.verdict import Report
from hessdiag.check.writers.document import check_schema, document, json_text, metrics
from hessdiag.check.writers.github import workflow_commands
from hessdiag.check.writers.junit import junit
from hessdiag.check.writers.markdown import markdown
from hessdiag.check.writers.openmetrics import openmetrics
from hessdiag.check.writers.side_by_side import comparison
from hessdiag.check.writers.table import headline, table, terminal, text
from hessdiag.errors import UsageError, one_line

FORMATS: Mapping[str, Callable[[Report], str]] = {
    "text": text,
    "json": json_text,
    "junit": junit,
    "md": markdown,
    "github": workflow_commands,
    "openmetrics": openmetrics,
}
ON_STDOUT = ("text", "json", "github")  # these need no file; the others are for programs that read one

__all__ = [
    "FORMATS",
    "check_schema",
    "comparison",
    "document",
    "headline",
    "json_text",
    "junit",
    "markdown",
    "metrics",
    "openmetrics",
    "parse_output",
    "table",
    "terminal",
    "text",
    "workflow_commands",
]


def parse_output(given: str) -> tuple[str, Path | None]:
    """Format and file of ``-o FORMAT=FILE``; without a file it goes to stdout, as it does for ``FORMAT=-``.

    Raises:
        UsageError: no such format, or one that needs a file and has none.
    """
    name, equals, file = given.partition("=")
    shown = one_line(ValueError(given), 80)
    if name not in FORMATS:
        near = get_close_matches(name.lower(), FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"write FORMAT=FILE, with one of {', '.join(FORMATS)}"
        msg = f"-o {shown}: no format {one_line(ValueError(name), 40)!r}; {hint}"
        raise UsageError(msg)
    if (equals and not file) or (not equals and name not in ON_STDOUT):
        msg = f"-o {shown}: no file is named; write {name}=FILE, or {name}=- for stdout"
        raise UsageError(msg)
    return name, Path(file) if file not in ("", "-") else None
