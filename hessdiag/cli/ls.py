"""``hessdiag ls``."""

from __future__ import annotations

import json
from typing import Any

import click

from hessdiag.cli.output import draw
from hessdiag.cli.stdout import result

KINDS = ("models", "data", "losses", "measures")
WAYS = {
    "models": "--model NAME --data ...; hessdiag explain schemes",
    "data": "--data NAME, or train=NAME and test=NAME; hessdiag explain schemes",
    "losses": "--loss NAME, with --model",
    "measures": "hessdiag gap --measures NAME; hessdiag explain measures",
}


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--debug", is_flag=True, help="Show the traceback of a refusal.")
def ls(kind: str, *, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """List what has a name: models, data, losses, measures; those of other packages too."""
    rows = _rows(kind)
    if as_json:
        result(json.dumps([{"name": name, "about": about, "needs": needs} for name, about, needs in rows]))
        return

    def table(_: Any) -> Any:
        from rich.markup import escape
        from rich.table import Table

        needed = any(needs for _, _, needs in rows)
        found = Table(box=None, pad_edge=False, caption=WAYS[kind], caption_justify="left")
        for title in ("name", "what it is", "needs")[: 3 if needed else 2]:
            found.add_column(title, overflow="fold")
        for row in rows:
            found.add_row(*map(escape, row[: 3 if needed else 2]))
        return found

    draw(table, width=100)


def _rows(kind: str) -> list[tuple[str, str, str]]:
    """Name, what it is, and what has to be installed for it."""
    if kind == "measures":
        from hessdiag.gap.registry import registry

        return [(name, one.title, "") for name, one in registry().items()]
    from hessdiag.schemes.known import schemes

    rows = [] if kind != "losses" else _own_losses()
    for one in schemes(kind).values():  # type: ignore[arg-type]
        way = "" if one.installed else f"pip install 'hessdiag[{one.extra}]'"
        rows.append((one.example, one.about, way))
    return rows


def _own_losses() -> list[tuple[str, str, str]]:
    from hessdiag.criteria import CRITERIA
    from hessdiag.schemes.losses import TORCH

    own = [(name, "Of hessdiag; see hessdiag explain python.", "") for name in CRITERIA]
    own += [(name, f"torch.nn.{name}; options by name, {name}(reduction='sum').", "") for name in TORCH]
    return [*own, ("package.module:function", "f(outputs, targets), a mean loss.", "")]
