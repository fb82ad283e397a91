"""The loss that timm's training script minimised, by the arguments it saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hessdiag.schemes.known import require

MIXED = ("mixup", "cutmix", "cutmix_minmax")
PLAIN = "`loss='cross_entropy'` takes it plain"


def loss_of_args(args: Mapping[str, Any]) -> tuple[Any, str, list[str]]:
    """The loss of images and classes, what it is called, and what the user should know.

    As in timm's ``train.py``: label smoothing in the targets, and with ``bce_loss`` a binary cross-entropy of each
    class, which that script takes only together with smoothing, mixup or cutmix.

    Args:
        args: of the checkpoint; empty where it has none.
    """
    mixed = [f"{name}={args[name]}" for name in MIXED if args.get(name)]
    smoothing = _number(args.get("smoothing"))
    notes = [f"{', '.join(mixed)} left out: measured on the images themselves"] if mixed else []
    if args.get("jsd_loss"):
        notes.append("jsd_loss left out, which compares augmentations of one image: measured is cross-entropy")
    elif args.get("bce_loss") and (smoothing or mixed):
        options: dict[str, Any] = {"target_threshold": args.get("bce_target_thresh")}
        options |= {"sum_classes": bool(args.get("bce_sum")), "pos_weight": args.get("bce_pos_weight")}
        given = {name: value for name, value in options.items() if value is not None}
        given = {name: value for name, value in given.items() if name == "target_threshold" or value}
        loss = require("timm.loss", "timm", "timm:NAME").BinaryCrossEntropy(smoothing=smoothing, **given)
        notes.append(f"binary cross-entropy of each class, as it was trained with; {PLAIN}")
        shown = "".join(f", {name}={value}" for name, value in given.items())
        return loss, f"BinaryCrossEntropy(smoothing={smoothing:g}{shown})", notes
    if smoothing:
        notes.append(f"label smoothing {smoothing:g}, as it was trained with; {PLAIN}")
    return nn.CrossEntropyLoss(label_smoothing=smoothing), f"cross_entropy, label smoothing {smoothing:g}", notes


def _number(value: Any) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    return float(value) if known else 0.0
