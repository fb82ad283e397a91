"""The outside world -> `Problem`: checkpoints, factories, ready data sets.

The data sets are looked up on first use: importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessdiag.sources.datasets import characters, images, mnist

__all__ = ["characters", "images", "mnist"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("hessdiag.sources.datasets"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
