"""Segmentation as torchvision's reference trains it: masks with 255 left out, an auxiliary head at half weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from hessdiag.errors import LoadError
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.pictures import as_tensors

IGNORED = 255  # the border of objects in Pascal VOC
HALF = 0.5  # of the auxiliary head, in torchvision's references/segmentation
AUXILIARY = "aux_classifier."


def auxiliary_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy over the pixels that count, with the auxiliary head's at half weight."""
    outputs = model(batch[0])
    main, aside = (F.cross_entropy(outputs[key], batch[1], ignore_index=IGNORED) for key in ("out", "aux"))
    return main + HALF * aside


class Masked(Dataset[tuple[Tensor, Tensor]]):
    """Pictures as tensors, their masks as classes of pixels."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.size, self.text = rows.rows, rows.options.get("size"), rows.text
        self.pictures = as_tensors(rows.rows, rows.options, rows.text)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, mask = self.pictures[index]
        if not hasattr(mask, "resize"):
            msg = f"{self.text}: a target is {type(mask).__name__}; segmentation needs masks of classes as images"
            raise LoadError(msg)
        if self.size is not None:
            mask = mask.resize((self.size, self.size), resample=0)  # the nearest class
        return pixels, torch.from_numpy(np.asarray(mask).astype(np.int64))


def masks(rows: Rows) -> Masked:
    """Rows of pictures and masks."""
    return Masked(rows)
