"""Several tests on the same data: what each p is worth."""

from __future__ import annotations


def holm(p: list[float]) -> list[float]:
    """Holm's (1979) step-down adjustment: each p for having tried len(p) measures, in the order given."""
    order = sorted(range(len(p)), key=lambda index: p[index])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted
