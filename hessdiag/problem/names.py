"""Which parameters count, by globs on their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matching(names: Iterable[str], globs: Sequence[str]) -> tuple[str, ...]:
    """The names that a glob takes in and no ``"!glob"`` leaves out; without a glob that takes in, all are in."""
    include = [g for g in globs if not g.startswith("!")] or ["*"]
    exclude = [g[1:] for g in globs if g.startswith("!")]
    return tuple(
        name
        for name in names
        if any(fnmatchcase(name, g) for g in include) and not any(fnmatchcase(name, g) for g in exclude)
    )
