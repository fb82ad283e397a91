"""``torchvision:NAME?root=DIR``: the image data sets of torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hessdiag.errors import LoadError, UsageError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.known import require
from hessdiag.schemes.models.library import near
from hessdiag.schemes.pictures import OPTIONS
from hessdiag.schemes.recipe import Recipe

SPLITS: tuple[tuple[str, Mapping[str, Mapping[str, Any]]], ...] = (
    ("train", {"train": {"train": True}, "test": {"train": False}}),
    ("split", {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}),
    ("image_set", {"train": {"image_set": "train"}, "val": {"image_set": "val"}}),
)
"""Parameters that choose a part of a data set, and the parts that they give."""


def read(address: Address, recipe: Recipe) -> Mapping[str | None, Rows]:
    """Every split that lies there.

    Raises:
        UsageError: no such data set, or options it does not take.
        LoadError: its files are not there.
    """
    kind = _class_of(address)
    parameters = inspect.signature(kind).parameters
    given = dict(address.options)
    pictures = {key: given.pop(key, default) for key, default in OPTIONS.items() if key not in parameters}
    if "root" in parameters:
        given["root"] = recipe.found(str(given.get("root", ".")))
    unknown = [key for key in given if key not in parameters]
    if unknown:
        allowed = ", ".join((*(p for p in parameters if "transform" not in p and p != "download"), *pictures))
        msg = f"{address.text}: {address.place} takes no option {unknown[0]!r}; allowed: {allowed}"
        raise UsageError(msg)
    if "download" in parameters:
        given["download"] = recipe.allow_download
    chooses = next((splits for name, splits in SPLITS if name in parameters and name not in given), None)
    if chooses is None:
        return {None: _rows(kind, given, pictures, address)}
    found: dict[str | None, Rows] = {}
    why: list[LoadError | UsageError] = []
    for split, choice in chooses.items():
        try:
            found[split] = _rows(kind, {**given, **choice}, pictures, address)
        except (LoadError, UsageError) as error:  # a part that is not there is no fault, where others are
            why.append(error)
    if not found:
        raise why[0]
    return found


def _class_of(address: Address) -> Any:
    known = require("torchvision", "vision", "torchvision:CIFAR10?root=DIR").datasets
    names = [name for name in known.__all__ if inspect.isclass(getattr(known, name))]
    if address.place in names:
        return getattr(known, address.place)
    hint = near(address.place, names, "CIFAR10 is one")
    msg = f"{address.text}: torchvision has no data set {address.place!r}; {hint}"
    raise UsageError(msg)


def _rows(kind: Any, given: Mapping[str, Any], pictures: Mapping[str, Any], address: Address) -> Rows:
    try:
        rows = kind(**given)
    except (RuntimeError, OSError, ValueError) as error:  # files that are not there, or damaged
        hint = "" if given.get("download") else "; `allow_download=True` fetches it"
        msg = f"{address.text}: {one_line(error, 160)}{hint}"
        raise LoadError(msg) from error
    except TypeError as error:
        msg = f"{address.text}: {one_line(error, 160)}"
        raise UsageError(msg) from error
    return Rows("images", rows, address.text, pictures, tuple(map(str, getattr(rows, "classes", ()))))
