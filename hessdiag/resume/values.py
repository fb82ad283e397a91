"""Results in the types of JSON and back, to the bit; large tensors stay beside the line."""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.errors import Refused

LARGE = 1 << 16  # bytes from which a tensor is no part of a line


def plain(value: Any, large: dict[str, Tensor]) -> Any:
    """A result in the types of JSON.

    Args:
        value: numbers, texts, arrays and tensors; tuples, lists and dataclasses of them; a refusal.
        large: gets the tensors that are too large for a line, by the names that stand for them there.
    """
    if isinstance(value, Refused):
        return {"refused": value.reason}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, one.name) for one in dataclasses.fields(value))
    if isinstance(value, list | tuple):
        return [plain(one, large) for one in value]
    if isinstance(value, np.ndarray):
        return {"array": packed(torch.from_numpy(np.ascontiguousarray(value)))}
    if isinstance(value, Tensor):
        if value.nbytes < LARGE:
            return {"tensor": packed(value)}
        name = f"value-{len(large)}"
        large[name] = value
        return {"large": name}
    return value.item() if isinstance(value, np.generic) else value


def restored(found: Any, large: Mapping[str, Tensor], into: Callable[..., Any] | None = None) -> Any:
    """The inverse of `plain`; lists come back as tuples, tensors on the CPU.

    Args:
        found: what `plain` gave.
        large: tensors by name.
        into: the dataclass it was, if it was one.
    """
    if isinstance(found, list):
        parts = tuple(restored(one, large) for one in found)
        return parts if into is None else into(*parts)
    if not isinstance(found, dict):
        return found
    if "refused" in found:
        return Refused(found["refused"])
    if "large" in found:
        return large[found["large"]].clone()
    if "array" in found:
        return unpacked(found["array"]).numpy()
    return unpacked(found["tensor"])


def packed(tensor: Tensor) -> list[Any]:
    """Data type, shape and bytes as text."""
    text = base64.b64encode(content(tensor)).decode()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), text]


def unpacked(found: list[Any]) -> Tensor:
    """The inverse of `packed`."""
    kind, shape, text = found
    flat = torch.frombuffer(bytearray(base64.b64decode(text)) or bytearray(1), dtype=torch.uint8)
    if not text:
        return torch.empty(shape, dtype=getattr(torch, kind))
    return flat.view(getattr(torch, kind)).reshape(shape)


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it lies in one piece on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def checksum(tensor: Tensor) -> int:
    """Of its bytes: notices what a crash of the machine left half written."""
    return zlib.crc32(content(tensor))
