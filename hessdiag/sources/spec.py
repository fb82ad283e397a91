"""What users type to name a factory, its options and a checkpoint. Needs no torch, so that help stays fast."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hessdiag.errors import LoadError, UsageError

PYTHON_LITERALS = {"True": True, "False": False, "None": None}


def split_spec(spec: str) -> tuple[str, str]:
    """Split ``pkg.module:function`` or ``path/file.py:function`` at its last colon.

    Returns:
        The module or file, and the (possibly dotted) name in it.

    Raises:
        UsageError: there is no colon, or nothing on one side of it.
    """
    where, colon, name = spec.rpartition(":")
    if colon and where and name and all(part.isidentifier() for part in name.split(".")):
        return where, name
    msg = f"problem {spec!r}: allowed: pkg.module:function and path/file.py:function; {_suggestion(spec)}"
    raise UsageError(msg)


def _suggestion(spec: str) -> str:
    bare = spec.strip(":")
    if bare.endswith(".py") or "/" in bare:
        return f"name the function: {bare}:problem"
    module, dot, name = bare.rpartition(".")
    if dot and module and ":" not in bare:
        return f"did you mean {module}:{name}?"
    return f"say where it is: {bare or 'pkg.module'}:problem"


def split_key(spec: str) -> tuple[str, str]:
    """Split ``file.pt::model_ema`` into the file and the entry in it ('' where none is named).

    A file whose own name holds ``::`` is found as it is, with or without an entry behind it.
    """
    parts = spec.split("::")
    for count in range(len(parts), 1, -1):
        path = "::".join(parts[:count])
        if exists(path):
            return path, "::".join(parts[count:])
    return parts[0], "::".join(parts[1:])


def exists(path: str | Path) -> bool:
    """Whether there is a file or folder; what the system refuses to look at (a path too long) is none."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def pathless(value: Any) -> Any:
    """A value of an option with every path cut to its last part, also inside lists and dicts.

    >>> pathless({"file": "/data/2026/train.csv", "width": 4, "more": ["a/b/", "c"]})
    {'file': 'train.csv', 'width': 4, 'more': ['b', 'c']}
    """
    if isinstance(value, Mapping):
        return {name: pathless(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [pathless(item) for item in value]
    if not isinstance(value, str):
        return value
    last = value.replace(os.sep, "/").rstrip("/").rpartition("/")[2]
    return os.path.basename(os.path.abspath(value)) if last in (".", "..") else last  # noqa: PTH100, PTH119  (links)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Say in one line that the system does not give a file.

    Raises:
        LoadError: what was an OSError.
    """
    try:
        yield
    except OSError as error:
        msg = f"{file} cannot be read: {error.strerror or error}"
        raise LoadError(msg) from error


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """The options of a factory from ``key=value`` pairs.

    Values are JSON literals (numbers, true, null, "text", [1, 2]); Python's True, False and None are taken
    as what they mean; anything else is a string.

    Raises:
        UsageError: no ``=``, a name that cannot be a Python parameter, or a name given twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            msg = f"-P {pair}: an option is written name=value, for example -P width=64"
            raise UsageError(msg)
        if key in options:
            msg = f"-P {key} is given twice ({options[key]!r} and {text!r}): keep one"
            raise UsageError(msg)
        options[key] = literal(text)
    return options


def literal(text: str) -> Any:
    """A JSON literal, or one of Python's True, False and None; else the text itself."""
    if text in PYTHON_LITERALS:
        return PYTHON_LITERALS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text
