"""What a configuration may hold, and every fault of one at once: each at its key, with what is allowed instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, NamedTuple, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from hessdiag.check.budgets import CLAIMS, LEVELS, Claim, Level
from hessdiag.former import names_of_today
from hessdiag.option import hint, options_of
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import UNPAIRED, Settings
from hessdiag.shown import visible

SCHEMA = 1
STRICT = ConfigDict(extra="forbid", strict=True)
HINTS = get_type_hints(Settings)
RUN = {name: one for name, one in options_of(Settings).items() if name not in ("quantities", *UNPAIRED)}
FORMER = {**names_of_today(Settings), "metrics": "quantities"}
RunTable: Any = create_model(
    "RunTable",
    __config__=STRICT,
    quantities=(list[str], Field(default_factory=list)),
    **{
        name: (HINTS[name], Field(one.default, description=one.help, json_schema_extra=one.schema()))
        for name, one in RUN.items()
    },  # type: ignore[call-overload]
)


class BudgetTable(BaseModel):
    """One budget: ``{ level, min, max, max_increase, max_decrease, abs_floor, claim }``."""

    model_config = STRICT
    level: Level = Field(
        default="error", description="`error` fails the check, `warn` is only said, `off` is not measured."
    )
    min: Any = Field(default=None, description="Lower limit of the value, in its units.")
    max: Any = Field(default=None, description="Upper limit of the value, in its units.")
    max_increase: Any = Field(
        default=None, description='Largest increase since the baseline: `"15%"`, or a number in units.'
    )
    max_decrease: Any = Field(default=None, description="Largest decrease, likewise.")
    abs_floor: float | None = Field(
        default=None,
        description="A change in units that is always allowed; needed where the baseline may be zero.",
    )
    claim: Claim = Field(
        default="samples",
        description="`samples`, or `population`: of lambda_max, lambda_min and trace, "
        "what the samples were drawn from.",
    )


class CheckTable(BaseModel):
    """``[tool.hessdiag.check]``."""

    model_config = STRICT
    baseline: str = Field(default="tests/hessdiag-baseline.json", description="The file of recorded values.")
    confidence: float | None = Field(default=None, description="Of every interval, for each limit by itself.")
    on_unsure: Literal["escalate", "report"] = Field(
        default="escalate", description="`escalate` draws more probes where nobody can tell; `report` does not."
    )
    max_probes: int | None = Field(default=None, description="Most probes of that second look.")
    budgets: dict[str, BudgetTable] = Field(default_factory=dict)


class Sheet(BaseModel):
    """``[tool.hessdiag]``."""

    model_config = STRICT
    version: int = Field(SCHEMA, alias="schema", description="Of the file's format.")
    problem: str | None = Field(
        default=None, description="The factory, `path/file.py:function` or `package.module:function`."
    )
    model: str | None = Field(default=None, description="Instead of a factory, a model by name: `hf:DIR`.")
    data: str | list[str] = Field(
        default_factory=list, description="Data of that model by name: `text:FILE`, or one of each split."
    )
    loss: str | None = Field(default=None, description="Loss of that model by name; by default its own.")
    adapter: str | None = Field(default=None, description="Adapter of PEFT on that model.")
    use_ema: bool = Field(default=False, description="Take the checkpoint's averaged weights.")
    allow_download: bool = Field(default=False, description="Let a library fetch what is not on this machine.")
    trust_remote_code: bool = Field(
        default=False, description="Let a folder of Hugging Face run its own Python files."
    )
    checkpoint: str | None = Field(default=None, description="The weights to measure.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the factory or model, as `-P`.")
    app_dir: str | None = Field(default=None, description="Where modules are looked for.")
    trust_pickle: bool = Field(default=False, description="Let the checkpoint run code. Only for files you made.")
    run: RunTable = Field(default_factory=RunTable)
    check: CheckTable = Field(default_factory=CheckTable)


def recipe_of(sheet: Sheet) -> Recipe:
    """How the problem of a configuration is made, its paths as they are written."""
    values = {one.name: getattr(sheet, one.name) for one in fields(Recipe) if one.name in Sheet.model_fields}
    data = (sheet.data,) if isinstance(sheet.data, str) else tuple(sheet.data)
    return Recipe(**{**values, "factory": sheet.problem, "data": data})


class Fault(NamedTuple):
    """What is wrong with one key."""

    path: tuple[str, ...]  # below [tool.hessdiag]
    text: str  # a clause: what is there; what is allowed


CHOICES = {
    "level": LEVELS,
    "claim": CLAIMS,
    "operator": RUN["operator"].choices,
    "on_unsure": ("escalate", "report"),
}
WANTED = {
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list [...]",
    "sequence_str": 'a list ["..."]',
    "is_instance_of": "a list [...]",
    "dict_type": "a table",
    "model_type": "a table",
}
KEYS = {
    (): tuple("schema" if name == "version" else name for name in Sheet.model_fields),
    ("check",): tuple(CheckTable.model_fields),
    ("run",): tuple(RunTable.model_fields),
}
TABLES = {(): "above all tables", ("check",): "into the table check", ("run",): "into the table run"}
ELSEWHERE = {"tool": "in hessdiag.toml keys stand alone"}


def newer(table: Mapping[str, Any]) -> Fault | None:
    """The one fault of a table written for a later hessdiag: whatever else looks wrong may be right there."""
    version = table.get("schema")
    if not isinstance(version, int) or version <= SCHEMA:
        return None
    return Fault(("schema",), f"{shown(version)} is newer than the {SCHEMA} this hessdiag reads; update hessdiag")


def faults_of_form(table: Mapping[str, Any]) -> tuple[Sheet, list[Fault]]:
    """What of a table has the right names and types, and a fault for each key that has not."""
    table = _today(table)
    try:
        return Sheet.model_validate(table), []
    except ValidationError as error:
        found = error.errors(include_url=False)
    rest = _copy(table)
    for item in found:
        _drop(rest, item["loc"])
    faults = [Fault(tuple(map(str, item["loc"])), _said(item)) for item in found]
    return Sheet.model_validate(rest), faults


def _today(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table with the options of the run under the names of today; one given under both stays as it is."""
    run = table.get("run")
    if not isinstance(run, Mapping):
        return table
    names = {key: key if FORMER.get(key) in run else FORMER.get(key, key) for key in run}
    return {**table, "run": {names[key]: value for key, value in run.items()}}


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _drop(table: dict[str, Any], loc: tuple[int | str, ...]) -> None:
    """Take out the key at fault: of a list, all of it."""
    for key in loc[:-1]:
        if not isinstance(table.get(str(key)), dict):
            break
        table = table[str(key)]
    else:
        key = loc[-1]
    table.pop(str(key), None)


def _said(item: Any) -> str:
    """One of pydantic's errors in the words of this package."""
    kind, value = item["type"], shown(item["input"])
    name = str(item["loc"][-1])
    if kind == "extra_forbidden":
        return _unknown(tuple(map(str, item["loc"][:-1])), name)
    if kind == "literal_error":
        return f"{value}; {hint(str(item['input']), CHOICES[name])}"
    if kind in ("model_type", "dict_type"):
        example = ', for example { max_increase = "15%" }' if item["loc"][:2] == ("check", "budgets") else ""
        return f"{value}; it must be a table{example}"
    return f"{value}; it must be {WANTED.get(kind, item['msg'])}"


def _unknown(table: tuple[str, ...], name: str) -> str:
    allowed = KEYS.get(table, tuple(BudgetTable.model_fields))
    others = [place for place, keys in KEYS.items() if name in keys and place != table and name not in allowed]
    if name in ELSEWHERE:
        return f"no such key; {ELSEWHERE[name]}"
    if others:
        return f"no such key here; it belongs {TABLES[others[0]]}"
    return f"no such key; {hint(name, allowed)}"


def shown(value: Any, limit: int = 60) -> str:
    """A value as it would be typed, on one line and not too long."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        text = repr(value) if not isinstance(value, int) else "a number too long to show"
    return visible(text, limit)
