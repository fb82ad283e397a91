"""Promise: ``python -m benchmarks all --quick`` runs anywhere, in under a minute, and its CSV is complete."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["workload", "tool", "quantity", "value", "ratio_to_best_peer", "accuracy"]
LIMIT_SECONDS = 120  # a minute on an idle machine


def faults(rows: list[dict[str, str]]) -> list[str]:
    """Everything about a quick run's rows that would make the tables worthless."""
    found = []
    if not rows or list(rows[0]) != COLUMNS:
        return [f"columns are not {COLUMNS}"]
    ours = [row for row in rows if row["tool"] == "hessdiag"]
    tools = {row["tool"].split(" (")[0] for row in rows}
    found += [
        f"no row of {tool}" for tool in ("hessdiag", "PyHessian", "eigenthings", "curvlinops") if tool not in tools
    ]
    found += [f"no {goal}" for goal in ("lambda_max to", "trace to") if not _any(ours, goal, with_value=True)]
    found += [f"hessdiag: {row['quantity']}: {row['accuracy']}" for row in ours if _bad(row)]
    found += [f"silent row {row}" for row in rows if not row["value"] and not row["accuracy"]]
    if not any("--help" in row["tool"] and row["ratio_to_best_peer"] for row in rows):
        found.append("startup has no ratio")
    return found


def _any(rows: list[dict[str, str]], text: str, with_value: bool) -> bool:
    return any(text in row["quantity"] and (bool(row["value"]) or not with_value) for row in rows)


def _bad(row: dict[str, str]) -> bool:
    return any(word in row["accuracy"] for word in ("WRONG", "crash", "MISSES", "not reached"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    file = tmp_path_factory.mktemp("benchmarks") / "quick.csv"
    command = [sys.executable, "-m", "benchmarks", "all", "--quick", "--csv", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_quick_run_is_complete(rows):
    assert faults(rows) == []


def _changed(rows, change):
    return [change(dict(row)) for row in rows]


BROKEN = {
    "hessdiag is left out": lambda rows: [row for row in rows if row["tool"] != "hessdiag"],
    "a peer is left out": lambda rows: [row for row in rows if not row["tool"].startswith("curvlinops")],
    "a wrong answer of ours": lambda rows: _changed(
        rows, lambda row: {**row, "accuracy": "WRONG, off by 2"} if row["tool"] == "hessdiag" else row
    ),
    "no reason given": lambda rows: _changed(rows, lambda row: {**row, "value": "", "accuracy": ""}),
    "a column is missing": lambda rows: [{k: v for k, v in row.items() if k != "accuracy"} for row in rows],
    "no rows": lambda rows: [],
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(rows, breakage):
    assert faults(breakage(rows)) != []
