"""Segmentation as torchvision's reference trains it: masks with 255 left out, an auxiliary head at half weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from hessdiag.errors import LoadError
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.models.transformed import Transformed
from hessdiag.schemes.pictures import as_tensors

IGNORED = 255  # the border of objects in Pascal VOC
HALF = 0.5  # of the auxiliary head, in torchvision's references/segmentation
NEAREST = 0  # of Pillow: no class between two classes
UNKNOWN = "{}: no normalisation is known, pixels are in [0, 1]; give that of training, ?mean=...&std=..."


def loss_of_segmentation(model: nn.Module) -> dict[str, Any]:
    """Fields of a `NamedModel`: the loss of torchvision's reference script.

    Args:
        model: with outputs "out", and "aux" where it has an ``aux_classifier``.
    """
    if getattr(model, "aux_classifier", None) is not None:
        return {"loss": auxiliary_loss, "weight": pixels_that_count}
    return {"criterion": nn.CrossEntropyLoss(ignore_index=IGNORED), "forward": main_output}


def auxiliary_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy over the pixels that count, with the auxiliary head's at half weight."""
    outputs = model(batch[0])
    main, aside = (F.cross_entropy(outputs[key], batch[1], ignore_index=IGNORED) for key in ("out", "aux"))
    return main + HALF * aside


def pixels_that_count(batch: Any) -> float:
    """Pixels of a batch whose class is known: what the mean is taken over."""
    return float((batch[1] != IGNORED).sum())


def main_output(model: nn.Module, batch: Any) -> Tensor:
    """Scores of the classes by pixel: (batch, classes, height, width)."""
    result: Tensor = model(batch[0])["out"]
    return result


class Masked(Dataset[tuple[Tensor, Tensor]]):
    """Pictures as tensors, their masks as classes of pixels.

    Attributes:
        rows: of images and masks, both of Pillow.
        transform: of a set of weights, which resizes and normalises; None where there is none.
    """

    def __init__(self, rows: Rows, transform: Callable[[Any], Any] | None, said: dict[str, None]) -> None:
        self.rows, self.transform, self.text = rows.rows, transform, rows.text
        self.pictures = as_tensors(Transformed(rows.rows), rows.options, rows.text)
        if transform is None and rows.options.get("mean") is None and rows.options.get("std") is None:
            said[UNKNOWN.format(rows.text)] = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.transform is None:
            pixels, mask = self.pictures[index]
        else:
            image, mask = self.rows[index]
            pixels = self.transform(image.convert("RGB"))
        if not hasattr(mask, "resize") or not hasattr(mask, "mode"):
            msg = f"{self.text}: a target is {type(mask).__name__}; segmentation needs masks of classes as images"
            raise LoadError(msg)
        height, width = pixels.shape[-2:]
        if mask.size != (width, height):
            mask = mask.resize((width, height), resample=NEAREST)
        return pixels, torch.from_numpy(np.asarray(mask).astype(np.int64))
