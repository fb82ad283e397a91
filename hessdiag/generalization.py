"""The old name of `hessdiag.gap`; kept for one version."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """What `hessdiag.gap` has, with a warning that names the new place."""
    if name.startswith("__"):
        raise AttributeError(name)
    warnings.warn(f"hessdiag.generalization.{name} is hessdiag.gap.{name} now", DeprecationWarning, stacklevel=2)
    return getattr(import_module("hessdiag.gap"), name)
