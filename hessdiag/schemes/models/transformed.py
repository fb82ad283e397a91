"""Images through the transforms of a model's own library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset


class Transformed(Dataset[tuple[Any, Any]]):
    """Images and targets, each image through a function when it is asked for.

    Attributes:
        rows: map-style, (PIL image, target).
        transform: image -> tensor; it must draw no random numbers.
    """

    def __init__(self, rows: Sequence[Any], transform: Callable[[Any], Any]) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.rows[index]
        return self.transform(image.convert("RGB")), target
