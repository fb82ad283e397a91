"""How many seeds the long coverage studies take, and what share of them must hold the truth at that number.

`pytest` takes some, `pytest --seeds=2000` all that the studies were made for; `-m coverage` runs them alone.
"""

from __future__ import annotations

from scipy.stats import binom, norm

MOST = 1000  # what `pytest --seeds` sets before the tests are read
SIGMAS = 4.0
CHANCE = float(norm.sf(SIGMAS))  # that a study with a true coverage at an end of its range leaves the band there


def seeds(full: int) -> int:
    """How many seeds a study takes that was made for so many."""
    return min(full, MOST)


def band(number: int, lowest: float = 0.95, highest: float = 0.95) -> tuple[float, float]:
    """Where the share of so many seeds lies if the true coverage is within a range: binomial, four sigma."""
    return float(binom.ppf(CHANCE, number, lowest)) / number, float(binom.isf(CHANCE, number, highest)) / number
