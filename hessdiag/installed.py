"""The version of this hessdiag: pyproject.toml says it, and what is installed knows it."""

from __future__ import annotations

from functools import cache

UNKNOWN = "unknown"


@cache
def version() -> str:
    """What pip calls the version installed; "unknown" of a checkout that was never installed.

    Looked up on first use: `importlib.metadata` takes longer to import than the help of the command to print.
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("hessdiag")
    except PackageNotFoundError:
        return UNKNOWN
