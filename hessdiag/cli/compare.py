"""``hessdiag compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli import ranks
from hessdiag.cli.options import MEASUREMENT, OUTPUT, PROBLEM, SAMPLES, load, options, settings
from hessdiag.cli.output import draw, page_of, say, sayer
from hessdiag.cli.progress import display
from hessdiag.cli.stdout import reserve, result, silent
from hessdiag.errors import UsageError
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import PAIRED

if TYPE_CHECKING:
    from hessdiag.check.subject import Source
    from hessdiag.results import Analysis


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--problem", "factory", metavar="FACTORY", help="Measure both checkpoints in this problem.")
@options(PROBLEM[2:], SAMPLES, MEASUREMENT)
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page of both.")
@options(OUTPUT)
def compare(
    *,
    first: str,
    second: str,
    recipe: Recipe,
    html: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,  # noqa: ARG001
    **measurement: Any,
) -> None:
    """Compare FIRST and SECOND in pairs: same samples, same probes.

    They are two folders of analyze -o; or, with --problem or --model, two checkpoints, measured here.
    """
    asked = settings(**measurement)
    if not recipe.keys():
        _require_runs(first, second)
    reserve()
    with display(quiet=quiet or as_json) as report:
        from hessdiag.check.budgets import METRICS, Scope
        from hessdiag.check.comparison import compare as compared
        from hessdiag.check.subject import Recordings, Subject
        from hessdiag.results import load_run

        sources: list[Source] = []
        analyses: dict[str, Analysis] = {}
        scope = Scope(asked.split)
        if not recipe.keys():
            runs = [load_run(path) for path in (first, second)]
            scope = Scope(str(runs[0].fingerprint.split or asked.split))
            sources += [Recordings.of_runs([run], "the other was measured on it") for run in runs]
            analyses = dict(zip((first, second), runs, strict=True))
        else:
            told = sayer(quiet=quiet or as_json)
            for checkpoint in (first, second):
                built = load(recipe, checkpoint)
                say(built.notes, quiet=quiet or as_json)
                run = {
                    k: v for k, v in measurement.items() if k not in ("quantities", "confidence", "rtol", "probes")
                }
                about = (checkpoint, built.weights.sha256 if built.weights else None)
                sources.append(
                    Subject(built.problem, run, report=report, say=told, about=about, group=ranks.group())
                )
        metrics = [name for name in METRICS if name in asked.quantities]
        wanted = {
            "probes": asked.probes or PAIRED["probes"],
            "rtol": asked.rtol or PAIRED["rtol"],
            "confidence": asked.confidence,
        }
        rows = compared(sources[0], sources[1], scope, metrics, wanted)
        for source, name in zip(sources, (first, second), strict=True):
            if isinstance(source, Subject):
                analyses[name] = source.analyses[scope.label]
    if as_json:
        result(json.dumps({"first": first, "second": second, "metrics": [row.to_dict() for row in rows]}))
    else:
        from hessdiag.check.writers import comparison

        draw(lambda width: comparison(rows, first, second, width), width=140)
    if html is not None and not silent():
        from hessdiag.files import write_whole

        say([f"written: {write_whole(html, page_of(analyses))}"], quiet=quiet)


def _require_runs(*paths: str) -> None:
    for path in paths:
        if Path(path).suffix not in ("", ".json"):
            msg = (
                f"compare {path}: to measure checkpoints give --problem FACTORY; or name two folders of analyze -o"
            )
            raise UsageError(msg)
