"""How long ``hessdiag --help`` takes, beside an interpreter that imports click and nothing else."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.tables import Row
from benchmarks.timing import child_seconds

RUNS = 20
COMMANDS = {
    "hessdiag --help": (sys.executable, "-m", "hessdiag", "--help"),
    "python -c 'import click'": (sys.executable, "-c", "import click"),
    "python -c 'import torch'": (sys.executable, "-c", "import torch"),
}


def run(data: str | None = None, quick: bool = False) -> list[Row]:  # noqa: ARG001
    """Median wall and CPU time over `RUNS` runs, interleaved so that a busy machine is busy for all."""
    runs = 3 if quick else RUNS
    names = [name for name in COMMANDS if not (quick and "torch" in name)]
    walls: dict[str, list[float]] = {name: [] for name in names}
    processors: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            start = time.perf_counter()
            processors[name].append(child_seconds(lambda n=name: _call(COMMANDS[n])))
            walls[name].append(time.perf_counter() - start)
    rows = []
    for label, times in (("wall s", walls), ("CPU s", processors)):
        base = statistics.median(times["python -c 'import click'"])
        for name in names:
            median = statistics.median(times[name])
            spread = f"{min(times[name]):.3f} to {max(times[name]):.3f} s, {runs} runs"
            rows.append(Row("startup", name, label, median, median / base, spread))
    return rows


def _call(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
