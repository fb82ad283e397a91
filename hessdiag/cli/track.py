"""``hessdiag track``: what a `hessdiag.Tracker` saved during training."""

from __future__ import annotations

from pathlib import Path

import click

from hessdiag.cli.options import OUTPUT, PAGE_FOLDER, options
from hessdiag.cli.stdout import message, reserve
from hessdiag.errors import UsageError


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@options((PAGE_FOLDER,), OUTPUT)
def track(*, run: Path, folder: Path | None, as_json: bool, quiet: bool, debug: bool) -> None:  # noqa: ARG001
    """Show the trajectory in RUN, the folder of tracker.save(): table, and page with -o.

    Checkpoints that lie on disk are followed by analyze --track.
    """
    from hessdiag.cli.following import show_trajectory
    from hessdiag.files import require_writable
    from hessdiag.track.saved import load

    if folder is not None and folder.resolve() == run.resolve():
        msg = f"-o {folder}: this is the folder of the run; name another for the page"
        raise UsageError(msg)
    trajectory = load(run)
    if folder is not None:
        require_writable(folder)
    reserve()
    show_trajectory(trajectory, folder, as_json=as_json, quiet=quiet or as_json)
    for point in trajectory.failed:
        message(f"hessdiag: {point.name}: {point.error}")
