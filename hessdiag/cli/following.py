"""``hessdiag analyze --track``: one checkpoint after another, in the order of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hessdiag.cli.output import command_line, draw, say, sayer
from hessdiag.cli.spelling import flagged_page
from hessdiag.cli.stdout import message, reserve, result
from hessdiag.cli.store import cache_asked
from hessdiag.errors import LoadError, UsageError
from hessdiag.files import CACHE, cache_folder
from hessdiag.folders import write_together
from hessdiag.formatting import clock, to_go
from hessdiag.results import Store
from hessdiag.settings import Settings
from hessdiag.shown import csv_text
from hessdiag.sources.many import CheckpointFile, checkpoints

if TYPE_CHECKING:
    from hessdiag.analysis import Measurement
    from hessdiag.results import Analysis
    from hessdiag.sources.factory import Built
    from hessdiag.spectral.warm import Warm
    from hessdiag.track.trajectory import Point, Trajectory

KEPT = "checkpoints"  # in the folder of -o


def follow(
    patterns: tuple[str, ...],
    load: Callable[[str], Built],
    asked: Settings,
    *,
    folder: Path | None,
    lr: float | None,
    fresh: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure the checkpoints, print their table and write the files of ``-o``.

    Returns:
        The exit code: 0, or 4 where a checkpoint could not be measured; the others are shown all the same.

    Raises:
        UsageError: no pattern, or a rate that is none.
        LoadError: a pattern matches nothing, or no checkpoint could be measured.
    """
    if lr is not None and not 0 < lr < float("inf"):
        msg = f"--lr {lr}: a learning rate is more than 0"
        raise UsageError(msg)
    files = checkpoints(patterns)
    reserve()
    where = folder / KEPT if folder else cache_folder(cache_asked(), "track", CACHE)
    store = Store(folder=where, say=sayer(quiet=quiet), results=folder is not None)
    trajectory = _followed(files, load, asked, store, lr, fresh=fresh, quiet=quiet)
    show_trajectory(trajectory, folder, as_json=as_json, quiet=quiet)
    for point in trajectory.failed:
        message(f"hessdiag: {point.name}: {point.error}")
    if not trajectory.measured:
        msg = f"none of {len(files)} checkpoints could be measured: mend the first and try again"
        raise LoadError(msg)
    return LoadError.exit_code if trajectory.failed else 0


def _followed(
    files: tuple[CheckpointFile, ...],
    load: Callable[[str], Built],
    asked: Settings,
    store: Store,
    lr: float | None,
    *,
    fresh: bool,
    quiet: bool,
) -> Trajectory:
    from hessdiag.cli.measuring import measured
    from hessdiag.track.follow import Follower
    from hessdiag.track.trajectory import Trajectory

    follower = Follower(asked, lr, keep=store.keep, say=sayer(quiet=quiet))
    if not fresh:
        follower.recall = store.recall
    points: list[Point] = []
    ended, begun = False, time.monotonic()

    def run(measurement: Measurement, /, *, warm: Warm | None) -> Analysis:
        nonlocal ended
        passed, done = time.monotonic() - begun, len(points)
        whole = f", all of them {clock(passed)}{to_go(passed, done, len(files))}" if done else ""
        title = f"{done + 1} of {len(files)}: {files[done].name}{whole}"
        analysis, ended = measured(measurement, quiet=quiet, title=title, warm=warm)
        return analysis

    try:
        for number, file in enumerate(files, 1):
            points.append(follower.point(file.name, file.path, partial(load, file.path), run))
            say([f"{number} of {len(files)} {file.name}: {_outcome(points[-1])}"], quiet=quiet)
            if ended:
                left = f"the same command measures {file.name} again and goes on from there"
                say([f"{number} of {len(files)} are shown: {left}"], quiet=quiet)
                break
    except KeyboardInterrupt:
        say([f"{len(points)} of {len(files)} are kept: the same command goes on from there"], quiet=quiet)
        raise
    return Trajectory(points=tuple(points), notes=tuple(follower.notes))


def _outcome(point: Point) -> str:
    if point.analysis is None:
        return "not measured"
    if point.reused:
        return "measured before"
    cost = point.analysis.cost
    return f"{cost.products} products, {cost.seconds:.3g} s"


def show_trajectory(trajectory: Trajectory, folder: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Print the table of a trajectory and write its page, picture, CSV and JSON.

    Args:
        trajectory: measured, by whom ever.
        folder: for the files; None writes none.
        as_json: one document in the place of the table.
        quiet: no notes.
    """
    from hessdiag.present.vector import svg
    from hessdiag.track.page import evolution_caption, terminal_trajectory, trajectory_page
    from hessdiag.track.plots import evolution

    if folder is not None:
        contents = {"trajectory.csv": csv_text(trajectory.to_frame())}
        if trajectory.measured:
            text = svg(evolution(trajectory), title="trajectory", description=evolution_caption(trajectory))
            contents["evolution.svg"] = text
        contents["report.html"] = flagged_page(trajectory_page(trajectory, command_line()))
        contents["trajectory.json"] = trajectory.to_json()
        write_together(folder, contents, ("evolution.svg",))
    if as_json:
        result(trajectory.to_json(), nl=False)
    else:
        draw(lambda width: terminal_trajectory(trajectory, width), width=120)
    if folder is not None:
        say([f"written: {folder}/trajectory.json, trajectory.csv, evolution.svg, report.html"], quiet=quiet)
