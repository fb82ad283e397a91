"""What the verbs of the gate share: the configuration with its flags, and the subject it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hessdiag.cli import ranks
from hessdiag.cli.options import FRESH, click_options, load
from hessdiag.cli.output import say, sayer
from hessdiag.cli.stdout import reserve
from hessdiag.cli.store import CACHE_FOLDER, cache_asked
from hessdiag.errors import UsageError
from hessdiag.files import CACHE, cache_folder
from hessdiag.sources.spec import parse_options

if TYPE_CHECKING:
    from hessdiag.analysis.measurement import Progress
    from hessdiag.check.config import Config
    from hessdiag.check.subject import Subject

F = TypeVar("F", bound=Callable[..., Any])
RUN_FLAGS = ("samples", "batch_size", "device", "probes")
CONFIG = (
    click.option(
        "--config",
        "config_file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="pyproject.toml or hessdiag.toml.  [the nearest, from here upwards]",
    ),
    click.option("-c", "--checkpoint", metavar="FILE", help="Weights to measure, instead of the configured ones."),
    click.option("-P", "options", metavar="KEY=VALUE", multiple=True, help="Option of the factory."),
    click.option("--trust-pickle", is_flag=True, help="Let the checkpoint run code. Only for files you made."),
    click.option("--baseline", metavar="FILE", help="File of recorded values, instead of the configured one."),
    *click_options(*RUN_FLAGS, instead="as configured"),
    CACHE_FOLDER,
    click.option("--max-probes", type=int, metavar="N", help="Maximum probes when the first look cannot tell."),
    *click_options("confidence", instead="as configured"),
    FRESH,
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes."),
    click.option("--debug", is_flag=True, help="Show the traceback of a refusal."),
)
REFERENCE = """\b
The configuration is [tool.hessdiag] of pyproject.toml, or hessdiag.toml:
  schema = 1
  problem = "problem.py:cifar"        # the factory; paths hang at this file
  checkpoint = "ckpt/best.pt"
  options = { width = 4 }             # of the factory; also app_dir, trust_pickle
  [tool.hessdiag.run]                 # options of hessdiag analyze, with _ for -
  samples = 1024
  [tool.hessdiag.check]
  baseline = "tests/hessdiag-baseline.json"
  confidence = 0.95                   # for each limit by itself
  on_unsure = "escalate"              # or "report": no second look
  max_probes = 128                    # most probes of that look
  [tool.hessdiag.check.budgets]       # metric, [split] and @parameter-glob
  lambda_max = { max = 80.0, max_increase = "15%" }
  "trace[test]@layer4.*" = { level = "warn", max_decrease = 0.5 }

\b
min, max                    bound the value, in its units
max_increase, max_decrease  bound its change since the baseline: "15%" or units
abs_floor                   a change that is always allowed; needed where the
                            baseline may be zero
level                       error fails, warn is only said, off is not measured
claim                       samples, or population: of lambda_max, lambda_min
                            and trace, what the samples were drawn from
"""
CHECK_FLAGS = ("baseline", "confidence", "max_probes")


def read_config(config_file: Path | None, flags: dict[str, Any]) -> Config:
    """The configuration with a command's flags laid over it.

    Raises:
        ConfigError: with every fault of both.
    """
    from hessdiag.check.config import load_config

    if config_file is not None and not config_file.is_file():
        msg = f"--config {config_file}: no such file; hessdiag init FACTORY -c CKPT writes one"
        raise UsageError(msg)
    overrides: dict[str, Any] = {"checkpoint": flags.get("checkpoint")}
    overrides["trust_pickle"] = flags.get("trust_pickle") or None
    overrides |= {f"run.{name}": flags.get(name) for name in RUN_FLAGS}
    overrides |= {f"check.{name}": flags.get(name) for name in CHECK_FLAGS}
    overrides["options"] = parse_options(flags.get("options") or ()) or None
    return load_config(config_file, overrides)


def subject_of(
    config: Config,
    report: Progress,
    *,
    fresh: bool,
    quiet: bool,
    checkpoint: str | None = None,
    title: str | None = None,
) -> Subject:
    """Build the configured problem with its checkpoint, or with another one."""
    weights_file = checkpoint or config.checkpoint
    reserve()
    built = load(config.recipe, weights_file)

    from hessdiag.check.subject import Subject

    say(built.notes, quiet=quiet)
    return Subject(
        built.problem,
        config.run,
        cache=None if fresh else kept_in(config),
        report=report,
        say=sayer(quiet=quiet),
        about=(title or weights_file or config.recipe.name, built.weights.sha256 if built.weights else None),
        group=ranks.group(),
    )


def kept_in(config: Config) -> Path:
    """Where finished measurements are kept: as asked, or beside the configuration."""
    return cache_folder(cache_asked(), "check", config.file.resolve().parent / CACHE)
