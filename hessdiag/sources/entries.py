"""Where in a checkpoint the weights lie: an entry of it, or the tensors whose names begin alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from hessdiag.errors import LoadError
from hessdiag.shown import single_spaced
from hessdiag.sources.storages import Odd

ENTRIES = ("state_dict", "model", "model_state_dict", "module", "net", "params", "weights")
"""Where training scripts put the weights, in order of preference (timm's list and common practice).

Averages (EMA) are not among them: they are another checkpoint, and must be asked for by name.
"""
DEEPEST = 3  # entries within entries; a file can also hold itself
SHOWN = 8
AVERAGES = ("ema", "avg", "average", "swa", "shadow")


def choose(content: Any, key: str | None, file: Path, notes: list[str]) -> tuple[Any, str]:
    """The mapping that holds the weights, and the entries (and the prefix) that led to it.

    Args:
        content: what the file was read as.
        key: entries and at last a prefix, joined by ``::``; none: the first of `ENTRIES`, or the only one.
        file: for messages.
        notes: takes one-line facts for the user.

    Raises:
        LoadError: no such entry, or several and none of them usual.
    """
    path: list[str] = []
    chosen = unwrap(content, notes)
    parts = key.split("::") if key else []
    while parts and parts[0] in (inside := named(chosen)):
        path.append(parts.pop(0))
        chosen = unwrap(inside[path[-1]], notes)
    if not key or parts:
        chosen = _usual(chosen, path, file, notes, asked=bool(key))
    if parts:
        chosen = _prefixed(chosen, "::".join(parts), path, content, file, notes)
    if key and not has_tensors(chosen):
        below = _entries(chosen)
        way_out = (
            f"choose one in it, -c {file}::{'::'.join([*path, below[0]])}" if below else _with_tensors(content)
        )
        msg = f"{file}: its entry {'::'.join(path)!r} is no state dict: {way_out}"
        raise LoadError(msg)
    return chosen, "::".join(path)


def named(value: Any) -> Mapping[str, Any]:
    """What lies in a mapping under names, or in a list; numbers count as their digits."""
    pairs = (
        enumerate(value)
        if isinstance(value, list | tuple)
        else value.items()
        if isinstance(value, Mapping)
        else ()
    )
    return {str(name): item for name, item in pairs if isinstance(name, str | int)}


def _usual(chosen: Any, path: list[str], file: Path, notes: list[str], *, asked: bool) -> Any:
    """The entry where training scripts put the weights; of one file there can be several within each other."""
    begin = len(path)
    while isinstance(chosen, Mapping) and len(path) - begin < DEEPEST:
        entry = next((name for name in ENTRIES if _holds_weights(chosen.get(name))), None)
        if entry is None:
            break
        others = [name for name in _entries(chosen) if name != entry]
        path.append(entry)
        notes.append(f"used the entry {entry!r} of {len(chosen)}: {some(chosen)}")
        if others and not asked:
            spec = "::".join([*path[:-1], others[0]])
            notes.append(f"other entries with weights: {', '.join(others)}; choose with -c {file}::{spec}")
        chosen = unwrap(chosen[entry], notes)
    others, inside = _entries(chosen), named(chosen)
    if asked or len(path) > begin or has_tensors(chosen) or not others:
        return chosen
    if len(others) == 1 and not any(word in others[0].lower() for word in AVERAGES):
        path.append(others[0])
        notes.append(f"used {others[0]!r}, the only entry with weights of {len(inside)}: {some(inside)}")
        return _usual(unwrap(inside[others[0]], notes), path, file, notes, asked=True)
    msg = f"{file}: which weights? it has {', '.join(others)}; choose one, for example -c {file}::{others[0]}"
    raise LoadError(msg)


def _prefixed(chosen: Any, key: str, path: list[str], content: Any, file: Path, notes: list[str]) -> Any:
    prefix = key if key.endswith(".") else f"{key}."
    names = [name for name in chosen if isinstance(name, str)] if has_tensors(chosen) else []
    inside = [name for name in names if name.startswith(prefix) and len(name) > len(prefix)]
    if not inside:
        begins = sorted({f"{name.partition('.')[0]}." for name in names if name.isprintable() and "." in name})
        words = f"; names in it begin with {some(begins)}" if begins else ""
        msg = f"{file} has no entry {key!r}: {_with_tensors(content)}{words}"
        raise LoadError(msg)
    path.append(prefix)
    left = [name for name in names if not name.startswith(prefix)]
    outside = f", left out {some(left)}" if left else ""
    notes.append(f"took the {len(inside)} names that begin with {prefix!r}{outside}")
    return {name.removeprefix(prefix): chosen[name] for name in inside}


def unwrap(value: Any, notes: list[str]) -> Any:
    """The state dict of a whole module; anything else as it is."""
    if not isinstance(value, nn.Module):
        return value
    notes.append(f"the file holds a whole {type(value).__name__}: took its state_dict()")
    return value.state_dict()


def has_tensors(value: Any) -> bool:
    """Whether it is a mapping with at least one tensor under a name."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str)
        and (isinstance(item, Tensor) or is_numbers(item) or (isinstance(item, Odd) and item.is_tensor))
        for name, item in value.items()
    )


def is_numbers(value: Any) -> bool:
    """Whether it is an array of numpy that a tensor can hold; only a trusted pickle gives one."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiu"


def _holds_weights(value: Any, depth: int = DEEPEST, known: dict[int, bool] | None = None) -> bool:
    if isinstance(value, nn.Module):
        return True
    if not isinstance(value, Mapping):
        return False
    known = {} if known is None else known  # one mapping can lie under many names
    if id(value) not in known:
        known[id(value)] = has_tensors(value)
    if known[id(value)] or depth == 0:
        return known[id(value)]
    return any(_holds_weights(value.get(name), depth - 1, known) for name in ENTRIES)


def _entries(content: Any) -> list[str]:
    known: dict[int, bool] = {}
    return [
        name
        for name, item in named(content).items()
        if name.isprintable() and _holds_weights(item, DEEPEST, known)
    ]


def some(names: Iterable[Any]) -> str:
    """The first of some names, on one line."""
    words = [single_spaced(name) for name in islice(names, SHOWN + 1)]
    return ", ".join(words[:SHOWN]) + (" ..." if len(words) > SHOWN else "")


def _with_tensors(content: Any) -> str:
    return "those with tensors are " + (
        ", ".join(_entries(content)) or ("none: leave it off" if has_tensors(content) else "none")
    )
