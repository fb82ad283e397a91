"""What the extreme eigenvalues cost: λ_max to a true 1e-3, λ_min to 1e-3 of the spectral radius, every tool."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.accuracy import table
from benchmarks.tables import Row

QUANTITIES = ("lambda_max", "lambda_min")


def run(
    data: str | None,
    quick: bool = False,
    names: Sequence[str] = (),
    device: str = "cpu",
    quantities: Sequence[str] = (),
) -> list[Row]:
    """Two rows per workload, quantity and tool: seconds and gradients."""
    return table(quantities or QUANTITIES, data, quick, names, device)
