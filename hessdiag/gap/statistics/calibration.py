"""Expected calibration error over bins of equal mass, with an interval that knows its bias.

    ECE = sum_b (n_b / n) |share right in b − mean confidence in b|      (Guo et al. 2017, with equal-mass bins)

The absolute values make it too large: a calibrated model with confidences 0.5 + Beta(2, 2)/2 reads 0.04 on 1,000
examples. Resampling doubles this bias instead of showing it, so the interval is a test turned around. With
gaps d_b, standard errors s_b and weights w_b, let the true gaps be c g_b; the interval holds every c sum w_b |g_b|
at which the ECE found is no unlikely outcome of sum_b w_b |c g_b + s_b z|, for the shape g = d and for d shrunk
towards 0 by 1 − s²/d², since the first takes noise for miscalibration and the second the reverse. At 95% it covers
91 to 99% (150 repetitions; 300 to 5,000 examples; calibrated, or overconfident by 0.05, by 0.15 or in half of the
bins), but 88% where nearly all confidences are above 0.95 and a bin holds few mistakes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BINS = 15  # Guo et al. 2017, section 3
PER_BIN = 20  # the gap of a bin is then near enough to a normal
DRAWS = 1000
STEPS = 49  # of the candidates for the true error; between them the quantile is all but straight


def calibration_error(
    correct: Array, confidence: Array, level: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """ECE and the ends of its interval for the population, lo ≤ ECE ≤ hi.

    Args:
        correct: (n,) of 0 and 1, n ≥ 15 · 20.
        confidence: (n,) in [0, 1].
        level: that the interval holds the population's error over these bins.
        rng: for the draws.
    """
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split((correct - confidence)[order], BINS)
    sizes = np.array([len(part) for part in parts], float)
    gaps = np.array([part.mean() for part in parts])
    # a bin without a mistake shows no spread: half a mistake is added, as much as it cannot exclude
    share = np.array([part.mean() for part in np.array_split(correct[order], BINS)])
    share = (share * sizes + 0.5) / (sizes + 1)
    errors = np.sqrt(np.maximum(share * (1 - share), [part.var() for part in parts]) / sizes)
    weights, noise = sizes / sizes.sum(), errors * rng.standard_normal((DRAWS, BINS))
    value = float(weights @ np.abs(gaps))
    shrunk = gaps * np.maximum(0.0, 1 - np.square(errors / np.where(gaps == 0, np.inf, gaps)))
    candidates = np.linspace(0, value + 3 * float(weights @ errors), STEPS)
    ends = [value]
    for shape in (gaps, shrunk):
        if size := float(weights @ np.abs(shape)):
            scales = (candidates / size)[:, None, None]
            outcomes = np.abs(scales * shape + noise) @ weights
            quantiles = np.quantile(outcomes, [(1 + level) / 2, (1 - level) / 2], axis=1)
            ends += [float(np.interp(value, np.maximum.accumulate(q), candidates)) for q in quantiles]
    return value, min(ends), max(ends)
