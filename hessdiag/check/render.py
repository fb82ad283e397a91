"""Configurations written: a ``[tool.hessdiag]`` block for a person to read and edit, out of plain values.

A dozen lines of TOML do not need a library; that they parse back to the same values is tested.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hessdiag.errors import UsageError, one_line
from hessdiag.shown import single_spaced, visible

PREFIX = ("tool", "hessdiag")
BUDGETS = ("check", "budgets")
SECTIONS = {("options",), ("run",), ("check",), BUDGETS}  # tables with a header; all others are inline
BARE = re.compile(r"[A-Za-z0-9_-]+")
SHORT = {"\b": r"\b", "\t": r"\t", "\n": r"\n", "\f": r"\f", "\r": r"\r", '"': r"\"", "\\": r"\\"}


def quoted(text: str) -> str:
    """Any text as a TOML string on one line; what does not print is escaped.

    Raises:
        UsageError: half a surrogate pair, which TOML cannot hold.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        msg = f"{text!a} is no valid Unicode and cannot be written to TOML: rename it"
        raise UsageError(msg)
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in SHORT:
        return SHORT[character]
    code = ord(character)
    return character if character.isprintable() else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def dotted(path: Iterable[str]) -> str:
    """A key with its tables as TOML writes it: ``check.budgets."trace@layer4.*"``."""
    return ".".join(part if BARE.fullmatch(part) else quoted(part) for part in path)


def inline(value: Any) -> str:
    """A value as TOML on one line.

    Raises:
        UsageError: it is none of text, number, true or false, list and table.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{dotted([key])} = {inline(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    msg = f"a {type(value).__name__} cannot be written to TOML: allowed: text, numbers, true, lists and tables"
    raise UsageError(msg)


def render(
    table: Mapping[str, Any], comments: Mapping[str, str] | None = None, *, prefix: tuple[str, ...] = PREFIX
) -> str:
    """The text of a configuration.

    Args:
        table: the nested values: problem, checkpoint, options, run, check with its budgets.
        comments: by key of a budget, put behind it.
        prefix: the table it is to be in; () for hessdiag.toml.

    Returns:
        Text that tomllib parses back to ``table``, in sections, ending in a newline.

    Raises:
        UsageError: a value that TOML does not know.
    """
    blocks = _sections(table, (), prefix, comments or {})
    return "\n".join("\n".join(block) + "\n" for block in blocks if block)


def _sections(
    table: Mapping[str, Any], path: tuple[str, ...], prefix: tuple[str, ...], comments: Mapping[str, str]
) -> list[list[str]]:
    lines = [f"[{dotted(prefix + path)}]"] if prefix + path else []
    below: list[list[str]] = []
    for key, value in table.items():
        if isinstance(value, Mapping) and (*path, key) in SECTIONS:
            below += _sections(value, (*path, key), prefix, comments)
            continue
        comment = visible(single_spaced(comments.get(key, ""))).removeprefix("# ") if path == BUDGETS else ""
        lines.append(f"{dotted([key])} = {inline(value)}" + (f"  # {comment}" if comment else ""))
    return [lines, *below]


def append_to(file: Path, block: str) -> str:
    """What a file would hold with a block of TOML behind what is there, byte for byte. Writes nothing.

    Args:
        file: pyproject.toml or hessdiag.toml; need not exist.
        block: out of `render`.

    Returns:
        The whole text, with the line ends of the file.

    Raises:
        UsageError: the file is not TOML, is configured already, or the block would not mean there what it says.
    """
    try:
        before = file.read_bytes().decode() if file.exists() else ""
        old = tomllib.loads(before.removeprefix("\ufeff"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{file} is not TOML ({one_line(error)}): mend it first"
        raise UsageError(msg) from error
    added = tomllib.loads(block)
    tool = old.get("tool")
    configured = bool(old) if "tool" not in added else isinstance(tool, dict) and "hessdiag" in tool
    if configured:
        msg = f"{file} holds a configuration of hessdiag already: edit it, or delete it to have a new one written"
        raise UsageError(msg)
    end = "\r\n" if "\r\n" in before else "\n"
    gap = "" if not before else end if before.endswith("\n") else 2 * end
    after = before + gap + block.replace("\n", end)
    if _parsed(after) != _merged(old, added):
        msg = (
            f"{file} writes [tool] in a way that nothing can be added to: put the configuration into hessdiag.toml"
        )
        raise UsageError(msg)
    return after


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError:
        return None


def _merged(old: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in added.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merged(old[key], value) if both else value
    return merged
