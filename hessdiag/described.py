"""Options in the signature and the docstring of who takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from textwrap import fill
from typing import Any, TypeVar, get_type_hints

from hessdiag.option import Option, options_of

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[..., Any])


def documented(cls: C) -> C:
    """Write the section Attributes of a docstring from the options."""
    cls.__doc__ = _with_section(cls.__doc__, "Attributes", options_of(cls).values())
    return cls


def takes(cls: type[Any], *names: str) -> Callable[[F], F]:
    """Show the options of a class in the place of a function's ``**options``: in its signature and its docstring.

    Args:
        cls: a class of options.
        *names: those that the function takes; by default all.
    """
    hints, known = get_type_hints(cls), options_of(cls)  # type: ignore[arg-type]  # a class can be hashed
    chosen = [known[name] for name in names or known]

    def show(function: F) -> F:
        own = signature(function)
        kept = [one for one in own.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        options = [one for one in chosen if one.name not in own.parameters]
        more = [
            Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
            for one in options
        ]
        function.__signature__ = own.replace(parameters=[*kept, *more])  # type: ignore[attr-defined]
        function.__doc__ = _with_section(function.__doc__, "Options", options)
        return function

    return show


def _with_section(docstring: str | None, heading: str, options: Iterable[Option]) -> str:
    lines = [f"{(docstring or '').rstrip()}\n", f"    {heading}:"]
    for one in options:
        instead = f" [{one.instead}]" if one.instead else ""
        text = f"{one.name}: {one.help}{instead}{' ' if one.more else ''}{one.more}"
        lines.append(fill(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 12))
    return "\n".join([*lines, "    "])
