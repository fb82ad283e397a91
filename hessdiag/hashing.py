"""sha256 of what a measurement depends on: bytes, texts, tensors, files and options.

Files keep these values and are compared by them: the same content must give the same digest in every version.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KEY_DIGITS = 20  # of a name for a file: 80 bits


def sha256(*chunks: bytes) -> Any:
    """A running hash that has taken these bytes: `update`, `digest` and `hexdigest` as in hashlib."""
    whole = hashlib.sha256()
    for chunk in chunks:
        whole.update(chunk)
    return whole


def of_text(text: str) -> str:
    """sha256 of a text in UTF-8."""
    return str(sha256(text.encode()).hexdigest())


def key(*parts: Any) -> str:
    """A name by all that something depends on.

    Args:
        *parts: what JSON can hold; anything else goes in as its text.
    """
    return of_text(json.dumps(parts, sort_keys=True, default=str))[:KEY_DIGITS]


def content(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements in their order, wherever and however they are stored."""
    import torch

    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """sha256 of the elements of tensors, one after the other."""
    whole = sha256()
    for tensor in tensors:
        whole.update(content(tensor))
    return str(whole.hexdigest())


def of_file(file: Path) -> str:
    """sha256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def of_path(path: Path) -> str:
    """sha256 of a file; of a folder, of the names and contents of all files below it.

    Args:
        path: links are followed, a folder that was seen already is not entered again.

    Raises:
        OSError: something cannot be read.
    """
    if not path.is_dir():
        return of_file(path)
    whole = sha256()
    for file in sorted(_files(path), key=lambda file: os.fsencode(file.relative_to(path))):
        whole.update(os.fsencode(file.relative_to(path)) + b"\0" + bytes.fromhex(of_file(file)))
    return str(whole.hexdigest())


def _files(folder: Path) -> Iterator[Path]:
    """Regular files below; a pipe or socket would block, a broken link holds nothing."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # of two ways into one folder always the same
        yield from (Path(here, name) for name in names if Path(here, name).is_file())
