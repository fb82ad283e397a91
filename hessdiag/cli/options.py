"""Options that more than one verb takes; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hessdiag.cli.spelling import spelled
from hessdiag.cli.stdout import message
from hessdiag.errors import FaultsError
from hessdiag.option import Fault, Option, OptionError, options_of
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import Settings
from hessdiag.sources.spec import parse_options

if TYPE_CHECKING:
    from hessdiag.sources.factory import Built

F = TypeVar("F", bound=Callable[..., Any])
FACTORY = (
    "FACTORY is path/file.py:function or package.module:function, returning a hessdiag.Problem. Instead of it, "
    "--model and --data name what hessdiag knows: hessdiag ls models, hessdiag ls data."
)
Decorator = Callable[[F], F]


def click_options(
    *names: str, of: type = Settings, instead: str | None = None, **defaults: Any
) -> tuple[Decorator[Any], ...]:
    """The flags of some options, as their class defines them.

    Args:
        *names: of the options.
        of: the class.
        instead: where a flag that is not given leaves what is configured: what to say so.
        **defaults: of this verb, where they differ.
    """
    return tuple(_click_option(options_of(of)[name], instead, defaults) for name in names)


def _click_option(one: Option, instead: str | None, defaults: dict[str, Any]) -> Decorator[Any]:
    default = None if instead else defaults.get(one.name, one.default)
    shown = instead or (one.instead if defaults.get(one.name) is None else None)
    words: dict[str, Any] = {
        "metavar": one.metavar,
        "help": one.help + (f"  [{shown}]" if shown else ""),
        "show_default": default is not None and shown is None,
    }
    if one.many and (one.choices or one.kind in (int, float)):
        read = partial(_numbers, one.kind) if one.kind in (int, float) else _names
        return click.option(spelled(one.name), callback=partial(read, default), **words)
    if one.many:
        return click.option(spelled(one.name), multiple=True, **words)
    if one.kind is bool:
        name = spelled(one.name)
        return click.option(f"{name}/--no-{name[2:]}", default=default, **words)
    kind = click.Choice(one.choices) if one.choices else one.kind
    if not one.formerly:
        return click.option(spelled(one.name), type=kind, default=default, **words)
    words["callback"] = lambda context, _, value: context.meta.get(one.formerly, value)
    today = click.option(spelled(one.name), type=kind, default=default, **words)
    former = click.option(
        spelled(one.formerly),
        type=kind,
        help=f"The former name of {spelled(one.name)}.",
        hidden=True,
        expose_value=False,
        callback=partial(_former, one),
    )
    return lambda command: today(former(command))


def _former(one: Option, context: click.Context, _: click.Parameter, value: Any) -> None:
    if value is not None:  # click asks the flags that were given first
        message(f"hessdiag: {spelled(one.formerly)} is {spelled(one.name)} now")
        context.meta[one.formerly] = value


def _names(default: Any, _: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return default if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


def _numbers(kind: type, default: Any, context: click.Context, one: click.Parameter, value: str | None) -> Any:
    """Numbers by commas; what is none stays a text, which the settings refuse."""
    parts = _names(default, context, one, value)
    return parts if parts is default else tuple(_number(kind, part) for part in parts)


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def with_recipe(function: F) -> F:
    """Call a verb with one `Recipe` for all the options that say which problem is meant."""

    @wraps(function)
    def collected(**values: Any) -> Any:
        given = {one.name: values.pop(one.name) for one in fields(Recipe) if one.name in values}
        given["options"] = parse_options(given["options"])
        recipe, context = Recipe(**given), click.get_current_context()
        needed = any(one.name == "factory" for one in context.command.params if isinstance(one, click.Argument))
        if needed and recipe.names_nothing:
            msg = "no problem: give FACTORY, path/file.py:function; or a model's name, --model hf:DIR, with --data"
            raise click.UsageError(msg, context)
        return function(recipe=recipe, **values)

    return collected  # type: ignore[return-value]


BY_NAME = (
    click.option(
        "--model", metavar="SCHEME:NAME", help="A model by name: hf:DIR, timm:NAME; see hessdiag ls models."
    ),
    click.option(
        "--data",
        metavar="[SPLIT=]SCHEME:PLACE",
        multiple=True,
        help="Data by name: text:FILE, imagefolder:DIR; see hessdiag ls data. Repeat it for train= and test=.",
    ),
    click.option(
        "--loss", metavar="NAME", help="cross_entropy, 'HuberLoss(delta=2)', module:function.  [the model's own]"
    ),
    click.option(
        "--adapter", metavar="DIR", help="Adapter of PEFT on the frozen model; its parameters are measured."
    ),
    click.option("--use-ema", is_flag=True, help="Take the checkpoint's averaged weights."),
    click.option("--allow-download", is_flag=True, help="Let a library fetch what is not on this machine."),
    click.option("--trust-remote-code", is_flag=True, help="Let a Hugging Face folder run its own Python files."),
)
PROBLEM = (
    click.argument("factory", required=False),
    click.option(
        "-c",
        "--checkpoint",
        metavar="FILE",
        help="Weights: .safetensors, .pt, .pth, .th, .ckpt, .bin, or a folder of Hugging Face; FILE::KEY takes an "
        "entry of it, FILE::PREFIX. the tensors whose names begin with PREFIX.",
    ),
    click.option(
        "-P", "options", metavar="KEY=VALUE", multiple=True, help="Option of the factory or model (JSON or text)."
    ),
    *BY_NAME,
    click.option("--trust-pickle", is_flag=True, help="Let the checkpoint run code. Only for files you made."),
    click.option("--app-dir", metavar="DIR", help="Folder to import modules from. Default: the current folder."),
    with_recipe,
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
SAMPLES = click_options(
    "samples",
    "batch_size",
    "seed",
    "split",
    "params",
    "operator",
    "dtype",
    "device",
    "method",
    "block",
    "second_opinion",
)
MEASUREMENT = click_options(
    "quantities", "rtol", "probes", "density_probes", "steps", "max_steps", "top", "confidence"
)
FRESH = click.option("--fresh", is_flag=True, help="Measure anew, whatever an earlier run has kept.")
SPENDING = click_options("effort", "accuracy", "budget")
PAGE_FOLDER = click.option(
    "-o",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder to write page, CSV and JSON to.",
)
OUTPUT = (
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes."),
    click.option("--debug", is_flag=True, help="Show the traceback of a refusal."),
)


def options(*groups: tuple[Decorator[F], ...]) -> Decorator[F]:
    """Put groups of options on a command, in the order written."""

    def decorate(function: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def settings(**values: Any) -> Settings:
    """The options of a command as checked `Settings`.

    Raises:
        FaultsError: they contradict themselves or do not exist; each fault names its flag.
    """
    values["params"] = values["params"] or None
    with flags():
        return Settings(**values)


@contextmanager
def flags() -> Iterator[None]:
    """Say faults of options as they are typed.

    Raises:
        FaultsError: what was an OptionError.
    """
    try:
        yield
    except OptionError as error:
        typed = FaultsError(map(_typed, error.faults))
        typed.page = error.page
        raise typed from error


def _typed(fault: Fault) -> str:
    return f"{spelled(fault.field)}{'' if fault.given is None else f' {fault.given}'}: {fault.text}"


def load(recipe: Recipe, checkpoint: str | None) -> Built:
    """Build the problem a command names; everything that can be refused without torch is refused first."""
    recipe.check(checkpoint)

    from hessdiag.schemes.assemble import build

    return build(recipe, checkpoint)
