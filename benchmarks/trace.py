"""What the trace costs to a true 1 %, every tool; ReLU networks have it exactly, smooth ones partly by probes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.accuracy import table
from benchmarks.tables import Row


def run(data: str | None, quick: bool = False, names: Sequence[str] = (), device: str = "cpu") -> list[Row]:
    """Two rows per workload and tool: seconds and gradients."""
    return table(("trace",), data, quick, names, device)
