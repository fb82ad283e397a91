"""The hash that names what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.hashing import content, sha256
from hessdiag.samples.batches import entries, is_texts

DEEPEST = 8  # objects inside objects: one that names itself ends here


class Digest:
    """sha256 of examples, the same however they are divided into batches: one running hash per leaf."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._headers: list[str] = []

    def example(self, example: Any) -> None:
        """Add one example, before it is put into a batch."""
        for index, leaf in enumerate(_flatten(example)):
            if isinstance(leaf, Tensor):
                self._add(index, f"{leaf.dtype} {tuple(leaf.shape)}", leaf)
            else:
                self._add(index, type(leaf).__name__, _plain(leaf).encode())

    def batch(self, batch: Any) -> None:
        """Add a batch whose tensors, and lists of texts, hold one example per row."""
        found = entries(batch, whole=is_texts)
        tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
        for index, leaf in enumerate(tensors):
            self._add(index, f"{leaf.dtype} {tuple(leaf.shape[1:])}", leaf)
        for index, leaf in enumerate((x for x in found if not isinstance(x, Tensor)), len(tensors)):
            for one in leaf if is_texts(leaf) else _flatten(leaf):
                self._add(index, type(one).__name__, one if isinstance(one, Tensor) else _plain(one).encode())

    def hexdigest(self) -> str:
        """The hash of all leaves."""
        return str(sha256(*(leaf.digest() for leaf in self._leaves)).hexdigest())

    def _add(self, index: int, header: str, leaf: Tensor | bytes) -> None:
        while len(self._leaves) <= index:
            self._leaves.append(sha256())
            self._headers.append("")
        if self._headers[index] != header:
            self._headers[index] = header
            self._leaves[index].update(header.encode())
        self._leaves[index].update(content(leaf) if isinstance(leaf, Tensor) else leaf)


def of_example(example: Any) -> str:
    """The hash of one example, or of one batch as it is."""
    digest = Digest()
    digest.example(example)
    return digest.hexdigest()


def _plain(leaf: Any) -> str:
    """What is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(leaf))


def _flatten(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _flatten(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flatten(item, depth + 1)
    elif isinstance(value, Tensor):
        yield value
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        yield _array(value)
    elif isinstance(value, str | bytes | int | float | complex | type(None)):
        yield value
    elif hasattr(value, "__dict__") and not callable(value) and depth < DEEPEST:
        for item in vars(value).values():  # a graph, a picture with its boxes: what it holds, not where it lies
            yield from _flatten(item, depth + 1)
    else:
        yield value


def _array(value: Any) -> Any:
    try:
        return torch.as_tensor(value if hasattr(value, "__array__") else np.array(value))
    except (TypeError, ValueError):  # texts, dates, objects
        return repr(np.asarray(value).tolist())
