"""Arithmetic of long vectors in float64 with the memory of a window: no whole vector is ever widened.

Vectors of up to `WINDOW` numbers are one window, and their results those of the plain operations to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

WINDOW = 1 << 20  # numbers; 8 MiB in float64, beside which what an operation costs to start is nothing


def windows(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same windows of vectors of one length, as views; any shape, contiguous or not that long."""
    if vectors[0].numel() <= WINDOW:
        yield vectors
        return
    yield from zip(*(torch.split(vector.reshape(-1), WINDOW) for vector in vectors), strict=True)


def norm(tensor: Tensor) -> float:
    """The Euclidean norm, taken in double precision."""
    return together(_norm(part) for (part,) in windows(tensor))


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖, subtracted in the wider of their types."""
    return together(_norm(x - y) for x, y in windows(a, b))


def distance_in_double(a: Tensor, b: Tensor) -> float:
    """‖a − b‖, subtracted in double precision."""
    return together(_norm(x.double() - y.double()) for x, y in windows(a, b))


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product, multiplied in double precision."""
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in windows(a, b))


def add(total: Tensor, part: Tensor) -> None:
    """Add ``part`` to ``total``, contiguous and maybe of a wider type, in place."""
    for kept, piece in windows(total, part):
        kept.add_(piece)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products along the last dimension, multiplied as they are, added up in float64; (..., n) to (...)."""
    pairs = zip(torch.split(a, WINDOW, -1), torch.split(b, WINDOW, -1), strict=True)
    parts = [(x * y).sum(-1, dtype=torch.float64) for x, y in pairs]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def joined(pieces: list[Tensor]) -> Tensor:
    """Tensors as one vector; the list is emptied on the way, so that no long vector is held twice."""
    size = sum(piece.numel() for piece in pieces)
    if size <= WINDOW:
        return torch.cat([piece.reshape(-1) for piece in pieces])
    vector, end = pieces[0].new_empty(size), size
    while pieces:
        piece = pieces.pop().reshape(-1)
        vector[end - piece.numel() : end].copy_(piece)
        end -= piece.numel()
    return vector


def narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector in a narrower type, written over the wide one, whose memory it keeps."""
    if wide.dtype == dtype:
        return wide
    narrow = wide.view(dtype)[: len(wide)]
    for begin in range(0, len(wide), WINDOW):  # what is written was read before
        narrow[begin : begin + WINDOW] = wide[begin : begin + WINDOW].to(dtype)
    return narrow


def _norm(tensor: Tensor) -> float:
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(tensor, dtype=wide).real)


def together(norms: Iterable[float]) -> float:
    """The norm of a vector by those of its parts."""
    found = list(norms)
    return found[0] if len(found) == 1 else math.hypot(*found)
