"""The numbers of a torch file: storages, and tensors over them that reach no further than the file does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

TYPES: dict[str, torch.dtype | None] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    **dict.fromkeys(("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")),
}
"""torch's names of storages; None: quantized numbers."""
UNTYPED = "torch.storage.UntypedStorage"
MOST_DIMENSIONS = 64  # torch's own limit


@dataclass(frozen=True)
class Odd:
    """Something that is no plain dense tensor, and no plain value either; ``what`` names it."""

    what: str

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor of another kind: quantized, sparse, a subclass."""
        return "tensor" in self.what


@dataclass(frozen=True, slots=True)
class Storage:
    """A typed stretch of bytes of the file, from ``start`` elements on."""

    content: Tensor
    dtype: torch.dtype
    start: int = 0

    def as_type(self, dtype: torch.dtype) -> Storage:
        """The same bytes as numbers of another type."""
        return replace(self, dtype=dtype)


def persistent(identity: Any, content: Callable[[str, int, torch.dtype], Tensor]) -> Storage | Odd:
    """What a persistent id of torch stands for.

    Args:
        identity: ("storage", type, key, location, number of elements), and in old files a view of them.
        content: the bytes under a key, given how many there must be and what numbers they are.

    Raises:
        UnpicklingError: another kind of id.
    """
    view = None
    try:
        word, kind, key, _, count, *rest = identity
        view = rest[0] if rest else None
        name = kind.name
        valid = (
            word in ("storage", b"storage") and isinstance(key, str | int) and type(count) is int and count >= 0
        )
    except (TypeError, ValueError, AttributeError):
        valid = False
    if not valid:
        msg = "an unknown persistent id"
        raise UnpicklingError(msg)
    dtype = torch.uint8 if name == UNTYPED else TYPES.get(name.rpartition(".")[2])
    if dtype is None:
        return Odd("a quantized tensor")
    start = view[1] if isinstance(view, tuple) and len(view) == 3 else 0
    return Storage(content(str(key), count * dtype.itemsize, dtype), dtype, start)


def rebuild(storage: Storage, offset: int, size: Any, stride: Any) -> Tensor:
    """A tensor over a storage.

    Raises:
        UnpicklingError: it reaches beyond the storage, or counts its numbers more than once (a dimension that is
            expanded, with stride 0, is no more than one of it).
    """
    sizes, strides = tuple(size), tuple(stride)
    whole = (offset, storage.start, *sizes, *strides)
    if len(sizes) != len(strides) or len(sizes) > MOST_DIMENSIONS or not all(type(n) is int for n in whole):
        msg = "a tensor without a size"
        raise UnpicklingError(msg)
    held = storage.content.numel() // storage.dtype.itemsize
    pairs = list(zip(sizes, strides, strict=True))
    reach = offset + storage.start + sum((n - 1) * step for n, step in pairs) + 1 if 0 not in sizes else 0
    own = math.prod(n for n, step in pairs if step) if 0 not in sizes else 0
    if min(whole, default=0) < 0 or reach > held or own > held or math.prod(sizes) >= 1 << 62:
        msg = "a tensor larger than what is stored for it"
        raise UnpicklingError(msg)
    if storage.content.numel() % storage.dtype.itemsize:
        msg = "a storage of broken numbers"
        raise UnpicklingError(msg)
    return storage.content.view(storage.dtype).as_strided(sizes, strides, offset + storage.start)
