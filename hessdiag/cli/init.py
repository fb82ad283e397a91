"""``hessdiag init``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli.options import FACTORY, PROBLEM, click_options
from hessdiag.cli.options import options as on_command
from hessdiag.cli.output import say
from hessdiag.cli.stdout import message, result
from hessdiag.errors import UsageError
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import DEFAULT
from hessdiag.shown import inert

if TYPE_CHECKING:
    from hessdiag.check.recorded import Entry, Recorded

BUDGETED = ("lambda_max", "trace")
LEAST = 0.10  # of the value; the habit of codecov, asv and Lighthouse
HALF_WIDTHS = 3  # a limit nearer than this to the noise would often be undecided
SNIPPETS = """
GitHub Actions, in a job that has installed your project, torch and hessdiag:

      - run: hessdiag check -o junit=hessdiag.xml

GitLab CI:

  sharpness:
    script: [hessdiag check -o junit=hessdiag.xml -o openmetrics=metrics.txt]
    artifacts: {{when: always, reports: {{junit: hessdiag.xml, metrics: metrics.txt}}}}

Commit {config} and {baseline}; when a change is meant: hessdiag baseline update --reason "..."
"""


@click.command(epilog=FACTORY)
@on_command(PROBLEM)
@click.option(
    "--quantities", default=",".join(BUDGETED), show_default=True, metavar="A,B", help="Quantities to budget."
)
@click.option("--metrics", hidden=True, help="The former name of --quantities.")
@on_command(click_options("samples", "split", "seed", "device"))
@click.option(
    "--baseline", default="tests/hessdiag-baseline.json", show_default=True, help="File of recorded values."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes.")
@click.option("--debug", is_flag=True, help="Show the traceback of a refusal.")
def init(
    *,
    recipe: Recipe,
    checkpoint: str | None,
    quantities: str,
    metrics: str | None,
    samples: int | None,
    split: str,
    seed: int,
    device: str | None,
    baseline: str,
    quiet: bool,
    debug: bool,  # noqa: ARG001
) -> None:
    """Set up the check of a repository: measure once, write budgets and the first baseline."""
    from hessdiag.check.render import append_to, render
    from hessdiag.check.rules import MAX_PROBES
    from hessdiag.files import require_writable, write_whole

    if metrics is not None:
        message("hessdiag: --metrics is --quantities now")
    target = _target(Path(baseline))
    prefix = ("tool", "hessdiag") if target.name == "pyproject.toml" else ()
    names = [name.strip() for name in (metrics or quantities).split(",") if name.strip()]
    given: dict[str, Any] = {"samples": samples, "split": split, "seed": seed, "device": device}
    run = {key: value for key, value in given.items() if value is not None}
    recipe.check(checkpoint)
    table: dict[str, Any] = {"schema": 1, **recipe.keys(), **({"checkpoint": checkpoint} if checkpoint else {})}
    trial = {
        **table,
        "run": run,
        "check": {"baseline": baseline, "budgets": {n: {"max_increase": 0} for n in names}},
    }
    for place in (target, Path(baseline)):  # nothing is made there yet
        require_writable(next(folder for folder in place.resolve().parents if folder.exists()))
    entry = _first_look(trial, quiet)
    limits = {name: _limits(name, entry.metrics[name]) for name in names}
    comments = {n: _comment(entry.metrics[n]) for n in names}
    run["samples"] = entry.fingerprint.samples
    check = {"baseline": baseline, "confidence": DEFAULT.confidence, "max_probes": MAX_PROBES, "budgets": limits}
    block = render({**table, "run": run, "check": check}, comments, prefix=prefix)
    from hessdiag.check.baseline import updated

    text = append_to(target, block) if target.exists() else block
    updated(Path(baseline), {split: entry})
    try:
        write_whole(target.resolve(), text)
    except BaseException:  # a baseline without a configuration would be in the way of the next init
        Path(baseline).unlink(missing_ok=True)
        raise
    result(inert(block), nl=False)
    say([f"written: {target} and {baseline}"], quiet=quiet)
    result(inert(SNIPPETS.format(config=target, baseline=baseline)), nl=False)


def _target(baseline: Path) -> Path:
    """Where the configuration goes: pyproject.toml if there is one; refused where one is configured already."""
    from hessdiag.check.config import find_config

    try:
        there = find_config()
    except UsageError:
        there = None
    if there is not None and there.parent == Path.cwd():
        msg = f"{there.name} configures hessdiag already: change it there, then hessdiag baseline update --reason"
        raise UsageError(msg)
    if baseline.exists():
        msg = f"--baseline {baseline} is there already: delete it, or name another file"
        raise UsageError(msg)
    return Path("pyproject.toml") if Path("pyproject.toml").exists() else Path("hessdiag.toml")


def _first_look(trial: dict[str, Any], quiet: bool) -> Entry:
    """Measure as ``baseline update`` will, with a configuration that exists nowhere yet."""
    from hessdiag.check.config import OWN, load_config
    from hessdiag.check.render import render
    from hessdiag.cli.baseline import record

    config = load_config(Path(OWN), {}, render(trial, prefix=()))
    return next(iter(record(config, "initial", fresh=False, quiet=quiet).values()))


def _limits(name: str, measured: Recorded) -> dict[str, Any]:
    """A tolerance no noise exceeds: 10%, or 3 half-widths; absolute where the value may be zero."""
    half = (measured.hi - measured.lo) / 2
    kind = "max_decrease" if name in ("lambda_min", "ws_lower") else "max_increase"
    if measured.lo <= 0 <= measured.hi:
        floor = _upwards(max(HALF_WIDTHS * half, 1e-6))
        return {"level": "error", kind: floor}
    percent = math.ceil(100 * max(LEAST, HALF_WIDTHS * half / abs(measured.value)))
    return {"level": "error", kind: f"{percent}%", "abs_floor": _upwards(1e-3 * abs(measured.value))}


def _upwards(number: float) -> float:
    """To one significant digit, never less."""
    step = 10.0 ** math.floor(math.log10(number)) if number > 0 else 1e-6
    return float(f"{math.ceil(number / step) * step:.1g}")


def _comment(measured: Recorded) -> str:
    from hessdiag.check.verdict import Interval

    return f"measured {Interval(measured.value, measured.lo, measured.hi, measured.kind).words()}"
