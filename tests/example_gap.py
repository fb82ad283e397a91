"""Records of checkpoints that were never trained, with a known relation between measures and the gap."""

from __future__ import annotations

import math

import numpy as np

from hessdiag.errors import Refused
from hessdiag.gap.performance import Performance, SplitPerformance
from hessdiag.gap.record import CheckpointRecord, Moved
from hessdiag.gap.registry import Reading, registry
from hessdiag.gap.statistics.means import Score
from hessdiag.results import Fingerprint

ODD = "lr=0.1 <b>&\"'|\N{LATIN SMALL LETTER E WITH ACUTE}/last"


def score(value: float, half: float, n: int = 1000) -> Score:
    return Score(value=value, lo=value - half, hi=value + half, n=n, method="made up")


def record(
    index: int, gap: float, readings: dict[str, Reading | Refused], name: str = "", **more
) -> CheckpointRecord:
    train, test = score(0.1, 0.01), score(0.1 + gap, 0.02)
    right = score(0.99, 0.005), score(0.99 - gap, 0.01)
    refused = Score(n=1000, reason="cannot tell: 1000 examples, needs 500 more")
    performance = Performance(
        splits=(
            SplitPerformance(split="train", n=1000, loss=train, score=right[0], calibration=refused),
            SplitPerformance(split="test", n=1000, loss=test, score=right[1], calibration=refused),
        ),
        loss_gap=score(gap, 0.02),
        score_gap=score(-gap, 0.01),
        loss_floor="no",
        accuracy_floor="yes",
        floor=0.01,
        confidence=0.95,
    )
    values = {
        "name": name or f"run{index}/last",
        "file": f"run{index}/last.pt",
        "sha256": f"{index:064x}",
        "meta": {"lr": (0.1, 0.3)[index % 2], "batch_size": (32, 64)[index // 2 % 2], "seed": index},
        "performance": performance,
        "readings": readings,
        "guard": {key: Moved(verdict="moved" if key == "up" else "did not move", after=1.0) for key in readings},
        "rescaled": "0 ×4, 2 ÷4",
        "fingerprint": Fingerprint(samples=1000, n_params=10, dtype="float32", loss="x", seed=0),
        "loss": 0.1,
    }
    return CheckpointRecord(**(values | more))


def records(n: int, measures: int = 0) -> list[CheckpointRecord]:
    """``up`` orders the checkpoints as the gap does, ``down`` against it, ``flat`` not; ``none`` is refused."""
    rng = np.random.default_rng(0)
    names = list(registry())[:measures]
    found = []
    for index in range(n):
        x = (index + 1) / n
        readings: dict[str, Reading | Refused] = {
            "up": Reading(x, x - 0.001, x + 0.001, "draws"),
            "down": Reading(-x, -x, math.inf, "search"),
            "flat": Reading(1.0, 1.0, 1.0, "exact"),
            "none": Refused("no such layer in this model"),
        }
        readings |= {
            name: Reading(v, v - 0.1, v + 0.1, "draws")
            for name, v in zip(names, rng.random(len(names)), strict=True)
        }
        found.append(record(index, 0.02 * x, readings, ODD if index == 1 else ""))
    return found
