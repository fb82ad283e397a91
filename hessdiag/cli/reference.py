"""Pages of the documentation that are made from definitions: options, configuration keys, measures.

``python -m hessdiag.cli.reference`` writes them; a test says whether they are current.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from hessdiag.check.schema import RUN, BudgetTable, CheckTable, Sheet
from hessdiag.cli import VERBS, cli
from hessdiag.gap.registry import FAMILIES, Measure
from hessdiag.option import Option
from hessdiag.pages import source

DOCS = Path(__file__).parent.parent / "docs"
MADE = "This page is made from the definitions of the options; `python -m hessdiag.cli.reference` writes it."
TABLE = "| option | default | meaning |\n|---|---|---|"
NAMES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}


def written() -> Mapping[str, str]:
    """Each generated page by its file, as it should be."""
    from hessdiag.gap.registry import built_in

    return {"options.md": options(), "configuration.md": configuration(), "measures.md": measures(built_in())}


def options() -> str:
    """Every option of every command."""
    lines = ["# options", "", f"Every option of every command, verb by verb. {MADE}", ""]
    lines += [
        "Options without a verb: `--help` and `--version`. Names and values of `--quantities` are explained on"
    ]
    lines += ["the pages of the same name; those of `--operator` and of the methods on [methods](methods.md).", ""]
    context = click.Context(cli, info_name="hessdiag")
    for verb in VERBS:
        command = cli.get_command(context, verb)
        assert command is not None
        for name, one in _commands(verb, command):
            lines += [f"## {name}", "", VERBS.get(name, one.get_short_help_str(200)), ""]
            rows = [_row(each) for each in one.params if isinstance(each, click.Option) and not each.hidden]
            lines += [f"Arguments: {_arguments(one)}.", ""] if _arguments(one) else []
            lines += [TABLE, *rows, ""] if rows else []
    return "\n".join(lines)


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for inner, one in command.commands.items():
        yield f"{name} {inner}", one


def _arguments(command: click.Command) -> str:
    found = [one for one in command.params if isinstance(one, click.Argument)]
    return ", ".join(f"`{_choices(one.type) or (one.name or '').upper()}`" for one in found)


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    names += "".join(f" / `{name}`" for name in option.secondary_opts)
    text, _, shown = (option.help or "").partition("  [")
    default = shown.rstrip("]")
    if not default and option.show_default and option.default is not None:
        default = _default(option)
    choices = _choices(option.type)
    if choices:
        text += f" One of {choices}."
    elif option.metavar:
        names += f" `{option.metavar}`"
    repeated = " Repeatable." if option.multiple and "repeatable" not in text.casefold() else ""
    required = "required" if option.required else default
    return f"| {_cell(names)} | {_cell(required)} | {_cell(text + repeated)} |"


def _default(option: click.Option) -> str:
    if isinstance(option.default, bool):
        on, off = option.opts[0], (*option.secondary_opts, "off")[0]
        return on if option.default else off
    return str(option.default)


def _choices(kind: Any) -> str:
    return ", ".join(map(str, kind.choices)) if isinstance(kind, click.Choice) else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()


def configuration() -> str:
    """Every key of a configuration file."""
    lines = ["# configuration", ""]
    lines += [
        "Every key of `hessdiag.toml`; in `pyproject.toml` the same keys stand below `[tool.hessdiag]`. Paths hang"
    ]
    lines += [f"at the folder of the file. {MADE}", ""]
    for heading, note, rows in (
        ("Top level", "", _described(Sheet)),
        ("run", "Options of `hessdiag analyze`, with `_` for `-`.", _run()),
        ("check", "", _described(CheckTable)),
        ("check.budgets", BUDGETS, _described(BudgetTable)),
    ):
        lines += [f"## {heading}", "", *([note, ""] if note else [])]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {_cell(kind)} | {_cell(default)} | {_cell(text)} |"
            for name, kind, default, text in rows
        ]
        lines += [""]
    return "\n".join([*lines, EXAMPLE])


BUDGETS = 'Each key is `metric`, `"metric[split]"`, `"metric@glob"` or `"metric[split]@glob"`; its table holds:'
EXAMPLE = """## Example

```toml
[tool.hessdiag]
schema = 1
problem = "hessdiag.sources.digits:problem"
checkpoint = "ckpt/best.safetensors"

[tool.hessdiag.run]
samples = 1024

[tool.hessdiag.check]
baseline = "tests/hessdiag-baseline.json"

[tool.hessdiag.check.budgets]
lambda_max = { max = 80.0, max_increase = "15%" }
"trace[test]@0.*" = { level = "warn", max_decrease = 0.5 }
```
"""


def _described(table: Any) -> Iterator[tuple[str, str, str, str]]:
    """The keys of a table that have words; the others are tables of their own."""
    for name, field in table.model_fields.items():
        if field.description:
            yield field.alias or name, *_field(table, name), field.description


def _field(table: Any, name: str) -> tuple[str, str]:
    """What a key of a table takes, and its default."""
    field = table.model_fields[name]
    hint = getattr(field.annotation, "__name__", str(field.annotation))
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    kind = ", ".join(choices) or NAMES.get(hint.partition(" ")[0], "table" if "dict" in hint else "")
    known = [word for word in NAMES if word in str(field.annotation)]
    kind = kind or (NAMES[known[0]] if known else "number, or text with %")
    default = field.default_factory() if field.default_factory else field.default
    return kind, "" if default in (None, {}) or field.is_required() else f"`{_toml(default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _run() -> Iterator[tuple[str, str, str, str]]:
    yield "quantities", "list of names", "", "Measured and recorded beside those that have a budget."
    for name, one in RUN.items():
        yield name, _kind(one), _told(one), f"{one.help} {one.more}".strip()


def _kind(one: Option) -> str:
    if one.choices:
        return ("list of: " if one.many else "") + ", ".join(one.choices)
    kind = NAMES[one.kind.__name__]
    return f"list of {kind}" if one.many else kind


def _told(one: Option) -> str:
    if one.instead:
        return one.instead
    return "" if one.default is None else f"`{_toml(one.default)}`"


def measures(known: Mapping[str, Measure]) -> str:
    """The page of measures, its sections written anew from the registry; the words around them stay."""
    page = source("measures.md", comments=True)
    for family in FAMILIES:
        sections = "".join(_measure(one) for one in known.values() if one.family == family)
        before, mark, rest = page.partition(f"<!-- generated: {family} -->\n")
        page = before + mark + sections + rest[rest.index("<!-- end -->") :]
    return page


def _measure(one: Measure) -> str:
    unmoved = ", ".join(sorted(one.invariances)) or "nothing"
    return (
        f"### {one.name}\n\n{one.title.rstrip('.')}.\n\n`{one.formula}`\n\n- Source: {one.source.rstrip('.')}.\n"
        f"- Not moved by: {unmoved}.\n- Cost: {one.cost}.\n\n"
    )


def main() -> None:
    """Write the pages."""
    for file, text in written().items():
        (DOCS / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
