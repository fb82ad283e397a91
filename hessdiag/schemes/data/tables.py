"""``csv:FILE`` and ``jsonl:FILE``: records of text with labels, or columns of numbers with a target."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessdiag.errors import LoadError, UsageError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.data.text import text_of
from hessdiag.schemes.recipe import Recipe
from hessdiag.shown import encodable, listed

if TYPE_CHECKING:
    import pandas as pd

TEXT: Mapping[str, Any] = {"text": None, "text_pair": None, "label": None, "max_length": 512}
"""Columns of a record; the most tokens that a text may have, by default as many as the model takes."""
COLUMNS = {"text": "text", "label": "label"}
"""Where records lie if nothing is said: a label may be missing."""


class Records(Sequence[Mapping[str, Any]]):
    """Rows of a table by the names that preparations know: "text", "text_pair", "label".

    Attributes:
        table: map-style, mappings by column.
        columns: name -> column.
    """

    def __init__(self, table: Any, columns: Mapping[str, str]) -> None:
        self.table, self.columns = table, columns

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        row = self.table[index]
        return {name: row.get(column) for name, column in self.columns.items()}


def read(address: Address, recipe: Recipe) -> Mapping[str | None, Rows]:
    """Records where a column of text is named or the model is one of Hugging Face, else inputs and targets.

    Raises:
        LoadError: no such file, damaged, without such columns, or values that are no numbers.
        UsageError: options that the scheme does not take, or that leave open what is meant.
    """
    options = address.take({**TEXT, "target": None, **({"sep": ","} if address.scheme == "csv" else {})})
    said, path = address.text, Path(address.place)
    of_text = options["text"] is not None or (options["target"] is None and str(recipe.model).startswith("hf:"))
    if of_text and options["target"] is not None:
        msg = f"{said}: text= is for records of text, target= for columns of numbers: give one"
        raise UsageError(msg)
    table = _lines(path, said) if address.scheme == "jsonl" else _table(path, str(options["sep"]), said)
    if of_text:
        names = list(table[0]) if isinstance(table, list) else list(table.columns)
        columns = columns_of(options, names, said)
        rows = table if isinstance(table, list) else _plain(table)
        return {None: Rows("records", Records(rows, columns), said, kept(address))}
    if options["target"] is None:
        msg = f"{said}: name the column of the targets, target=NAME; or that of the texts, text=NAME&label=NAME"
        raise UsageError(msg)
    import pandas as pd

    if isinstance(table, list):
        table = pd.DataFrame([{name: encodable(value) for name, value in row.items()} for row in table])
    return {None: Rows("tensors", _numbers(table, str(options["target"]), said), said)}


def columns_of(options: Mapping[str, Any], names: Sequence[str], said: str) -> dict[str, str]:
    """The column of each part of a record.

    Raises:
        LoadError: there is none of that name.
    """
    found = {}
    for part in ("text", "text_pair", "label"):
        asked = options[part]
        column = asked or COLUMNS.get(part)
        if column is None or (asked is None and part == "label" and column not in names):
            continue
        if column not in names:
            msg = f"{said}: no column {column!r}; there are {listed(list(names))}: name it, {part}=NAME"
            raise LoadError(msg)
        found[part] = str(column)
    return found


def kept(address: Address) -> dict[str, Any]:
    """The options that say how a model takes the rows."""
    return {name: value for name, value in address.options.items() if name == "max_length"}


def _lines(path: Path, said: str) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(text_of(path, said).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            msg = f"{path}, line {number} is no JSON ({one_line(error, 80)}): one object a line is needed"
            raise LoadError(msg) from error
        if not isinstance(row, dict):
            msg = f'{path}, line {number} holds a {type(row).__name__}; an object is needed, {{"text": ...}}'
            raise LoadError(msg)
        found.append(row)
    return found


def _table(path: Path, separator: str, said: str) -> pd.DataFrame:
    import pandas as pd

    text = text_of(path, said)
    try:
        # an empty cell is an empty text, so that a column of texts stays one
        frame = pd.read_csv(io.StringIO(text), sep=separator, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:  # EmptyDataError is a ValueError
        msg = f"{path} is no table ({one_line(error, 100)}): a header and as many cells in every line are needed"
        raise LoadError(msg) from error
    if not len(frame):
        msg = f"{said} has a header and no rows"
        raise LoadError(msg)
    return frame


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with Python's own numbers and texts; an empty cell is nothing."""
    columns = [frame[name].tolist() for name in frame.columns]
    names = list(frame.columns)
    rows = (zip(names, values, strict=True) for values in zip(*columns, strict=True))
    return [{name: None if value == "" else value for name, value in row} for row in rows]


def _numbers(frame: pd.DataFrame, target: str, said: str) -> Any:
    import numpy as np
    import pandas as pd
    import torch
    from torch.utils.data import TensorDataset

    if target not in frame.columns:
        msg = f"{said}: no column {target!r}; there are {listed([str(name) for name in frame.columns])}"
        raise LoadError(msg)
    if len(frame.columns) < 2:
        msg = f"{said}: {target!r} is the only column: inputs are needed beside it"
        raise LoadError(msg)
    numbers = frame.apply(pd.to_numeric, errors="coerce")
    for name in frame.columns:
        wrong = np.flatnonzero(~np.isfinite(numbers[name].to_numpy(np.float64)))
        if len(wrong):
            shown = f"{str(name)!r}, row {wrong[0] + 1} is {str(frame[name].iloc[wrong[0]])!r}"
            msg = f"{said}: column {shown}: columns of finite numbers are needed"
            raise LoadError(msg)
    inputs, targets = numbers.drop(columns=target).to_numpy(np.float32), numbers[target].to_numpy()
    kind = np.float32 if targets.dtype.kind == "f" else np.int64
    return TensorDataset(torch.tensor(inputs), torch.tensor(targets.astype(kind)))
