"""A confidence interval for the mean of few, skewed samples: Hall's (1992) transformation of Student's t.

Quadratic forms of random probes lean to the right, the more so the fewer eigenvalues carry them. With 16
probes of a rank-one matrix the plain t-interval covers 87%, its logarithm 91%, this one 94.5%; over seven
spectra and 8 to 32 probes this one covers 92 to 95%, at 8 probes of a symmetric sample 10% wider than t.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # scipy.stats takes 1 s to import

from hessdiag.results.metrics import a_share, at_least

FEWEST_BLOCKS = 6  # with fewer the t-interval is 2.8 standard errors and more: no help to anyone
SKEWNESS_NEEDS = 4  # with fewer samples the skewness is noise, and the interval is the plain t
PILOT = 8  # samples that say how many are needed: their standard deviation is known to a quarter


def mean_interval(
    samples: NDArray[np.float64], confidence: float, *, what: str = "probes"
) -> tuple[float, float, float]:
    """Standard error and ends of the interval around ``samples.mean()``.

    Args:
        samples: (n,) independent, identically distributed.
        confidence: that the interval holds the mean of their distribution.
        what: name of n in the refusal.

    Returns:
        (stderr, lo, hi), lo ≤ mean ≤ hi.

    Raises:
        BudgetError: n < 2.
        UsageError: ``confidence`` outside (0, 1).
    """
    a_share(confidence, "confidence")
    n = len(samples)
    at_least(n, 2, what, "a standard error")
    mean = float(samples.mean())
    stderr = float(samples.std(ddof=1)) / math.sqrt(n)
    t = quantile(confidence, n - 1)
    skew = _skewness(samples) / math.sqrt(n)
    return (
        stderr,
        mean - stderr * max(_untransformed(t, skew), 0.0),
        mean - stderr * min(_untransformed(-t, skew), 0.0),
    )


def watched(confidence: float, look: int) -> float:
    """The confidence of the interval shown at the ``look``-th look, so that all of them hold with ``confidence``.

    Who sees intervals arrive and ends when one is narrow picks those that are narrow by chance: 95% intervals,
    shown after every 8 of 64 probes, held in 89 to 94% of such cases. The chances of being wrong given away here,
    6/π² of the whole at the first look, a quarter of that at the second, a ninth at the third, add up to the
    whole: whatever makes somebody end it, the last interval shown holds. It is 1.1 times as wide after 8 probes,
    1.8 times after 64.
    """
    return 1 - (1 - confidence) * 6 / (math.pi * look) ** 2


def enough(pilot: NDArray[np.float64], wanted: float, most: int) -> int:
    """How many other samples bring their mean's standard error to ``wanted``, from 8 to ``most``, by a pilot.

    The pilot's own values must not be used again. A mean that holds those that decided when to stop is off, by
    0.2 standard errors on spectra with outliers, where a small mean and a small spread come together; its interval
    held the truth in 91 to 92% of cases, for 95%. Fresh ones are as unbiased as any fixed number, and cover as
    often.
    """
    needed = float(pilot.var(ddof=1)) / max(wanted, 1e-300) ** 2
    return max(PILOT, math.ceil(needed)) if needed < most else most


def block_spread(
    values: NDArray[np.float64], weights: NDArray[np.float64], confidence: float
) -> tuple[float, float, int] | None:
    """Standard error, half interval and number of blocks of a weighted mean over independent blocks of data.

    Args:
        values: (blocks,) of the quantity.
        weights: (blocks,) what each block's mean stands for; those without weight do not count.
        confidence: of the interval.

    Returns:
        None with fewer than 6 blocks that count.
    """
    counted = weights > 0
    values, weights = values[counted], weights[counted]
    blocks = len(values)
    if blocks < FEWEST_BLOCKS:
        return None
    shares = weights / weights.sum()
    # the ratio estimator's variance: blocks of unequal weight vary in both
    spread = shares * (values - (shares * values).sum())
    stderr = math.sqrt(blocks / (blocks - 1) * float(np.square(spread).sum()))
    return stderr, quantile(confidence, blocks - 1) * stderr, blocks


def sum_half(sources: list[tuple[float, int]], confidence: float) -> float:
    """Half the t-interval of a sum of independent means, of (variance, degrees of freedom) each.

    Degrees of freedom by Welch and Satterthwaite.
    """
    variance = math.fsum(part for part, _ in sources)
    if variance == 0:
        return 0.0
    freedom = variance**2 / math.fsum(part**2 / degrees for part, degrees in sources)
    return quantile(confidence, freedom) * math.sqrt(variance)


@cache
def quantile(confidence: float, freedom: float = math.inf) -> float:
    """Standard errors in half the interval of Student's t; by default those of a normal law."""
    return float(stdtrit(freedom, (1 + confidence) / 2))


def _skewness(samples: NDArray[np.float64]) -> float:
    n = len(samples)
    deviations = samples - samples.mean()
    variance = float(np.mean(deviations**2))
    if n < SKEWNESS_NEEDS or variance == 0:
        return 0.0
    scaled = deviations / math.sqrt(variance)
    return float(np.mean(scaled**3)) * math.sqrt(n * (n - 1)) / (n - 2)


def _untransformed(y: float, skew: float) -> float:
    """The t whose transform t + skew t²/3 + skew² t³/27 + skew/6 is y (Hall 1992, equation 3)."""
    if abs(skew) < 1e-6:
        return y - skew / 6
    return 3 / skew * (float(np.cbrt(1 + skew * (y - skew / 6))) - 1)
