"""``text:FILE?block=128``: texts for language models."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path

from hessdiag.errors import LoadError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.array_files import content_of
from hessdiag.sources.many import natural
from hessdiag.sources.spec import exists


def read(address: Address, recipe: Recipe) -> Mapping[str | None, Rows]:
    """One text per file, in natural order.

    Raises:
        LoadError: no such file, not UTF-8, or nothing in it.
        UsageError: an option that the scheme does not take.
    """
    address.take({"block": 128})
    texts = [text_of(Path(file), address.text) for file in _files(address.place, recipe)]
    return {None: Rows("text", texts, address.text, dict(address.options))}


def text_of(path: Path, said: str) -> str:
    """The text of a file, unpacked where it is gzip's.

    Raises:
        LoadError: missing, not UTF-8, or nothing in it.
    """
    try:
        text = content_of(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 text ({one_line(error, 80)}): convert it, iconv -f LATIN1 -t UTF-8 say"
        raise LoadError(msg) from error
    if not text.strip():
        msg = f"{said}: {path} holds no text"
        raise LoadError(msg)
    return text


def _files(place: str, recipe: Recipe) -> list[str]:
    if exists(place) or not glob.has_magic(place):
        return [place]
    for pattern in (str(Path(recipe.root or "", place)), place):
        found = sorted(glob.glob(pattern, recursive=True), key=natural)  # noqa: PTH207
        if found:
            return found
    msg = f"text:{place}: no file matches"
    raise LoadError(msg)
