"""``hessdiag gap``: many checkpoints, what of their sharpness goes with generalization, one page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli import stdout
from hessdiag.cli.options import (
    FACTORY,
    FRESH,
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
from hessdiag.cli.spelling import flagged_page
from hessdiag.cli.store import CACHE_FOLDER, cache_asked
from hessdiag.cli.surveying import measure_all, measure_part, require
from hessdiag.errors import OutputError, UsageError
from hessdiag.gap.settings import GapSettings
from hessdiag.option import options_of
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import PAIRED
from hessdiag.shown import csv_text

if TYPE_CHECKING:
    from hessdiag.gap.report import GapReport
    from hessdiag.gap.sweep import Survey

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
)
KEEPING = (
    CACHE_FOLDER,
    FRESH,
    click.option(
        "--shard",
        metavar="I/N",
        help="Measure one of N parts of the files and write no report; auto: the part of a job of a Slurm array.",
    ),
    click.option("--only-kept", is_flag=True, help="Report what is kept, and measure nothing."),
)


@click.command(epilog=FACTORY)
@options(MANY, SAMPLES, MEASURES, RANKING, WRITTEN, KEEPING, OUTPUT)
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
    shard: str | None,
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
    from hessdiag.gap.shard import Shard

    given = {"-o": folder, "--html": html, "--csv": table, "--json": as_json, "--only-kept": asked["only_kept"]}
    part = None if shard is None else Shard.of(shard)
    if part is not None:
        _refuse_beside_shard(given)
    targets = _targets(folder, html, table)
    for target in targets.values():
        require_place(target)
    how = _survey(recipe, jobs, asked)

    from hessdiag.gap.report import GapReport
    from hessdiag.sources.many import checkpoints

    files = [(one.name, one.path) for one in checkpoints(patterns)]
    if part is not None:
        measure_part(files, how, part, jobs, quiet=quiet, debug=debug)
        return
    records, failures = measure_all(files, how, jobs, quiet=quiet or as_json, debug=debug)
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
    require(files, failures)


def _refuse_beside_shard(given: dict[str, Any]) -> None:
    wrong = next((flag for flag, value in given.items() if value), None)
    if wrong is not None:
        msg = f"--shard with {wrong}: a part writes records alone; the same command without --shard reports them"
        raise UsageError(msg)


def _targets(folder: Path | None, html: Path | None, table: Path | None) -> dict[str, Path]:
    found = {} if folder is None else {Path(name).suffix[1:]: folder / name for name in OWNED}
    return found | ({"html": html} if html else {}) | ({"csv": table} if table else {})


def _survey(recipe: Recipe, jobs: int, asked: dict[str, Any]) -> Survey:
    from hessdiag.gap.examine import CURVATURE, Examination
    from hessdiag.gap.kept import records
    from hessdiag.gap.sweep import Survey

    names = ("samples", "batch_size", "seed", "split", "params", "operator", "dtype", "device", "method", "block")
    more = ("second_opinion", "rtol", "probes", "confidence")
    measured = {name: asked[name] for name in (*names, *more)}
    measured |= {"quantities": CURVATURE}
    given = {name: asked[name] for name in options_of(GapSettings) if asked[name] != ()}
    with flags():
        examination = Examination(settings=settings(**measured), **given)
    return Survey(
        recipe=recipe,
        asked=examination,
        start=asked["start"],
        from_name=asked["meta_from"],
        cache=records(cache_asked()),
        fresh=asked["fresh"],
        only_kept=asked["only_kept"],
        threads=max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None,
    )


def _write(result: GapReport, targets: dict[str, Path], folder: Path | None) -> OutputError | None:
    """Write what was asked for, the files of a folder together; why one could not be, once all were tried."""
    from hessdiag.folders import write_files

    texts = {"html": lambda: _page(result), "csv": lambda: csv_text(result.to_frame()), "json": result.to_json}
    return write_files({target: texts[kind]() for kind, target in targets.items()}, folder, OWNED)


def _page(result: GapReport) -> str:
    import shlex

    from hessdiag.gap.page import gap_page

    return flagged_page(gap_page(result, f"hessdiag {shlex.join(click.get_current_context().obj)}"))
