"""The share of negative eigenvalues."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hessdiag.operator import SymmetricOperator
from hessdiag.results import Estimate, Provenance
from hessdiag.results.chance import deviation, least_share
from hessdiag.results.interval import mean_interval
from hessdiag.results.quadrature import share_below
from hessdiag.spectral.density import DensityRun
from hessdiag.spectral.krylov import Krylov

Array = NDArray[np.float64]


def negative_mass(run: DensityRun, *, confidence: float = 0.95) -> Estimate:
    """The share of eigenvalues below zero, bracketed.

    The value is the share that is resolved: so many are negative for certain. Nodes that cannot be told from zero
    are in the upper end only: networks have many eigenvalues at or next to zero, and a Gauss node among them falls
    to either side by chance (raw nodes said 0.46 and 0.97 where the truth was 0.11 and 0.52).

    Args:
        run: from `density`.
        confidence: of the interval: the mean of the lower limits less their error, to the mean of the upper
            limits plus theirs.

    Raises:
        BudgetError: a single random probe.
    """
    low, high = run.negative.mean(axis=0)
    shares = run.negative[:, 0]
    value, stderr = float(shares.mean()), 0.0
    if not run.exact:
        stderr = mean_interval(shares, confidence)[0]
        low = mean_interval(run.negative[:, 0], confidence)[1]
        high = mean_interval(run.negative[:, 1], confidence)[2]
    return Estimate(
        quantity="negative_mass",
        value=value,
        lo=float(np.clip(low, 0.0, value)),
        hi=float(np.clip(high, value, 1.0)),
        kind="exact" if run.exact and low == high else "bracket",
        confidence=1.0 if run.exact else confidence,
        provenance=Provenance(
            method="Gauss-Radau at the rounding floor",
            settings={"probes": len(run.spectrum.probes), "steps": run.spectrum.steps, "seed": run.forms.seed},
            products=run.products,
            dtype=run.forms.dtype,
        ),
        stderr=stderr,
        per_probe=() if run.exact else tuple(shares.tolist()),
    )


def own_negative_mass(
    op: SymmetricOperator, krylov: Krylov, alphas: Array, betas: Array, confidence: float
) -> Estimate:
    """The same of a run's own start, uniform on the sphere: no product of its own.

    Radau limits of the start's measure (Chebyshev, Markov, Stieltjes), widened by the law of its weights
    (`hessdiag.results.chance`).

    Args:
        op: gives the dimension and the rounding.
        krylov: the run.
        alphas: (m,) of its first stretch.
        betas: (m,) norms after each step; a last 0 means the measure is complete.
        confidence: of the interval.
    """
    resolution, d = krylov.floor(op), op.size
    low = share_below(alphas, betas, -resolution, closed=False)
    high = share_below(alphas, betas, resolution, closed=True)
    tail = (1 - confidence) / 2
    least, most = float(least_share(low, d, tail)), 1 - float(least_share(1 - high, d, tail))
    return Estimate(
        quantity="negative_mass",
        value=low,
        lo=least,
        hi=max(most, low),
        kind="bracket",
        confidence=confidence,
        provenance=Provenance(
            method="Gauss-Radau at the rounding floor, the run's own start",
            settings={"steps": len(alphas)},
            products=krylov.products,
            dtype=str(op.dtype).removeprefix("torch."),
        ),
        stderr=float(deviation(low, d)),
    )
