"""Images through the transforms of a model's own library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset


class Transformed(Dataset[tuple[Any, Any]]):
    """Images and targets, each image in colours, and through a function, when it is asked for.

    Attributes:
        rows: map-style, (PIL image, target).
        transform: image -> tensor, which must draw no random numbers; None leaves images.
        mode: of Pillow, that images are converted to.
    """

    def __init__(
        self, rows: Sequence[Any], transform: Callable[[Any], Any] | None = None, mode: str = "RGB"
    ) -> None:
        self.rows, self.transform, self.mode = rows, transform, mode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.rows[index]
        image = image.convert(self.mode)
        return image if self.transform is None else self.transform(image), target


def on_one_line(transform: Any) -> str:
    """What is done to an image, for `print_config`."""
    return ", ".join(" ".join(str(part).split()) for part in getattr(transform, "transforms", [transform]))
