"""``--cache``, of every verb that keeps finished work for a next time; nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

import click

ASKED = "hessdiag.cache"  # in the context of a command


def cache_asked() -> Path | None:
    """The folder that the running command's ``--cache`` names; None where it has none."""
    context = click.get_current_context(silent=True)
    found: Path | None = context.meta.get(ASKED) if context else None
    return found


def _ask_cache(context: click.Context, _: click.Parameter, value: Path | None) -> None:
    context.meta[ASKED] = value


CACHE_FOLDER = click.option(
    "--cache",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    expose_value=False,
    callback=_ask_cache,
    help="Folder of results kept for a next time.  [HESSDIAG_CACHE, or .hessdiag/cache]",
)
