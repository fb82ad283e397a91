"""Whether the forecast of `doctor` and `analyze` is right: products, seconds and memory beside what a run took.

Every measurement has a process of its own. Seconds are CPU time on one thread, of the run after the forecast;
memory is the peak of self-test, planning, forecast and run together, above what model, data and imports hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import ours
from benchmarks.tables import Row
from benchmarks.timing import GIVING_BACK, one_thread, peak_mib
from benchmarks.workloads import FORECAST_WORKLOADS, WORKLOADS, selected
from hessdiag.analysis import Measurement
from hessdiag.errors import one_line
from hessdiag.results import QUANTITIES, Analysis
from hessdiag.settings import Settings

WITHIN = 1.5  # the forecast is right where it is off by no larger factor
ASKED: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "--effort quick": {"effort": "quick"},
    "--quantities lambda_max": {"quantities": ("lambda_max",)},
    "--accuracy lambda_min=1e-4": {"accuracy": "lambda_min=1e-4"},
    "--budget 30p": {"budget": "30p"},
}
LEAST = {"products": 1.0, "seconds": 0.05, "MiB": 10.0}  # what counts as least: less does not matter


def run(data: str | None, quick: bool = False, names: Sequence[str] = ()) -> list[Row]:
    """Three rows per workload and options; value is the forecast over what was taken."""
    names = selected(names, data, quick, FORECAST_WORKLOADS)
    asked = list(ASKED)[:2] if quick else list(ASKED)
    return [row for name in names for text in asked for row in _rows(name, text, data)]


def _rows(name: str, asked: str, data: str | None) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks.forecast", name, asked, data or ""]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **GIVING_BACK})
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return [Row(name, "hessdiag", f"forecast ({asked})", None, None, f"crash: {one_line(last[0], 120)}")]
    told = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for what, least in LEAST.items():
        ahead, taken = told["ahead"][what], told["taken"][what]
        ratio = max(ahead, least) / max(taken, least)
        word = f"within {WITHIN:g}" if 1 / WITHIN <= ratio <= WITHIN else "NOT within"
        text = f"{ahead:.3g} forecast, {taken:.3g} taken: {word}"
        if what == "seconds":
            text += f"; the forecast itself {told['itself']:.2g} CPU s"
        rows.append(Row(name, "hessdiag", f"{what}, forecast / taken ({asked})", ratio, None, text))
    return rows


def _told(name: str, asked: str, data: str) -> dict[str, Any]:
    """In the child: forecast and run."""
    small = WORKLOADS["digits_mlp"]
    ours.analysis(small.problem(None), small, QUANTITIES)  # no import is timed or counted
    workload = WORKLOADS[name]
    problem = workload.problem(data or None)
    settings = Settings(samples=workload.samples, **ASKED[asked])
    times: list[float] = []

    def whole() -> tuple[Measurement, Analysis]:
        measurement = Measurement(problem, settings)
        times.append(time.process_time())
        measurement.forecast()
        times.append(time.process_time())
        found = measurement.run()
        times.append(time.process_time())
        return measurement, found

    peak, (measurement, found) = peak_mib(whole)
    begun, told, ended = times
    ahead = measurement.foreseen
    return {
        "ahead": {"products": ahead.products, "seconds": ahead.seconds, "MiB": ahead.bytes / 2**20},
        "taken": {"products": found.cost.products, "seconds": ended - told, "MiB": peak},
        "itself": told - begun,
    }


if __name__ == "__main__":
    one_thread()
    sys.stdout.write(json.dumps(_told(*sys.argv[1:])) + "\n")
