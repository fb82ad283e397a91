"""What torchvision's reference scripts trained with, by the arguments they saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hessdiag.schemes.known import require

ARGS = "args of the checkpoint"
MIXED = ("mixup_alpha", "cutmix_alpha")
EVALUATION = ("val_resize_size", "val_crop_size", "interpolation")
"""What the script's evaluation takes its images' size from; mean and std are ImageNet's there."""


@dataclass(frozen=True)
class Training:
    """A script's loss and evaluation.

    Attributes:
        loss: as `Problem.criterion`.
        transform: of its evaluation, PIL image -> tensor; None where it is not known.
        notes: one-line facts for the user.
    """

    loss: Any = "cross_entropy"
    transform: Callable[[Any], Any] | None = None
    notes: tuple[str, ...] = ()


def training_of(args: Mapping[str, Any], *, segmenting: bool) -> Training:
    """The training that ``args`` of ``references/classification/train.py`` tell of.

    Args:
        args: of the checkpoint; empty where it has none.
        segmenting: segmentation, whose images and loss that script does not know.
    """
    if segmenting or not args:
        return Training()
    mixed = [f"{name}={args[name]}" for name in MIXED if args.get(name)]
    notes = [f"{', '.join(mixed)} left out: measured on the images themselves"] if mixed else []
    smoothing = args.get("label_smoothing")
    loss: Any = "cross_entropy"
    if isinstance(smoothing, float) and 0 < smoothing < 1:
        loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        notes.append(
            f"label smoothing {smoothing:g}, as it was trained with; `loss='cross_entropy'` takes it plain"
        )
    return Training(loss, _evaluation(args), tuple(notes))


def _evaluation(args: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    resize, crop, how = (args.get(name) for name in EVALUATION)
    if not isinstance(resize, int) or not isinstance(crop, int) or not isinstance(how, str):
        return None
    transforms = require("torchvision", "vision", "torchvision:NAME").transforms
    found: Callable[[Any], Any] = transforms._presets.ImageClassification(
        crop_size=crop, resize_size=resize, interpolation=transforms.InterpolationMode(how)
    )
    return found
