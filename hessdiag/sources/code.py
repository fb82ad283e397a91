"""The files that code lies in: of a module that is named, and of objects that are there."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hessdiag.hashing import of_file
from hessdiag.sources.factory import importable
from hessdiag.sources.spec import exists

COUNTED = ("torch", "hessdiag", "builtins")  # their versions say it


def source_of(where: str, app_dir: str | None = None) -> Path | None:
    """The file of ``path/file.py`` or ``package.module``; None where there is none.

    Args:
        where: what stands before the colon of a factory.
        app_dir: folder that modules are imported from, by default the current one.
    """
    if where.endswith(".py"):
        return Path(where) if exists(where) else None
    if not all(part.isidentifier() for part in where.split(".")):
        return None
    with importable(where, app_dir):
        try:
            found = importlib.util.find_spec(where)
        except Exception:  # a package's own code runs
            return None
    return Path(found.origin) if found and found.origin and exists(found.origin) else None


def digests_of(objects: Iterable[Any]) -> list[str]:
    """sha256 of each file in which the classes and functions of objects are written, without its name, sorted.

    Those of torch and hessdiag are left out; what has no file, as a class of a notebook, too.
    """
    files = {file for one in objects if (file := _file(one)) is not None}
    return sorted({of_file(file) for file in files})


def _file(one: Any) -> Path | None:
    while isinstance(one, functools.partial):
        one = one.func
    what = one if inspect.isroutine(one) or inspect.isclass(one) else type(one)
    name = str(getattr(what, "__module__", ""))
    if name.partition(".")[0] in COUNTED:
        return None
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file) if file and exists(file) else None
