"""Options as the command line spells them; texts of all other rooms spell them as Python does, in backticks."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import fields
from functools import cache
from html import escape, unescape
from typing import Any

BESIDE = frozenset(
    (
        *("against_git", "cache", "fresh", "gap", "jobs", "lr", "meta_from", "one_run", "only_kept"),
        *("print_config", "reference", "shard", "shard_vectors"),
    )
)
"""Options of verbs that no settings hold."""
IN_TEXT = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


def spelled(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def flagged(text: str) -> str:
    """A text with its options as they are typed: "`method='auto'`" becomes "--method auto"."""
    return IN_TEXT.sub(_typed, text) if "`" in text else text


def flagged_page(page: str) -> str:
    """The same of a page of HTML, in which quotes are escaped."""
    return IN_TEXT.sub(lambda found: escape(flagged(unescape(found[0]))), page)


@cache
def _names() -> frozenset[str]:
    from hessdiag.gap.settings import GapSettings
    from hessdiag.option import options_of
    from hessdiag.schemes.recipe import Recipe
    from hessdiag.settings import Settings
    from hessdiag.shift.settings import ShiftSettings

    named = (one.name for one in fields(Recipe) if one.name not in ("factory", "options", "root"))
    return frozenset(BESIDE.union(named, *map(options_of, (Settings, GapSettings, ShiftSettings))))


def _typed(found: re.Match[str]) -> str:
    name, given = found[1], found[2]
    if name not in _names():
        return found[0]
    if given is None:
        return spelled(name)
    try:
        value: Any = ast.literal_eval(given)
    except (ValueError, SyntaxError):
        value = given
    if isinstance(value, bool):
        return spelled(name if value else f"no_{name}")
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"{spelled(name)} {shlex.quote(str(one))}" for one in values)
