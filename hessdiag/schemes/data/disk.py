"""``hf-disk:DIR``: what ``save_to_disk`` of datasets wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hessdiag.errors import LoadError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.data.tables import TEXT, Records, columns_of, kept
from hessdiag.schemes.known import require
from hessdiag.schemes.pictures import OPTIONS
from hessdiag.schemes.recipe import Recipe
from hessdiag.shown import listed

IMAGES = ("image", "img")
ENCODED = ("input_ids", "attention_mask", "token_type_ids", "labels", "label")
"""Columns of a data set that a tokenizer has been over."""


class Pairs(Sequence[tuple[Any, Any]]):
    """(PIL image, label) of a data set with a column of images."""

    def __init__(self, table: Any, image: str, label: str, said: str) -> None:
        self.table, self.image, self.label, self.said = table, image, label, said

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        try:
            row = self.table[index]
            row[self.image].load()
        except Exception as error:  # Pillow's plugins and pyarrow raise what they like
            msg = f"{self.said}: row {index + 1} is not read ({type(error).__name__}: {one_line(error, 80)})"
            raise LoadError(msg) from error
        return row[self.image], row[self.label]


def read(address: Address, recipe: Recipe) -> Mapping[str | None, Rows]:  # noqa: ARG001  (as every scheme)
    """The rows of a data set, or of each of its splits.

    Raises:
        LoadError: no such folder, not written by datasets, or without the columns.
        UsageError: an option that the scheme does not take.
    """
    options = address.take({**TEXT, "image": None, **OPTIONS})
    folder = Path(address.place)
    if not folder.is_dir():
        msg = f"{address.text}: no such folder"
        raise LoadError(msg)
    library = require("datasets", "hf", "hf-disk:DIR")
    try:
        found = library.load_from_disk(str(folder.resolve()))
    except Exception as error:  # pyarrow and datasets raise what they like
        why = f"{type(error).__name__}: {one_line(error, 100)}"
        msg = f"{address.text} is not read by datasets ({why}): give the folder that save_to_disk wrote"
        raise LoadError(msg) from error
    splits = found if isinstance(found, library.DatasetDict) else {None: found}
    return {None if name is None else str(name): _rows(one, options, address) for name, one in splits.items()}


def _rows(table: Any, options: Mapping[str, Any], address: Address) -> Rows:
    said, names = address.text, list(table.column_names)
    if not len(table):
        msg = f"{said} has no rows"
        raise LoadError(msg)
    image = options["image"] or next((name for name in IMAGES if name in names), None)
    asked = options["text"] is not None
    if "input_ids" in names and not asked and options["image"] is None:
        kept_names = [name for name in ENCODED if name in names and not (name == "label" and "labels" in names)]
        classes = _classes(table, kept_names[-1])
        return Rows("ready", table.select_columns(kept_names), said, classes=classes)
    if image is not None and not asked:
        label = options["label"] or "label"
        for column, what in ((image, "image"), (label, "label")):
            if column not in names:
                msg = f"{said}: no column {column!r}; there are {listed(names)}: name it, {what}=NAME"
                raise LoadError(msg)
        shape = {name: options[name] for name in OPTIONS}
        return Rows("images", Pairs(table, image, label, said), said, shape, _classes(table, label))
    columns = columns_of(options, names, said)
    classes = _classes(table, columns["label"]) if "label" in columns else ()
    return Rows("records", Records(table, columns), said, kept(address), classes)


def _classes(table: Any, column: str) -> tuple[str, ...]:
    """Names of the classes, of a column of labels or of lists of labels."""
    feature = table.features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return tuple(names) if isinstance(names, list) else ()
