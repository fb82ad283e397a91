"""Options that more than one verb takes; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hessdiag.accuracy import EFFORTS
from hessdiag.errors import LoadError, UsageError
from hessdiag.results import QUANTITIES
from hessdiag.settings import DTYPES, OPERATORS, WAYS, Settings
from hessdiag.sources.spec import exists, parse_options, split_key, split_spec

if TYPE_CHECKING:
    from hessdiag.sources.factory import Built

F = TypeVar("F", bound=Callable[..., Any])
FACTORY = "FACTORY is path/file.py:function or package.module:function, returning a hessdiag.Problem."


def _quantities(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return QUANTITIES if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


PROBLEM = (
    click.argument("factory"),
    click.option(
        "-c",
        "--checkpoint",
        metavar="FILE",
        help="Weights: .safetensors, .pt, .pth, .th, .ckpt, .bin, or a folder of Hugging Face; FILE::KEY takes an "
        "entry of it, FILE::PREFIX. the tensors whose names begin with PREFIX.",
    ),
    click.option(
        "-P", "options", metavar="KEY=VALUE", multiple=True, help="Option of the factory (JSON or text)."
    ),
    click.option("--trust-pickle", is_flag=True, help="Let the checkpoint run code. Only for files you made."),
    click.option("--app-dir", metavar="DIR", help="Where modules are looked for; by default here."),
)
PROBLEMS = (
    PROBLEM[0],
    click.option(
        "-c",
        "--checkpoint",
        "checkpoints",
        metavar="FILE",
        multiple=True,
        help="Weights: .safetensors, .pt, .pth, .th, .ckpt, .bin, or a folder of Hugging Face; FILE::KEY takes an "
        "entry of it, FILE::PREFIX. the tensors whose names begin with PREFIX. Several, or a pattern in quotes, "
        "where the verb takes them.",
    ),
    *PROBLEM[2:],
)
SAMPLES = (
    click.option("--samples", type=int, metavar="N", help="Examples to measure on.  [1024, or all]"),
    click.option("--batch-size", type=int, metavar="N", help="Examples per batch; does not change the numbers."),
    click.option("--seed", type=int, default=0, show_default=True, help="Names every random stream."),
    click.option("--split", default="train", show_default=True, help="Which of the problem's data."),
    click.option("--params", metavar="GLOB", multiple=True, help="Parameters that count; !GLOB leaves out."),
    click.option(
        "--operator",
        type=click.Choice(OPERATORS),
        default="hessian",
        show_default=True,
        help="The Hessian, or its Gauss-Newton part.",
    ),
    click.option("--dtype", type=click.Choice(DTYPES), help="Precision of the products.  [the model's]"),
    click.option("--device", help="cpu, cuda, cuda:1.  [where the model is]"),
    click.option(
        "--way", type=click.Choice(WAYS), default="auto", show_default=True, help="How products are formed."
    ),
    click.option("--block", type=int, default=8, show_default=True, help="Vectors that share one graph."),
    click.option(
        "--second-opinion/--no-second-opinion",
        default=True,
        show_default=True,
        help="Compare loss and gradient with the model's own first.",
    ),
)
MEASUREMENT = (
    click.option("--quantities", callback=_quantities, metavar="A,B", help=f"Of {', '.join(QUANTITIES)}.  [all]"),
    click.option("--rtol", type=float, help="Relative width of both extremes.  [by accuracy, 1e-3]"),
    click.option("--probes", type=int, help="Random quadratic forms.  [as many as the accuracy takes]"),
    click.option("--density-probes", type=int, default=0, help="Starts of the density beside the run's.  [none]"),
    click.option("--steps", type=int, help="Lanczos steps of each start.  [by accuracy, about 60]"),
    click.option("--max-steps", type=int, default=160, show_default=True, help="Most products for the run."),
    click.option("--top", type=int, default=1, show_default=True, help="Largest eigenvalues to verify."),
    click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the intervals."),
)
SPENDING = (
    click.option(
        "--effort",
        type=click.Choice(list(EFFORTS)),
        default="normal",
        show_default=True,
        help="How well everything is to be known: three named sets of accuracies.",
    ),
    click.option(
        "--accuracy", metavar="A=X,B=Y", help="Single accuracies instead: trace=0.5%,lambda_max=1e-4 say."
    ),
    click.option(
        "--budget", metavar="N[s|m|h|p|g]", help="The most to spend: a time, products (200p) or gradients (500g)."
    ),
)
OUTPUT = (
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes."),
    click.option("--debug", is_flag=True, help="Show the traceback of a refusal."),
)


def options(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """Put groups of options on a command, in the order written."""

    def decorate(function: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def settings(**values: Any) -> Settings:
    """The options of a command as checked `Settings`.

    Raises:
        UsageError: they contradict themselves or do not exist.
    """
    values["params"] = values["params"] or None
    return Settings(**values)


def load(
    factory: str, checkpoint: str | None, options: tuple[str, ...], trust_pickle: bool, app_dir: str | None
) -> Built:
    """Build the problem a command names; everything that can be refused without torch is refused first."""
    parsed = parse_options(options)
    where, _ = split_spec(factory)
    if app_dir is not None and not Path(app_dir).is_dir():
        msg = f"--app-dir {app_dir}: no such folder; give the one your module lies in"
        raise UsageError(msg)
    if where.endswith(".py") and not Path(where).is_file():
        msg = f"no such file {where}: FACTORY is path/file.py:function or package.module:function"
        raise UsageError(msg)
    if checkpoint is not None and not exists(split_key(checkpoint)[0]):
        msg = f"no such checkpoint {checkpoint}: give an existing file with -c"
        raise LoadError(msg)

    from hessdiag.sources.factory import build_problem

    return build_problem(
        factory, checkpoint=checkpoint, options=parsed, app_dir=app_dir, trust_pickle=trust_pickle
    )
