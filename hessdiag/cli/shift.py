"""``hessdiag shift``: accuracy of checkpoints as their test data move away from the training data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli import stdout
from hessdiag.cli.gap import MANY
from hessdiag.cli.options import FACTORY, FRESH, OUTPUT, PAGE_FOLDER, click_options, flags, load, options
from hessdiag.cli.output import command_line, draw, say, sayer
from hessdiag.cli.progress import display
from hessdiag.cli.spelling import flagged_page
from hessdiag.cli.stdout import reserve
from hessdiag.errors import HessdiagError, MeasurementError, Refused, UsageError, one_line
from hessdiag.schemes.recipe import Recipe
from hessdiag.shift.settings import TESTS, ShiftSettings
from hessdiag.shown import csv_text

if TYPE_CHECKING:
    from hessdiag.shift.experiments import ShiftCurve
    from hessdiag.shift.report import ShiftReport

TESTING = (
    *click_options("tests", "train", "test", "other", of=ShiftSettings, tests=None),
    click.option("--reference", metavar="NAME", help="Checkpoint the others are compared with.  [the first]"),
    *click_options("samples", "scale", "shifts", "components", "exclude", "strengths", of=ShiftSettings),
    *click_options("score", "labels", "seed", "confidence", of=ShiftSettings),
    FRESH,
    PAGE_FOLDER,
)


@click.command(epilog=FACTORY)
@options(MANY, TESTING, OUTPUT)
def shift(
    *,
    recipe: Recipe,
    patterns: tuple[str, ...],
    tests: tuple[str, ...] | None,
    other: str | None,
    reference: str | None,
    fresh: bool,
    folder: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,  # noqa: ARG001  (read from the arguments, before anything can fail)
    **asked: Any,
) -> None:
    """Test checkpoints on shifted data: reweighted, distorted, far from training, or from another source."""
    from hessdiag.files import require_writable

    if folder is not None:
        require_writable(folder)
    quiet = quiet or as_json

    from hessdiag.files import CACHE, cache_folder
    from hessdiag.resume import RESUME
    from hessdiag.shift.kept import KeptScores, Prepared
    from hessdiag.shift.report import ShiftReport, shift_curves
    from hessdiag.sources.many import checkpoints

    with flags():
        given = {"other": other, "findings": asked["labels"]}
        every = tuple(name for name in TESTS if given.get(name, True))
        settings = ShiftSettings(tests=every if tests is None else tests, other=other, **asked)
    files = checkpoints(patterns)
    if reference is not None and reference not in (names := [one.name for one in files]):
        msg = f"--reference {reference}: there are {', '.join(names)}"
        raise UsageError(msg)
    curves, refused, failures = {}, {}, {}
    prepared, kept = Prepared(), KeptScores(cache_folder(None, RESUME, CACHE / RESUME), fresh=fresh)
    reserve()
    with display(quiet=quiet) as report:
        for number, one in enumerate(files):
            report(f"checkpoints: {one.name}", number, len(files))
            try:
                built = load(recipe, one.path)
                found: dict[str, ShiftCurve | Refused] = {}
                report(f"tests: {settings.tests[0]}", 0, len(settings.tests))
                told = sayer(quiet=quiet)
                for test, curve in shift_curves(built.problem, settings, prepared, say=told, kept=kept):
                    found[test] = curve
                    following = settings.tests[len(found) :][:1]
                    report(f"tests: {''.join(following)}", len(found), len(settings.tests))
            except HessdiagError as error:
                failures[one.name] = one_line(error)
                say([f"{one.name}: {failures[one.name]}"], quiet=quiet)
                continue
            curves[one.name] = {test: curve for test, curve in found.items() if not isinstance(curve, Refused)}
            refused[one.name] = {test: why.reason for test, why in found.items() if isinstance(why, Refused)}
        report("checkpoints", len(files), len(files))
    result = ShiftReport(curves, refused, failures, reference, settings)
    if not any(curves.values()):
        reasons = [*failures.values(), *(why for found in refused.values() for why in found.values())]
        msg = f"no test could be made of {len(files)} checkpoints; the first: {reasons[0]}"
        raise MeasurementError(msg)
    _show(result, folder, as_json=as_json, quiet=quiet)
    kept.forget()
    say(kept.notes, quiet=quiet)
    if failures:
        msg = f"{len(failures)} of {len(files)} checkpoints could not be tested: {', '.join(failures)}"
        raise MeasurementError(msg)


def _show(result: ShiftReport, folder: Path | None, *, as_json: bool, quiet: bool) -> None:
    from hessdiag.folders import write_together
    from hessdiag.shift.page import shift_page, shift_tables

    if folder is not None:
        contents = {
            "shift.html": flagged_page(shift_page(result, command_line())),
            "shift.csv": csv_text(result.to_frame()),
            "shift.json": result.to_json(),
        }
        write_together(folder, contents)
    if as_json:
        stdout.result(result.to_json(), nl=False)
    else:
        draw(lambda width: shift_tables(result, width), width=120)
    say([f"written: {folder}/shift.html, shift.csv, shift.json"] if folder else [], quiet=quiet)
