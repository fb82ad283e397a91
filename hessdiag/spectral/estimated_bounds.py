"""Bounds on the extreme eigenvalues of an operator whose traces have to be estimated."""

from __future__ import annotations

from typing import Any

from hessdiag.former import formerly
from hessdiag.operator import as_operator
from hessdiag.spectral.bounds import WS, wolkowicz_styan
from hessdiag.spectral.deflation import forms
from hessdiag.spectral.lanczos import lanczos
from hessdiag.spectral.moments import frobenius_squared_from, trace_from


@formerly(probes="num_probes")
def wolkowicz_styan_of(
    operator: Any, *, probes: int, deflate: int = 10, seed: int = 0, confidence: float = 0.95
) -> WS:
    """The bounds of any symmetric operator, its traces from deflated probes (10 steps: ws_upper to 1%).

    Raises:
        BudgetError: fewer than 2 probes. Cost: probes + deflate products.

    >>> import hessdiag, torch
    >>> bounds = hessdiag.wolkowicz_styan_of(torch.diag(torch.arange(100.0)), probes=8)
    >>> bounds.upper.value > 99
    True
    """
    op = as_operator(operator)
    krylov = lanczos(op, steps=deflate, seed=seed) if deflate else None
    values = forms(op, krylov, probes, seed)
    t1 = trace_from(values, confidence=confidence)
    t2 = frobenius_squared_from(values, confidence=confidence)
    return wolkowicz_styan(t1, t2, op.size, confidence=confidence)
