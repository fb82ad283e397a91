"""Where the values of a configuration come from, a line of the file or a flag: what every fault is said with."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hessdiag.check.render import dotted
from hessdiag.check.schema import Fault
from hessdiag.check.toml_lines import line_of
from hessdiag.errors import FaultsError, UsageError, one_line
from hessdiag.shown import single_spaced, visible
from hessdiag.sources.spec import split_key, split_spec

PYPROJECT = "pyproject.toml"
PYPROJECT_TABLE = ("tool", "hessdiag")
AT_LINE = re.compile(r" *\(at (?:line (?P<line>\d+), column \d+|end of document)\)")
TWICE = ("Cannot overwrite a value", "Cannot declare", "Duplicate inline table key")


class ConfigError(FaultsError):
    """A configuration with faults (exit code 2).

    Attributes:
        faults: all of them, each one line, ``FILE:LINE: key: what is wrong; what is allowed``.
    """

    page = "configuration"


class Origin:
    """Where each value comes from: a line of the file, or a flag."""

    def __init__(self, file: Path, overrides: Mapping[str, Any], text: str | None = None) -> None:
        self.file, self.flags = file, dict(_flat(overrides))
        self.text = read_text(file) if text is None else text
        self.prefix: tuple[str, ...] = PYPROJECT_TABLE if file.name == PYPROJECT else ()

    def merged(self) -> dict[str, Any]:
        """The table of the file with the flags laid over it.

        Raises:
            ConfigError: the file is no TOML, or has no such table.
        """
        document = _parsed(self.file, self.text)
        table: Any = document
        for name in self.prefix:
            table = table.get(name) if isinstance(table, dict) else None
        if not isinstance(table, dict):
            line = line_of(self.text, self.prefix) or 1
            fault = "no such table" if table is None else "this is no table"
            raise ConfigError(
                [f"{shown_file(self.file)}:{line}: [tool.hessdiag]: {fault}; hessdiag init writes one"]
            )
        for path, value in self.flags.items():
            _lay(table, path, value)
        return table

    def from_flag(self, path: tuple[str, ...]) -> tuple[str, ...] | None:
        """The flag a value came from, if it did."""
        return next((flag for flag in self.flags if path[: len(flag)] == flag), None)

    def line(self, path: tuple[str, ...]) -> int:
        """The line of the file a key stands in, or would have to."""
        return line_of(self.text, self.prefix + path) or 1

    def said(self, faults: Iterable[Fault]) -> list[str]:
        """The faults in the order of the file's lines, those of flags first."""
        lines = {}
        for path, text in faults:
            flag = self.from_flag(path)
            line = self.line(path) if flag is None else 0
            name = _typed(flag) if flag else f"{shown_file(self.file)}:{line}: {dotted(path)}"
            lines[visible(single_spaced(f"{name}: {text}"))] = line
        return sorted(lines, key=lambda text: lines[text])

    def anchored(self, key: tuple[str, ...], path: str) -> Path:
        """A path of the file hangs at its folder, one of a flag at the current one."""
        folder = self.file.resolve().parent
        if self.from_flag(key) or folder == Path.cwd():
            return Path(path)
        return folder / path

    def factory(self, problem: str | None) -> str | None:
        """The problem, its file found from here."""
        if problem is None:
            return None
        where, name = split_spec(problem)
        return f"{self.anchored(('problem',), where)}:{name}" if where.endswith(".py") else problem

    def checkpoint(self, checkpoint: str | None) -> str | None:
        """The checkpoint, its file found from here."""
        if checkpoint is None:
            return None
        if self.anchored(("checkpoint",), checkpoint).exists():
            return str(self.anchored(("checkpoint",), checkpoint))
        path, entry = split_key(checkpoint)
        return str(self.anchored(("checkpoint",), path)) + (f"::{entry}" if entry else "")


def _typed(flag: tuple[str, ...]) -> str:
    """A value of the command line as it was typed there."""
    if flag == ("problem",):
        return "FACTORY"
    return f"-P {'.'.join(flag[1:])}" if flag[0] == "options" else "--" + flag[-1].replace("_", "-")


def _lay(table: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value; where the file has no table for it, that is found as a fault of the file later."""
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            return
    table[path[-1]] = value


def _flat(table: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        path = (*above, key) if above else tuple(key.split("."))
        if isinstance(value, Mapping):
            yield from _flat(value, path)
        elif value is not None:
            yield path, list(value) if isinstance(value, tuple) else value


def read_text(file: Path) -> str:
    """The text of a configuration.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8-sig")  # Windows editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read the configuration {shown_file(file)}: {one_line(error)}; it is TOML text in UTF-8"
        raise UsageError(msg) from error


def _parsed(file: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        found = AT_LINE.search(str(error))
        line = int(found["line"]) if found and found["line"] else text.rstrip("\n").count("\n") + 1 if found else 1
        clause = AT_LINE.sub("", one_line(error))
        twice = "; this key or table is written twice, keep one" if clause.startswith(TWICE) else ""
        msg = f"{shown_file(file)}:{line}: no TOML: {clause}{twice}"
        raise ConfigError([msg]) from error


def shown_file(file: Path) -> str:
    """A path as people name it: from the current folder where it lies in there."""
    whole, here = file.absolute(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)
