"""The old place of `hessdiag.gap`, for measures of others that import from it; kept for one version."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

warnings.warn("hessdiag.generalization is hessdiag.gap now", DeprecationWarning, stacklevel=2)

__path__: list[str] = []  # what stands in sys.modules below is imported as from a package
for _name in ("registry", "checkpoint", "record"):
    globals()[_name] = sys.modules[f"{__name__}.{_name}"] = import_module(f"hessdiag.gap.{_name}")
