"""Which line of a TOML file a key stands in: tomllib gives values only, a refusal should point at the line.

The text is cut into statements, headers ``[a.b]`` and ``key = value`` over one line or several, and tomllib itself
reads each: whatever it takes as one is one, whichever quotes, comments and brackets it holds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

Path = tuple[str, ...]
CLOSING = ("]", "}", '"""', "'''")  # what the last line of a statement over several lines holds


def line_of(text: str, path: Path) -> int | None:
    """The line a key is written in.

    Args:
        text: a whole TOML document that parses.
        path: the key with the tables it is in; an element of an array of tables by its index, as text.

    Returns:
        From 1: the key's line, or that of its nearest parent (its array, its table); None if even the first part
        of ``path`` is not there, or the text does not parse.
    """
    written, implied = _lines(text)
    for end in range(len(path), 0, -1):
        line = written.get(path[:end], implied.get(path[:end]))
        if line is not None:
            return line
    return None


@lru_cache(maxsize=4)
def _lines(text: str) -> tuple[dict[Path, int], dict[Path, int]]:
    """The line of every key written, and of every table that a longer header names in passing."""
    written: dict[Path, int] = {}
    implied: dict[Path, int] = {}
    elements: dict[Path, int] = {}
    table: Path = ()
    for number, is_header, content in _statements(text):
        if not is_header:
            for path in _paths(content):
                written.setdefault(table + path, number)
            continue
        names, is_array = _header(content)
        table = ()
        for depth, name in enumerate(names, 1):
            table += (name,)
            implied.setdefault(table, number)
            if table in elements and not (is_array and depth == len(names)):
                table += (str(elements[table]),)
        written.setdefault(table, number)
        if is_array:
            elements[table] = elements.get(table, -1) + 1
            table += (str(elements[table]),)
            written[table] = number
    return written, implied


def _statements(text: str) -> Iterator[tuple[int, bool, dict[str, Any]]]:
    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines: TOML knows no other ends
    start = 0
    while start < len(lines):
        end, content = _complete(lines, start)
        if content is None:
            return
        if content:
            yield start + 1, lines[start].lstrip(" \t").startswith("["), content
        start = end


def _complete(lines: list[str], start: int) -> tuple[int, dict[str, Any] | None]:
    """The statement that begins in a line: where the next one begins, and what this one says."""
    for end in range(start + 1, len(lines) + 1):
        if end > start + 1 and not any(mark in lines[end - 1] for mark in CLOSING):
            continue
        try:
            return end, tomllib.loads("\n".join(lines[start:end]))
        except tomllib.TOMLDecodeError:
            continue
    return len(lines), None


def _paths(content: dict[str, Any], above: Path = ()) -> Iterator[Path]:
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def _header(content: Any) -> tuple[Path, bool]:
    """The names in a header, and whether it is one of an array, out of what it parses to."""
    names: Path = ()
    while content:
        if isinstance(content, list):
            return names, True
        ((name, content),) = content.items()
        names += (name,)
    return names, False
