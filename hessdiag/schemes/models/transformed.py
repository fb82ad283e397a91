"""Images through the transforms of a model's own library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

MODES = {1: "L", 3: "RGB"}
"""Of Pillow, by channels."""


class Transformed(Dataset[tuple[Any, Any]]):
    """Images and targets, each image through a function when it is asked for.

    Attributes:
        rows: map-style, (PIL image, target).
        transform: image -> tensor; it must draw no random numbers.
        mode: of Pillow, that images are converted to.
    """

    def __init__(self, rows: Sequence[Any], transform: Callable[[Any], Any], mode: str = "RGB") -> None:
        self.rows, self.transform, self.mode = rows, transform, mode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.rows[index]
        return self.transform(image.convert(self.mode)), target


def on_one_line(transform: Any) -> str:
    """What is done to an image, for `print_config`."""
    return ", ".join(" ".join(str(part).split()) for part in getattr(transform, "transforms", [transform]))


class Converted(Sequence[tuple[Any, Any]]):
    """Images in colours, whatever they are in the file, as torchvision's models take them."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        image, target = self.rows[index]
        return image.convert("RGB"), target
