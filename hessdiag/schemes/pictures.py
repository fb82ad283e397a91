"""Images of a data set as tensors, where the model's own library has no transforms for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hessdiag.errors import UsageError

MODES = {1: "L", 3: "RGB"}
"""Of Pillow, by channels."""
OPTIONS: Mapping[str, Any] = {"size": None, "mean": None, "std": None}
"""What an address of images takes: the side in pixels, and what pixels in [0, 1] are normalised by."""


class Pictures(Dataset[tuple[Tensor, Any]]):
    """PIL images as float32 (channels, height, width) in [0, 1], normalised if that is asked for.

    Attributes:
        rows: map-style, (image, target).
        size: side in pixels; None leaves each as it is.
        mean: per channel or one for all, subtracted.
        std: likewise, divided by.
    """

    def __init__(self, rows: Any, size: int | None, mean: Tensor, std: Tensor) -> None:
        self.rows, self.size, self.mean, self.std = rows, size, mean, std

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, target = self.rows[index]
        if self.size is not None:
            image = image.resize((self.size, self.size))
        array = np.asarray(image, dtype=np.float32) / 255
        pixels = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
        return (pixels - self.mean) / self.std, target


def as_tensors(rows: Any, options: Mapping[str, Any], text: str) -> Pictures:
    """Images as tensors.

    Args:
        rows: map-style, (PIL image, target).
        options: size, mean, std, of the address; others are not looked at.
        text: the address.

    Raises:
        UsageError: size, mean or std cannot be one.
    """
    size = options.get("size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        msg = f"{text}: size={size} must be a whole number of pixels, size=224 for example"
        raise UsageError(msg)
    centre = _per_channel("mean", options.get("mean"), 0.0, text)
    spread = _per_channel("std", options.get("std"), 1.0, text)
    if not bool((spread > 0).all()):
        msg = f"{text}: std must be above 0"
        raise UsageError(msg)
    return Pictures(rows, size, centre, spread)


def _per_channel(name: str, value: Any, default: float, text: str) -> Tensor:
    values = default if value is None else value
    values = values if isinstance(values, list) else [values]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in values) or not values:
        msg = f"{text}: {name}={value} must be a number, or one for each channel: {name}=[0.5,0.5,0.5]"
        raise UsageError(msg)
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
