"""A function with another body for a while, wherever it is known by name: what a test must notice."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any


def found(where: str) -> Callable[..., Any]:
    """The function behind "package.module:Class.name", out of its decorators."""
    module, _, path = where.partition(":")
    one: Any = importlib.import_module(module)
    for name in path.split("."):
        one = inspect.getattr_static(one, name) if inspect.isclass(one) else getattr(one, name)
    one = getattr(one, "fget", None) or getattr(one, "func", None) or one
    return inspect.unwrap(one)


@contextmanager
def changed(where: str, old: str, new: str) -> Iterator[None]:
    """``old`` replaced by ``new`` in a function's source, which must hold it."""
    function = found(where)
    source = textwrap.dedent(inspect.getsource(function))
    if old not in source:  # no AssertionError, which a test of a mutant waits for
        msg = f"{where} has no {old!r}"
        raise LookupError(msg)
    own = function.__code__
    function.__code__ = compiled(function, source.replace(old, new), own)
    try:
        yield
    finally:
        function.__code__ = own


def compiled(function: Callable[..., Any], source: str, like: CodeType) -> CodeType:
    """The code of a function's changed source, with the same free variables (``super()``)."""
    lines = [line for line in source.splitlines() if not line.startswith("@")]
    if like.co_freevars:
        head = f"def outer({', '.join(like.co_freevars)}):"
        lines = [head, *(f"    {line}" for line in lines), f"    return {function.__name__}"]
    code = compile("\n".join(("from __future__ import annotations", *lines)), like.co_filename, "exec")
    for part in (function.__name__,) if not like.co_freevars else ("outer", function.__name__):
        code = next(one for one in code.co_consts if isinstance(one, CodeType) and one.co_name == part)
    assert code.co_freevars == like.co_freevars
    return code
