"""``hessdiag explain``."""

from __future__ import annotations

from itertools import groupby
from textwrap import wrap

import click

from hessdiag.cli.output import draw
from hessdiag.cli.stdout import result
from hessdiag.pages import Page, find, pages, text, unlinked

WIDTH = 80


@click.command()
@click.argument("name", nargs=-1)
@click.option("--list", "listed", is_flag=True, help="List all pages, a line each.")
def explain(name: tuple[str, ...], listed: bool) -> None:
    """Show the page of a number, a measure, a warning, a verb or an idea; without a name, list them.

    In a terminal it is drawn; in a pipe it is plain text.
    """
    if listed or not name:
        result("\n".join(_contents()))
        return
    _show(find(" ".join(name)))


def _contents() -> list[str]:
    lines: list[str] = []
    for group, found in groupby(pages().values(), key=lambda page: page.group):
        every = list(found)
        indent = min(max(len(page.name) for page in every) + 2, 36)
        lines += ["", group] if lines else [group]
        for page in every:
            first, *rest = wrap(page.summary, WIDTH - indent - 2)[:2] or [""]
            lines += [f"  {page.name:<{indent}}{first}", *(f"  {'':<{indent}}{line}" for line in rest)]
    return lines


def _show(page: Page) -> None:
    from rich.console import Group
    from rich.constrain import Constrain
    from rich.markdown import Markdown

    markdown, others = unlinked(text(page))
    others = [other for other in others if other != page.name]
    if page.heading:
        others.insert(0, page.file.removesuffix(".md"))
    if others:
        markdown += f"\n\nSee also, by `hessdiag explain NAME`: {', '.join(others)}.\n"
    drawn = Markdown(markdown, hyperlinks=False, code_theme="ansi_dark")
    draw(lambda _: Group(Constrain(drawn, WIDTH), ""), width=WIDTH)
