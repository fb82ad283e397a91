"""How sharp a trained PyTorch checkpoint is, and how sure that number is.

>>> import hessdiag, torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> model, x, y = nn.Linear(5, 3), torch.randn(64, 5), torch.randint(3, (64,))
>>> found = hessdiag.analyze(model, nn.CrossEntropyLoss(), (x, y))
>>> found.lambda_max.lo <= found.lambda_max.value <= found.lambda_max.hi
True
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hessdiag.presenter import present_with

if TYPE_CHECKING:
    __version__: str
    from hessdiag.analysis import analyze, hessian
    from hessdiag.analysis.diagonal import diagonal
    from hessdiag.engine.products.curvature import Curvature
    from hessdiag.errors import HessdiagError
    from hessdiag.operator import SymmetricOperator, as_operator
    from hessdiag.problem import Problem
    from hessdiag.results import Analysis, Bound, Estimate, RitzValue, Spectrum, load_run
    from hessdiag.samples import draw
    from hessdiag.schemes.load import load
    from hessdiag.settings import Settings
    from hessdiag.sources import characters, images, mnist
    from hessdiag.spectral import (
        effective_rank,
        eigenpairs,
        extremes,
        frobenius_squared,
        lanczos,
        spectrum,
        trace,
        wolkowicz_styan,
        wolkowicz_styan_of,
    )
    from hessdiag.track.tracker import Tracker

_WHERE = {
    "analyze": "hessdiag.analysis",
    "hessian": "hessdiag.analysis",
    "diagonal": "hessdiag.analysis.diagonal",
    "Curvature": "hessdiag.engine.products.curvature",
    "HessdiagError": "hessdiag.errors",
    "SymmetricOperator": "hessdiag.operator",
    "as_operator": "hessdiag.operator",
    "Problem": "hessdiag.problem",
    "Analysis": "hessdiag.results",
    "Bound": "hessdiag.results",
    "Estimate": "hessdiag.results",
    "RitzValue": "hessdiag.results",
    "Spectrum": "hessdiag.results",
    "load_run": "hessdiag.results",
    "draw": "hessdiag.samples",
    "load": "hessdiag.schemes.load",
    "Settings": "hessdiag.settings",
    "characters": "hessdiag.sources",
    "images": "hessdiag.sources",
    "mnist": "hessdiag.sources",
    "effective_rank": "hessdiag.spectral",
    "eigenpairs": "hessdiag.spectral",
    "extremes": "hessdiag.spectral",
    "frobenius_squared": "hessdiag.spectral",
    "lanczos": "hessdiag.spectral",
    "spectrum": "hessdiag.spectral",
    "trace": "hessdiag.spectral",
    "wolkowicz_styan": "hessdiag.spectral",
    "wolkowicz_styan_of": "hessdiag.spectral",
    "Tracker": "hessdiag.track.tracker",
}

present_with("hessdiag.present")

__all__ = [  # noqa: RUF022  (by what they are for)
    # What is measured, and how
    "Problem",
    "Settings",
    "draw",
    "load",
    # Measuring
    "analyze",
    "hessian",
    "Tracker",
    # What it gives
    "Analysis",
    "Bound",
    "Estimate",
    "RitzValue",
    "Spectrum",
    "load_run",
    # Symmetric operators
    "Curvature",
    "SymmetricOperator",
    "as_operator",
    # Estimates of any symmetric operator
    "diagonal",
    "effective_rank",
    "eigenpairs",
    "extremes",
    "frobenius_squared",
    "lanczos",
    "spectrum",
    "trace",
    "wolkowicz_styan",
    "wolkowicz_styan_of",
    # Data
    "characters",
    "images",
    "mnist",
    # Refusals
    "HessdiagError",
    # the version
    "__version__",
]
"""Every public name, in groups; `tests/test_every_public_name_has_an_example.py` runs an example of each."""


def __getattr__(name: str) -> Any:
    """Names are looked up on first use, so that the command's help never waits for torch."""
    if name == "__version__":
        return import_module("hessdiag.installed").version()
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    msg = f"module 'hessdiag' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
