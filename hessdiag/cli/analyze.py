"""``hessdiag analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hessdiag.cli import ranks
from hessdiag.cli.options import (
    FACTORY,
    FRESH,
    MEASUREMENT,
    OUTPUT,
    PROBLEMS,
    SAMPLES,
    SPENDING,
    load,
    options,
    settings,
)
from hessdiag.cli.output import REPORT, say, show, write_run
from hessdiag.cli.resolved import PRINT_CONFIG
from hessdiag.cli.resolved import print_config as print_resolved
from hessdiag.cli.stdout import reserve, result
from hessdiag.cli.store import CACHE_FOLDER, cache_asked
from hessdiag.errors import UsageError
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.many import is_pattern


@click.command(epilog=FACTORY)
@options(PROBLEMS, SAMPLES, MEASUREMENT, SPENDING)
@CACHE_FOLDER
@click.option(
    "-o",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder to write run.json, plots and report to.",
)
@click.option("--cross-check", type=click.Choice(["pyhessian"]), help="Measure again with another tool.")
@click.option(
    "--track",
    "tracked",
    is_flag=True,
    help="Follow several checkpoints along training, in natural order of their names.",
)
@click.option("--lr", type=float, metavar="ETA", help="With --track: the learning rate, to draw the line 2/ETA.")
@click.option(
    "--shard-vectors",
    is_flag=True,
    help="Under torchrun: each process holds a part of every vector, for bases that fit in none.",
)
@options((FRESH, PRINT_CONFIG), OUTPUT)
def analyze(
    *,
    recipe: Recipe,
    checkpoints: tuple[str, ...],
    folder: Path | None,
    cross_check: str | None,
    tracked: bool,
    lr: float | None,
    fresh: bool,
    shard_vectors: bool,
    print_config: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,  # noqa: ARG001  (read from the arguments, before anything can fail)
    **measurement: Any,
) -> int:
    """Measure how sharp a checkpoint is, every number with its interval."""
    asked = settings(**measurement)
    checkpoint = _only(checkpoints, tracked=tracked, cross_check=cross_check, lr=lr)
    ranks.require_alone(tracked and "--track", cross_check and "--cross-check")
    if folder is not None and ranks.leads():
        from hessdiag.files import require_writable

        require_writable(folder)
    quiet = quiet or as_json
    if tracked:
        from hessdiag.cli.following import follow

        def one(path: str) -> Any:
            return load(recipe, path)

        return follow(checkpoints, one, asked, folder=folder, lr=lr, fresh=fresh, as_json=as_json, quiet=quiet)
    reserve()
    built = load(recipe, checkpoint)
    if print_config:
        print_resolved(recipe, built, asked, as_json=as_json)
        return 0

    from hessdiag.analysis import Measurement
    from hessdiag.cli.measuring import measured
    from hessdiag.files import CACHE, cache_folder
    from hessdiag.resume import RESUME

    say(built.notes, quiet=quiet)
    measurement_ = Measurement(built.problem, asked, group=ranks.group(shard_vectors=shard_vectors))
    place = cache_folder(cache_asked(), RESUME, CACHE / RESUME)
    say(filter(None, [measurement_.keep_in(place, fresh=fresh)]), quiet=quiet)
    if not quiet:  # a forecast forms products
        say([measurement_.forecast()], quiet=quiet)
    found, interrupted = measured(measurement_, quiet=quiet)
    found = found.about(checkpoint or recipe.name, built.notes, built.weights.sha256 if built.weights else None)
    if cross_check is not None:
        from hessdiag.integrations.pyhessian import cross_check as check

        found = check(measurement_, found)
    if folder is not None:
        write_run(found, folder, report=True)
    if as_json:
        result(found.to_json(), nl=False)
    else:
        show({found.title: found})
    say((f"note: {note}" for note in found.notes if note not in built.notes), quiet=quiet)
    if folder is not None:
        say([f"written: {folder}/run.json, plots, {folder}/{REPORT}"], quiet=quiet)
    if measurement_.kept is not None and not interrupted:
        measurement_.kept.forget()
    return 0


def _only(checkpoints: tuple[str, ...], *, tracked: bool, cross_check: str | None, lr: float | None) -> str | None:
    """The one checkpoint to analyze; None where there is none, or where they are tracked.

    Raises:
        UsageError: several without --track, or options that do not go together.
    """
    if tracked and not checkpoints:
        msg = "--track needs checkpoints: give -c 'run/epoch*.pt', a pattern in quotes, or several -c"
        raise UsageError(msg)
    if tracked and cross_check is not None:
        msg = "--cross-check with --track: another tool measures one checkpoint; drop one of the two"
        raise UsageError(msg)
    if tracked:
        return None
    if lr is not None:
        msg = f"--lr {lr} draws the 2/η line of a trajectory: add --track, or drop it"
        raise UsageError(msg)
    if len(checkpoints) > 1 or (checkpoints and is_pattern(checkpoints[0])):
        given = " and ".join(f"-c {spec}" for spec in checkpoints[:2]) + (" ..." if len(checkpoints) > 2 else "")
        msg = (
            f"{given}: analyze measures one checkpoint; add --track to follow several along training, "
            "or compare them with hessdiag gap"
        )
        raise UsageError(msg)
    return checkpoints[0] if checkpoints else None
