"""Optimizers that train for flatness: wrappers of any torch optimizer with one call, ``step(closure)``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessdiag.regularizers.hsr import HSR
    from hessdiag.regularizers.label_noise import LabelNoise
    from hessdiag.regularizers.nso import NSO
    from hessdiag.regularizers.sam import ASAM, SAM
    from hessdiag.regularizers.sam_variants import GSAM, MSAM, USAM, FriendlySAM, LookSAM
    from hessdiag.regularizers.spectral_radius import SpectralRadius
    from hessdiag.regularizers.trace_penalty import TracePenalty

__all__ = [
    "ASAM",
    "GSAM",
    "HSR",
    "MSAM",
    "NSO",
    "SAM",
    "USAM",
    "FriendlySAM",
    "LabelNoise",
    "LookSAM",
    "SpectralRadius",
    "TracePenalty",
    "schedules",
]

_FILES = {
    "SAM": "sam",
    "ASAM": "sam",
    "USAM": "sam_variants",
    "MSAM": "sam_variants",
    "GSAM": "sam_variants",
    "LookSAM": "sam_variants",
    "FriendlySAM": "sam_variants",
    "NSO": "nso",
    "SpectralRadius": "spectral_radius",
    "HSR": "hsr",
    "TracePenalty": "trace_penalty",
    "LabelNoise": "label_noise",
}


def __getattr__(name: str) -> Any:
    if name == "schedules":
        return import_module("hessdiag.regularizers.schedules")
    if name not in _FILES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"hessdiag.regularizers.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
