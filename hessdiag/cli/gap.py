"""``hessdiag gap``: many checkpoints, what of their sharpness goes with generalization, one page."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli import stdout
from hessdiag.cli.options import (
    FACTORY,
    OUTPUT,
    PAGE_FOLDER,
    PROBLEM,
    SAMPLES,
    click_options,
    flags,
    options,
    settings,
)
from hessdiag.cli.output import draw, say
from hessdiag.cli.progress import display
from hessdiag.cli.spelling import flagged_page
from hessdiag.cli.stdout import message, reserve
from hessdiag.errors import MeasurementError, OutputError
from hessdiag.files import CACHE
from hessdiag.formatting import format_seconds
from hessdiag.gap.settings import GapSettings
from hessdiag.option import options_of
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import PAIRED
from hessdiag.shown import csv_text, plain

if TYPE_CHECKING:
    from hessdiag.gap.record import CheckpointRecord
    from hessdiag.gap.report import GapReport
    from hessdiag.gap.survey import Survey

RECORDS = CACHE / "gap"
OWNED = ("gap.html", "gap.csv", "gap.json")  # in the folder of -o

MANY = (
    PROBLEM[0],
    click.option(
        "-c",
        "--checkpoint",
        "patterns",
        metavar="GLOB",
        multiple=True,
        required=True,
        help="Checkpoints, 'runs/*/last.pt'; repeatable; ::KEY takes an entry of each.",
    ),
    *PROBLEM[2:],
)
MEASURES = (
    *click_options("measures", "guard", "test", "evaluate", of=GapSettings),
    click.option("--init", "start", metavar="FILE", help="Weights before training, to measure distances from."),
    *click_options("rtol", "probes", "confidence", **PAIRED),
)
RANKING = (
    click.option("--gap", type=click.Choice(["error", "loss"]), help="What to rank against.  [error, if classes]"),
    click.option(
        "--group-by", metavar="NAME", multiple=True, help="Hyper-parameters to group by.  [all that vary]"
    ),
    click.option(
        "--one-run/--no-one-run",
        default=None,
        help="All checkpoints are of one run, or each of its own.  [as folders, names and epochs tell]",
    ),
    click.option("--meta-from", metavar="REGEX", help="Hyper-parameters read from paths: 'lr(?P<lr>[0-9.]+)'."),
)
WRITTEN = (
    click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the page here."),
    click.option("--csv", "table", type=click.Path(dir_okay=False, path_type=Path), help="Write a tidy table."),
    PAGE_FOLDER,
    click.option(
        "--jobs", type=int, default=1, show_default=True, help="Number of checkpoints to measure at the same time."
    ),
    click.option("--fresh", is_flag=True, help="Measure again, even if a result is kept."),
)


@click.command(epilog=FACTORY)
@options(MANY, SAMPLES, MEASURES, RANKING, WRITTEN, OUTPUT)
def gap(
    *,
    recipe: Recipe,
    patterns: tuple[str, ...],
    gap: str | None,
    group_by: tuple[str, ...],
    html: Path | None,
    table: Path | None,
    folder: Path | None,
    jobs: int,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **asked: Any,
) -> None:
    """Hold sharpness against generalization over many checkpoints.

    Hyper-parameters come from Problem.meta, from the checkpoint file, from a .json beside it, or from its path.
    What was measured is kept in .hessdiag/cache/gap: one more checkpoint costs one more measurement.
    """
    from hessdiag.files import require_place

    targets = _targets(folder, html, table)
    for target in targets.values():
        require_place(target)
    how = _survey(recipe, jobs, asked)

    from hessdiag.gap.report import GapReport
    from hessdiag.sources.many import checkpoints

    files = [(one.name, one.path) for one in checkpoints(patterns)]
    records, failures = _measure(files, how, jobs, quiet=quiet or as_json, debug=debug)
    result = GapReport(
        records,
        failures,
        gap,  # type: ignore[arg-type]
        group_by or None,
        asked["confidence"],
        asked["seed"],
        asked["one_run"],
    )
    unwritten = _write(result, targets, folder)
    if as_json:
        stdout.result(result.to_json(), nl=False)
    else:
        from hessdiag.gap.text import gap_tables

        draw(lambda width: gap_tables(result, width), width=140)
    if unwritten is not None:
        raise unwritten
    say([f"written: {', '.join(map(str, targets.values()))}"] if targets else [], quiet=quiet)
    if failures:
        names = plain(", ".join(failures))
        msg = f"{len(failures)} of {len(files)} checkpoints could not be measured: {names}"
        raise MeasurementError(msg)


def _measure(
    files: list[tuple[str, str]], how: Survey, jobs: int, *, quiet: bool, debug: bool
) -> tuple[tuple[CheckpointRecord, ...], dict[str, str]]:
    """Records in the order of the files, and why the others have none."""
    from hessdiag.gap.survey import survey

    records, failures, kept = {}, {}, 0
    reserve()
    with display(quiet=quiet) as report:
        report(f"checkpoints: {files[0][0]}", 0, len(files))
        found = survey(files, how, jobs=jobs, report=report, say=_once(quiet=quiet))
        try:
            with closing(found):
                for number, one in enumerate(found, start=1):
                    if one.record is None:
                        failures[one.name] = one.reason
                        if debug:
                            message(one.traceback.rstrip(), lines=True)
                    else:
                        records[one.name] = one.record
                        kept += not one.reason
                    say([_progress(one, number, len(files))], quiet=quiet)
                    say(_left(one, number, len(files), jobs), quiet=quiet)
                    following = files[number][0] if number < len(files) and jobs == 1 else ""
                    report(f"checkpoints: {following}", number, len(files))
        except KeyboardInterrupt:
            again = "the same command" + " without --fresh" * how.fresh
            say([f"{kept} of {len(files)} are kept: {again} goes on from there"], quiet=quiet)
            raise
    if not records:
        first = next(iter(failures.values()))
        msg = f"none of {len(files)} checkpoints could be measured; the first: {first}"
        raise MeasurementError(msg)
    ordered = tuple(records[name] for name, _ in files if name in records)
    return ordered, {name: failures[name] for name, _ in files if name in failures}


def _targets(folder: Path | None, html: Path | None, table: Path | None) -> dict[str, Path]:
    found = {} if folder is None else {Path(name).suffix[1:]: folder / name for name in OWNED}
    return found | ({"html": html} if html else {}) | ({"csv": table} if table else {})


def _survey(recipe: Recipe, jobs: int, asked: dict[str, Any]) -> Survey:
    from hessdiag.gap.examine import CURVATURE, Examination
    from hessdiag.gap.survey import Survey

    names = ("samples", "batch_size", "seed", "split", "params", "operator", "dtype", "device", "method", "block")
    measured = {name: asked[name] for name in (*names, "rtol", "probes", "confidence")}
    measured |= {"quantities": CURVATURE}
    given = {name: asked[name] for name in options_of(GapSettings) if asked[name] != ()}
    with flags():
        examination = Examination(settings=settings(**measured), **given)
    return Survey(
        recipe=recipe,
        asked=examination,
        start=asked["start"],
        from_name=asked["meta_from"],
        cache=RECORDS,
        fresh=asked["fresh"],
        threads=max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None,
    )


def _once(*, quiet: bool) -> Any:
    """Says the first line it is given: the forecast of the first checkpoint stands for all; None for nobody."""
    if quiet:
        return None
    said: list[str] = []

    def talk(line: str) -> None:
        if not said:
            said.append(line)
            say([line], quiet=False)

    return talk


def _left(one: Any, number: int, total: int, jobs: int) -> list[str]:
    """After the first: what the others will take, judged by it."""
    if number != 1 or total == 1 or one.record is None or one.kept:
        return []
    seconds = one.record.seconds * (total - 1) / min(jobs, total - 1)
    return [f"by this one the other {total - 1} take about {format_seconds(seconds)}"]


def _progress(one: Any, number: int, total: int) -> str:
    if one.record is None:
        return plain(f"{number}/{total} {one.name}: {one.reason}")
    how = "kept from before" if one.kept else f"{one.record.seconds:.1f} s"
    return plain(f"{number}/{total} {one.name}: {how}" + (f"; {one.reason}" if one.reason else ""))


def _write(result: GapReport, targets: dict[str, Path], folder: Path | None) -> OutputError | None:
    """Write what was asked for, the files of a folder together; why one could not be, once all were tried."""
    from hessdiag.folders import write_files

    texts = {"html": lambda: _page(result), "csv": lambda: csv_text(result.to_frame()), "json": result.to_json}
    return write_files({target: texts[kind]() for kind, target in targets.items()}, folder, OWNED)


def _page(result: GapReport) -> str:
    import shlex

    from hessdiag.gap.page import gap_page

    return flagged_page(gap_page(result, f"hessdiag {shlex.join(click.get_current_context().obj)}"))
