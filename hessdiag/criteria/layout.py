"""What the built-in criteria compare: which targets, in which layout, and how many of them count.

A criterion's name means what torch's own functional means for the same tensors; what torch refuses or only
broadcasts with a warning is refused here, with the line to type. Checks of shapes are made wherever the loss is
formed; checks of values once per batch, in `check_values`, since a loss may run inside `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import ProblemError

TARGET_KEYS = ("labels", "label", "target", "targets", "y")
IGNORE_INDEX = -100  # torch's own default for positions that do not count
SUMS_TO_ONE = 1e-3


def target_of(batch: Any) -> Tensor:
    """The targets of a batch: its second element, or a dict's entry called labels, target or y.

    Raises:
        ProblemError: there are none, or several.
    """
    target: Any = None
    if isinstance(batch, Mapping):
        found = {key: batch[key] for key in TARGET_KEYS if isinstance(batch.get(key), Tensor)}
        if len(found) > 1:
            msg = f"several targets in a batch ({', '.join(found)}): keep one, or give criterion=f(outputs, batch)"
            raise ProblemError(msg)
        target = next(iter(found.values()), None)
    elif isinstance(batch, Sequence) and len(batch) > 1:
        target = batch[1]
    if not isinstance(target, Tensor):
        msg = f"no targets in a batch of type {type(batch).__name__}: give (inputs, targets), or a criterion"
        raise ProblemError(msg)
    return target


def is_index(targets: Tensor) -> bool:
    """Whether targets are class indices by their type: whole numbers."""
    return not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)


def counting(targets: Tensor) -> Tensor:
    """Which class indices count: all but -100. Small types would wrap -100 to a class."""
    return targets.long() != IGNORE_INDEX


def check_values(criterion: str, targets: Tensor) -> None:
    """Refuse targets whose values are none of this criterion's.

    Raises:
        ProblemError: with the line to type.
    """
    if targets.is_floating_point() and not bool(torch.isfinite(targets).all()):
        bad = int((~torch.isfinite(targets)).sum())
        msg = f"{bad} of {targets.numel()} targets are NaN or infinite: leave these out, or give a criterion"
        raise ProblemError(msg)
    if criterion == "mse" or is_index(targets):
        return
    if not targets.is_floating_point():
        msg = f"criterion {criterion!r}: class indices are {kind_of(targets)}: give targets.long()"
        raise ProblemError(msg)
    if targets.dim() > 2 and _normal(targets, -1) and not _normal(targets, 1):
        msg = (
            f"soft targets {tuple(targets.shape)} sum to one over the last dimension, torch's classes are second: "
        )
        raise ProblemError(msg + "move them, targets.movedim(-1, 1), and the outputs likewise in forward=")


def check_index(targets: Tensor, given: str, ignored: int, classes: int | None) -> None:
    """Refuse class indices that torch refuses for this criterion.

    Args:
        targets: whole numbers.
        given: torch's name of the loss.
        ignored: the index that does not count.
        classes: how many there are, if that is known.

    Raises:
        ProblemError: with the line to type.
    """
    found = targets.long()
    found = found[found != ignored]
    low, high = (int(found.min()), int(found.max())) if found.numel() else (0, 0)
    if low < 0 and ignored != IGNORE_INDEX:
        msg = f"targets hold {low}, and {given} ignores {ignored}: give ignore_index={low}, or other targets"
        raise ProblemError(msg)
    if classes is not None and high >= classes:
        msg = f"targets hold class {high}, and weight of {given} has {classes} numbers: one per class is needed"
        raise ProblemError(msg)


def _normal(targets: Tensor, axis: int) -> bool:
    return bool(((targets.sum(axis) - 1).abs() < SUMS_TO_ONE).all())


def align_classes(
    outputs: Any, targets: Tensor, criterion: Any = "cross_entropy", torchs: str = ""
) -> tuple[Tensor, Tensor]:
    """Logits as (n, classes) and targets as (n,) or (n, classes).

    Class indices may stand beside classes that come last or second, as torch's do; soft targets are shaped as the
    outputs, with the classes second. Of a causal language model classes come last.

    Args:
        outputs: one tensor.
        targets: class indices, or class probabilities.
        criterion: the built-in name.
        torchs: torch's name of the loss, if it is one of torch's: classes are second.

    Raises:
        ProblemError: shapes that do not fit, or fit two ways; one class only.
    """
    outputs = single(outputs, torchs or f"criterion {criterion!r}")
    if not is_index(targets):
        logits, targets = _soft(outputs, targets)
    elif torchs:
        logits, targets = _second(outputs, targets, torchs), targets.reshape(-1).long()
    else:
        logits, targets = _hard(outputs, targets, last_only=criterion == "causal_lm"), targets.reshape(-1).long()
    if logits.shape[1] == 1:
        msg = (
            "one logit has one class, whose cross-entropy is 0: for two classes criterion=lambda outputs, batch: "
        )
        raise ProblemError(
            msg + "torch.nn.functional.binary_cross_entropy_with_logits(outputs, batch[1].reshape(outputs.shape)"
            ".to(outputs)); for a number 'mse'"
        )
    return logits, targets


def _second(outputs: Tensor, targets: Tensor, given: str) -> Tensor:
    """Logits (n, classes) of outputs (N, C, ...) for class indices (N, ...), as torch reads them."""
    if outputs.dim() < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        shapes = f"outputs {tuple(outputs.shape)} and targets {kind_of(targets)} do not fit {given}"
        if outputs.shape[:-1] == targets.shape:
            cure = 'its classes are second: give criterion="cross_entropy", which takes classes last too'
        elif outputs.dim() == targets.dim() and targets.shape[1:].numel() == 1:
            cure = "class indices have no dimension of classes, give targets.flatten()"
        elif targets.shape == outputs.shape:
            cure = "class probabilities are floats, give targets.float()"
        else:
            cure = "it needs (N, classes, ...) and (N, ...)"
        msg = f"{shapes}: {cure}"
        raise ProblemError(msg)
    return outputs.movedim(1, -1).reshape(-1, outputs.shape[1])


def _hard(outputs: Tensor, targets: Tensor, *, last_only: bool) -> Tensor:
    shapes = f"logits {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
    own = "give criterion=lambda outputs, batch: ..."
    last = outputs.dim() == targets.dim() + 1 and outputs.shape[:-1] == targets.shape
    second = (
        outputs.dim() == targets.dim() + 1
        and outputs.dim() > 2
        and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    )
    if last_only and not last:
        msg = f"{shapes} do not fit criterion 'causal_lm': it needs (batch, tokens, words) and (batch, tokens)"
        raise ProblemError(msg)
    if last == second and not last_only:
        if last:
            msg = f"{shapes} could be read two ways (classes last or second): {own}"
        elif targets.shape == outputs.shape and outputs.dim() > 1:
            msg = f"{shapes} of whole numbers: class probabilities are floats, give targets.float()"
        elif targets.dim() == outputs.dim() and targets.shape[1:].numel() == 1:
            msg = f"{shapes} do not fit: class indices have no dimension of classes, give targets.flatten()"
        else:
            msg = f"{shapes} do not fit (classes last or second): {own}"
        raise ProblemError(msg)
    if second and not last_only:
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(-1, outputs.shape[-1])


def _soft(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    shapes = f"logits {tuple(outputs.shape)} and targets {tuple(targets.shape)}"
    if not targets.is_floating_point() or targets.dim() < outputs.dim():
        cure = "targets.float()" if targets.shape == outputs.shape else "targets.long()"
        msg = f"{shapes}: class indices are {kind_of(targets)}, give {cure}"
        raise ProblemError(msg)
    if targets.shape != outputs.shape:
        msg = f"{shapes}: class probabilities are shaped as the logits, class indices are whole numbers"
        raise ProblemError(msg)
    axis = 1 if outputs.dim() > 1 else 0
    logits, soft = outputs.movedim(axis, -1), targets.movedim(axis, -1)
    return logits.reshape(-1, logits.shape[-1]), soft.reshape(-1, soft.shape[-1])


def squared_error(outputs: Any, targets: Tensor) -> Tensor:
    """(outputs − targets)², elementwise: targets (n,) and outputs (n, 1) are the same numbers, nothing else is.

    Raises:
        ProblemError: another layout, which torch would broadcast or refuse.
    """
    outputs = single(outputs, "criterion 'mse'")
    if outputs.is_complex() or targets.is_complex():
        msg = "criterion 'mse' is of real numbers: give criterion=lambda outputs, batch: ... for complex ones"
        raise ProblemError(msg)
    if targets.shape != outputs.shape:
        if not same_numbers(outputs, targets):
            msg = f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape: "
            raise ProblemError(msg + "criterion 'mse' needs one layout; permute either, in data or forward=")
        targets = targets.reshape(outputs.shape)
    # not F.mse_loss: its forward-mode derivative fails in torch 2.13 (pytorch#123996)
    difference: Tensor = outputs - targets.to(outputs.dtype)
    return difference.square()


def same_numbers(outputs: Tensor, targets: Tensor) -> bool:
    """Whether two shapes differ by a last dimension of 1 alone."""
    longer, shorter = sorted((tuple(outputs.shape), tuple(targets.shape)), key=len, reverse=True)
    return longer == (*shorter, 1)


def single(outputs: Any, what: str) -> Tensor:
    """The outputs, if they are one tensor.

    Raises:
        ProblemError: they are not; with the line to type.
    """
    if isinstance(outputs, Tensor):
        return outputs
    name, cure = type(outputs).__name__, "model(batch[0])"
    if isinstance(outputs, Mapping) and outputs:
        keys = [str(key) for key in outputs]
        name += f" ({', '.join(keys[:4])})"
        cure += f"[{next((key for key in ('logits', 'out') if key in keys), keys[0])!r}]"
    elif isinstance(outputs, Sequence):
        cure += "[0]"
    else:
        cure += ".logits"
    msg = f"the model returns {name}, {what} needs one tensor: give forward=lambda model, batch: {cure}"
    if isinstance(outputs, Mapping | Sequence) and len(outputs) > 1:
        msg += ", or a criterion=f(outputs, batch) where the others count too (an auxiliary loss)"
    raise ProblemError(msg)


def kind_of(targets: Tensor) -> str:
    """Shape and type of a tensor, for a message."""
    return f"{str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}"
