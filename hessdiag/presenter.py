"""Who shows results: the package names it from above, so that a result knows nothing of what lies above it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_named: list[str] = []


def present_with(module: str) -> None:
    """Name the module whose functions show results; it is imported on first use.

    Args:
        module: with ``Plots``, ``brief`` and ``notebook``, each of an `Analysis`, and ``watched``, for a
            measurement to show what it knows.
    """
    _named[:] = [module]


def presenter() -> Any:
    """The module that shows results."""
    return import_module(_named[0])
