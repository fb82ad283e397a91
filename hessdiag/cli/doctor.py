"""``hessdiag doctor``."""

from __future__ import annotations

import json
from typing import Any

import click

from hessdiag.cli import ranks
from hessdiag.cli.options import FACTORY, MEASUREMENT, OUTPUT, PROBLEM, SAMPLES, SPENDING, load, options, settings
from hessdiag.cli.output import tell
from hessdiag.cli.resolved import PRINT_CONFIG
from hessdiag.cli.resolved import print_config as print_resolved
from hessdiag.cli.stdout import reserve, result
from hessdiag.schemes.recipe import Recipe

MARKS = {"ok": "ok  ", "note": "note", "warning": "WARN", "fault": "FAIL"}


@click.command(epilog=FACTORY)
@options(PROBLEM, SAMPLES, MEASUREMENT, SPENDING, (PRINT_CONFIG,), OUTPUT)
def doctor(
    *,
    recipe: Recipe,
    checkpoint: str | None,
    print_config: bool,
    as_json: bool,
    quiet: bool,  # noqa: ARG001  (a report has nothing to leave out)
    debug: bool,  # noqa: ARG001
    **measurement: Any,
) -> int:
    """Check that a problem can be measured, and forecast what analyze would take with the same options.

    Exit code 4 if it cannot be measured.
    """
    asked = settings(**measurement)
    reserve()
    built = load(recipe, checkpoint)
    if print_config:
        print_resolved(recipe, built, asked, as_json=as_json)
        return 0

    from hessdiag.analysis import Measurement

    ready = Measurement(built.problem, asked, group=ranks.group())
    findings = ready.checked.findings
    failed = any(finding.level == "fault" for finding in findings)
    if as_json:
        rows = [{"level": f.level, "check": f.check, "text": f.text} for f in findings]
        result(json.dumps({"findings": rows, "notes": built.notes, "forecast": ready.forecast()}))
        return 4 if failed else 0
    for note in built.notes:
        tell(f"{MARKS['note']}  checkpoint     {note}")
    for finding in findings:
        tell(f"{MARKS[finding.level]}  {finding.check:<14} {finding.text}")
    tell(f"{MARKS['note']}  cost           {ready.forecast()}")
    verdict = "not measurable as it is" if failed else "fit to be measured: hessdiag analyze"
    tell(verdict)
    return 4 if failed else 0
