"""How sharp a trained PyTorch checkpoint is, and how sure that number is.

>>> import hessdiag
>>> problem = hessdiag.Problem(model, {"train": dataset}, criterion="cross_entropy")  # doctest: +SKIP
>>> hessdiag.analyze(problem).metrics["lambda_max"]  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hessdiag.presenter import present_with

if TYPE_CHECKING:
    __version__: str
    from hessdiag.analysis import analyze
    from hessdiag.engine.checks.planner import hessian
    from hessdiag.errors import HessdiagError
    from hessdiag.operator import SymmetricOperator, as_operator
    from hessdiag.problem import Problem
    from hessdiag.results import Analysis, Bound, Estimate, RitzValue, Spectrum, load_run
    from hessdiag.samples import draw
    from hessdiag.sources import characters, images, mnist
    from hessdiag.spectral import extremes, frobenius_squared, lanczos, spectrum, trace, wolkowicz_styan

_WHERE = {
    "analyze": "hessdiag.analysis",
    "hessian": "hessdiag.engine.checks.planner",
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
    "characters": "hessdiag.sources",
    "images": "hessdiag.sources",
    "mnist": "hessdiag.sources",
    "extremes": "hessdiag.spectral",
    "frobenius_squared": "hessdiag.spectral",
    "lanczos": "hessdiag.spectral",
    "spectrum": "hessdiag.spectral",
    "trace": "hessdiag.spectral",
    "wolkowicz_styan": "hessdiag.spectral",
}

present_with("hessdiag.present")

__all__ = [
    "Analysis",
    "Bound",
    "Estimate",
    "HessdiagError",
    "Problem",
    "RitzValue",
    "Spectrum",
    "SymmetricOperator",
    "__version__",
    "analyze",
    "as_operator",
    "characters",
    "draw",
    "extremes",
    "frobenius_squared",
    "hessian",
    "images",
    "lanczos",
    "load_run",
    "mnist",
    "spectrum",
    "trace",
    "wolkowicz_styan",
]


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
