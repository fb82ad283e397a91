"""Arrays as data sets come in files: NumPy's archives and MNIST's idx."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import LoadError, one_line
from hessdiag.shown import single_spaced


def arrays_of_npz(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[np.generic]]:
    """Arrays of an ``.npz`` file by name; object arrays are refused.

    Raises:
        LoadError: missing, damaged, or without one of them.
    """
    if not path.is_file():
        msg = f"{path}: no such data file"
        raise LoadError(msg)
    if not zipfile.is_zipfile(path):
        msg = f"{path} is not an .npz file, or cut short: write it with np.savez(file, x=..., y=...)"
        raise LoadError(msg)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            lacking = [name for name in names if name not in archive]
            if lacking:
                there = ", ".join(single_spaced(name) for name in archive.files)
                msg = f"{path} has no array {lacking[0]!r}; there are {there or 'none'}"
                raise LoadError(msg)
            return {name: archive[name] for name in names}
    except (OSError, ValueError, EOFError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        msg = f"{path} is damaged or holds Python objects ({one_line(error, 80)}): write it again with np.savez"
        raise LoadError(msg) from error


def content_of(path: Path) -> bytes:
    """The bytes of a file, unpacked where they are gzip's.

    Raises:
        LoadError: missing or damaged.
    """
    if not path.is_file():
        msg = f"{path}: no such data file"
        raise LoadError(msg)
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        msg = f"{path} is damaged or cut short ({one_line(error, 80)}): fetch it again"
        raise LoadError(msg) from error


def array_of_idx(path: Path, magic: int, dimensions: int) -> NDArray[np.uint8]:
    """The array of an idx file, as MNIST comes.

    Args:
        path: plain or gzip's.
        magic: the number that it begins with.
        dimensions: of the array.

    Raises:
        LoadError: another kind of file, or one cut short.
    """
    content = content_of(path)
    start = 4 * (1 + dimensions)
    header = [int.from_bytes(content[i : i + 4], "big") for i in range(0, min(start, len(content)), 4)]
    if not header or header[0] != magic:
        msg = f"{path} does not begin with {magic}: not idx {'pictures' if dimensions == 3 else 'labels'}"
        raise LoadError(msg)
    expected = start + int(np.prod(header[1:], dtype=object))
    if len(content) != expected or len(header) != 1 + dimensions:
        msg = f"{path} has {len(content)} bytes, its header says {expected}: fetch it again"
        raise LoadError(msg)
    return np.frombuffer(content, np.uint8, offset=start).reshape(header[1:]).copy()
