"""What modules keep beside their tensors (``get_extra_state``), handed back to them as it was saved.

torch keeps it under names that end in ``_extra_state``. Here a tensor without elements carries each value, so that
it goes wherever the names of tensors go. Bytes are refused: modules that keep some (those of Transformer Engine)
unpickle them, which runs whatever code is in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import LoadError

NAME = "_extra_state"  # torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX
SCALARS = (type(None), bool, int, float, complex, str)
CONTAINERS = (list, tuple, set, frozenset)
BYTES = (torch.uint8, torch.int8)


class Extra(Tensor):
    """A tensor without elements that carries a value."""

    value: Any


def is_extra(name: str) -> bool:
    """Whether torch keeps a module's extra state under this name."""
    return name.rpartition(".")[2] == NAME


def carried(value: Any) -> Extra:
    """The value, as a tensor among tensors."""
    found = torch.empty(0).as_subclass(Extra)
    found.value = value
    return found


def value_of(item: Any) -> Any:
    """What is carried; anything else as it is."""
    return item.value if isinstance(item, Extra) else item


def is_nothing(item: Any) -> bool:
    """Whether a carried value is none: a module that has nothing to keep."""
    if not isinstance(item, Extra):
        return False
    value = item.value
    if isinstance(value, Tensor):
        return value.numel() == 0
    return value is None or (isinstance(value, (*CONTAINERS, dict, str, bytes, bytearray)) and not value)


def require_plain(name: str, value: Any, file: Path) -> None:
    """Refuse a value of an untrusted file that could run code in its module, or that is not what was saved.

    Raises:
        LoadError: it holds bytes, or an object that is neither number, text, tensor nor container.
    """
    for part in _parts(value):
        if isinstance(part, bytes | bytearray) or (isinstance(part, Tensor) and part.dtype in BYTES):
            size = part.numel() if isinstance(part, Tensor) else len(part)
            why = "bytes, which its module can run as code (set_extra_state)" if size else ""
        else:
            plain = isinstance(part, Tensor) or type(part) in (*SCALARS, *CONTAINERS, dict)
            why = "" if plain else "an object, which its module would not get as it was saved"
        if why:
            msg = f"{file}: {name} holds {why}: `trust_pickle=True` if you made the file yourself"
            raise LoadError(msg)


def _parts(value: Any) -> Iterator[Any]:
    """The value and all that lies in it, each once: a list can hold itself."""
    seen, stack = set[int](), [value]
    while stack:
        part = stack.pop()
        yield part
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, dict):
            stack += part.keys()
            stack += part.values()
        elif isinstance(part, CONTAINERS):
            stack += part
