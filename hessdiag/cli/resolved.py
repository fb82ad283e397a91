"""What a command resolved to, and from where: ``--print-config``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from hessdiag.cli.output import draw
from hessdiag.cli.spelling import spelled
from hessdiag.cli.stdout import result
from hessdiag.option import options_of
from hessdiag.settings import Settings

if TYPE_CHECKING:
    from hessdiag.schemes.recipe import Recipe
    from hessdiag.sources.factory import Built

PRINT_CONFIG = click.option(
    "--print-config",
    is_flag=True,
    help="Show what would be measured, and from where each value comes.",
)


def print_config(recipe: Recipe, built: Built, asked: Settings, *, as_json: bool) -> None:
    """Print the problem and the settings: what, value, from where."""
    rows = [*_of_problem(recipe, built), *_of_settings(asked)]
    if as_json:
        result(json.dumps([{"what": what, "value": value, "source": source} for what, value, source in rows]))
        return

    def table(_: Any) -> Any:
        from rich.markup import escape
        from rich.table import Table

        found = Table(box=None, pad_edge=False)
        for title in ("what", "value", "from"):
            found.add_column(title, overflow="fold")
        for row in rows:
            found.add_row(*map(escape, row))
        return found

    draw(table, width=100)


def _of_problem(recipe: Recipe, built: Built) -> list[tuple[str, str, str]]:
    problem, named = built.problem, {what for what, _, _ in built.resolved}
    rows = [(what, str(value), source) for what, value, source in built.resolved]
    parameters = problem.parameter_names()
    count = sum(p.numel() for name, p in problem.bare_model().named_parameters() if name in set(parameters))
    found = {
        "model": (type(problem.bare_model()).__name__, str(recipe.name)),
        "parameters": (f"{count:,} in {len(parameters)} tensors", "the model"),
        "loss": (problem.loss_name, str(recipe.name)),
        "splits": (", ".join(map(str, problem.data)), str(recipe.name)),
    }
    rows = [(what, *rest) for what, rest in found.items() if what not in named] + rows
    if built.weights is not None and "weights" not in named:
        rows.append(("weights", built.weights.file, "-c"))
    return rows + [("note", note, "") for note in built.notes]


def _of_settings(asked: Settings) -> list[tuple[str, str, str]]:
    context = click.get_current_context()
    rows = []
    for name, one in options_of(Settings).items():
        value = getattr(asked, name)
        given = context.get_parameter_source(name)
        typed = given is click.core.ParameterSource.COMMANDLINE
        unset = value is None or value == ()
        shown = str(one.instead or "not set") if unset else ", ".join(map(str, value)) if one.many else str(value)
        rows.append((name, shown, spelled(name) if typed else "default"))
    return rows
