"""Several checkpoints by one pattern, as a training run left them: in natural order, under short names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from hessdiag.errors import LoadError, UsageError
from hessdiag.sources.spec import exists, split_key


@dataclass(frozen=True)
class CheckpointFile:
    """One of several checkpoints.

    Attributes:
        path: the file as ``-c`` takes it, its ``::KEY`` included.
        name: short, and unique among those it was found with.
    """

    path: str
    name: str


def checkpoints(patterns: Sequence[str]) -> tuple[CheckpointFile, ...]:
    """The files that patterns name, each once.

    ``*``, ``?``, ``[0-9]`` and ``**`` are expanded, a file of that very name comes first; the matches of one
    pattern come in natural order (epoch2 before epoch10), patterns in the order given. ``PATTERN::KEY`` takes an
    entry of each.

    Raises:
        UsageError: no pattern.
        LoadError: a pattern matches nothing.
    """
    if not patterns:
        msg = "no checkpoints: give -c 'run/epoch*.pt', once or several times"
        raise UsageError(msg)
    found = dict.fromkeys(spec for pattern in patterns for spec in _expand(pattern))
    return tuple(map(CheckpointFile, found, _names(list(found))))


def place_of(spec: str) -> bytes:
    """Where a checkpoint lies, ``::KEY`` included: the same from every folder, whatever way leads to it."""
    file, key = split_key(spec)
    return os.fsencode(os.path.realpath(file) + (f"::{key}" if key else ""))


def natural(text: str) -> tuple[tuple[tuple[float, ...], str], ...]:
    """A key that sorts the numbers inside a text by their size.

    0.25 and 1e-3 are one number each; with two dots or more (dates, versions) each part is a number of its own.
    """
    parts = re.split(r"(\d+(?:\.\d+)*(?:[eE][+-]\d+)?)", text)
    return tuple((_numbers(part) if index % 2 else (), part) for index, part in enumerate(parts))


def _numbers(part: str) -> tuple[float, ...]:
    if part.isdecimal():
        return (int(part),)
    if part.count(".") < 2:
        return (float(part),)
    return tuple(int(digits) for digits in re.findall(r"\d+", part))


def is_pattern(spec: str) -> bool:
    """Whether a spec stands for other files than the one of its name."""
    file, _ = split_key(spec)
    return not exists(file) and glob.has_magic(file)


def _expand(spec: str) -> list[str]:
    file, key = split_key(spec)
    ending = f"::{key}" if key else ""
    if exists(file):
        return [spec]
    matches = sorted(glob.glob(os.path.expanduser(file), recursive=True), key=natural)  # noqa: PTH111, PTH207
    if not matches:
        what = "no checkpoint matches" if glob.has_magic(file) else "no such checkpoint"
        msg = f"{what} {file}: give existing files with -c, a pattern in quotes"
        raise LoadError(msg)
    return [match + ending for match in matches]


def _names(specs: Sequence[str]) -> list[str]:
    """What tells the paths apart: the parts in which they differ, without the suffix they share."""
    split = [split_key(spec) for spec in specs]
    paths = [PurePath(file) for file, _ in split]
    if len({path.suffix for path in paths}) == 1:
        paths = [path.with_suffix("") if path.suffix else path for path in paths]
    keys = [f"::{key}" if key and len({key for _, key in split}) > 1 else "" for _, key in split]
    length = max(len(path.parts) for path in paths)
    if length == min(len(path.parts) for path in paths):
        columns = [column for column in zip(*(path.parts for path in paths), strict=True) if len(set(column)) > 1]
        kept = columns or [tuple(path.name for path in paths)]
        shorts = ["/".join(parts) for parts in zip(*kept, strict=True)]
    else:
        shorts = [path.as_posix() for path in paths]
    names = [short + key for short, key in zip(shorts, keys, strict=True)]
    return names if len(set(names)) == len(names) else list(specs)
