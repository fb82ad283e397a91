"""The folder of a tracker: a run.json per measured step, and what holds them together."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hessdiag.errors import UsageError
from hessdiag.folders import complete, write_together
from hessdiag.results import load_run
from hessdiag.results.analysis import SAVED
from hessdiag.track.trajectory import Point, Rate, Trajectory

TRAJECTORY, HISTORY = "trajectory.json", "history.csv"
RUN = re.compile(r"step-[0-9]+")


def save(folder: str | Path, trajectory: Trajectory, history: str) -> Path:
    """Write a run folder per measured point, then ``trajectory.json`` and ``history.csv``.

    Args:
        folder: made if missing; runs that are in it already are not written again.
        trajectory: of points at training steps; these name the run folders.
        history: CSV text.

    Returns:
        The folder.

    Raises:
        OutputError: it cannot be written.
    """
    folder, points, before = Path(folder), list[Point](), _runs_in(Path(folder))
    for point in trajectory.points:
        path = "" if point.analysis is None else f"step-{point.at:07d}"
        if point.analysis is not None and not _holds(folder / path / "run.json", point.analysis.to_json()):
            point.analysis.save(folder / path)
        points.append(replace(point, path=path))
    named = replace(trajectory, points=tuple(points))
    write_together(folder, {TRAJECTORY: named.to_json(), HISTORY: history})
    for left in before - {point.path for point in points}:  # of an earlier training: none of it stays beside these
        write_together(folder / left, {}, SAVED)
        with suppress(OSError):  # a file of the user's is in it
            (folder / left).rmdir()
    return folder


def _runs_in(folder: Path) -> set[str]:
    """Run folders that an earlier save into this folder made."""
    try:
        entries = json.loads((folder / TRAJECTORY).read_text(encoding="utf-8"))["checkpoints"]
        return {one["path"] for one in entries if RUN.fullmatch(one["path"]) and (folder / one["path"]).is_dir()}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def load(folder: str | Path) -> Trajectory:
    """Read the folder back.

    Raises:
        UsageError: it is none that a tracker wrote, or one of its runs is missing.
    """
    folder = Path(folder)
    complete(folder)
    try:
        content = json.loads((folder / TRAJECTORY).read_text(encoding="utf-8"))
        points = tuple(_point(folder, entry) for entry in content["checkpoints"])
        return Trajectory(points=points, notes=tuple(content["notes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{folder} is no folder of a tracker ({type(error).__name__}): give the one of tracker.save(folder)"
        raise UsageError(msg) from error


def _point(folder: Path, entry: dict[str, Any]) -> Point:
    step = entry.get("step")
    rate = (
        None if step is None else Rate(**{name: step[name] for name in ("lr", "momentum", "nesterov", "origin")})
    )
    return Point(
        name=entry["name"],
        path=entry["path"],
        analysis=load_run(folder / entry["path"]) if "metrics" in entry else None,
        error=entry["error"] or "",
        rate=rate,
        warm=entry.get("warm_start", False),
        at=entry["training_step"],
    )


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except OSError:
        return False
