"""How many classes a checkpoint's last layer has, and what is said of data whose classes do not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hessdiag.errors import UsageError
from hessdiag.schemes.contract import Rows


def classes_of(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """The number of classes of a checkpoint, where it is the model but for its last layers; None where it is not.

    Args:
        state: name to tensor, of the checkpoint; its names may all begin alike, ``model.fc.weight``.
        model: built with its default number of classes.
    """
    own = model.state_dict()
    first = next(iter(own), "")
    begins = [name.removesuffix(first) for name in state if name.endswith(first)]
    for begin in begins:
        held = {name: state[f"{begin}{name}"] for name in own if f"{begin}{name}" in state}
        other = [name for name, tensor in held.items() if tensor.shape != own[name].shape]
        sizes = {int(held[name].shape[0]) for name in other if held[name].dim() > 0}
        only_first = all(held[name].shape[1:] == own[name].shape[1:] for name in other)
        counters = {name for name in own if name.endswith("num_batches_tracked")}
        if len(sizes) == 1 and only_first and held.keys() >= own.keys() - counters:
            return sizes.pop()
    return None


def check_classes(rows: Rows, classes: int, model: str) -> str | None:
    """A note where data name fewer classes than the model has.

    Args:
        rows: with the names of their classes, where they have some.
        classes: of the model.
        model: its name, for messages.

    Raises:
        UsageError: they name more than the model has.
    """
    named = len(rows.classes)
    if named > classes:
        msg = f"{rows.text} has {named} classes, {model} {classes}: give the data that it was trained on"
        raise UsageError(msg)
    if named and named < classes:
        return f"{rows.text} has {named} of the model's {classes} classes, taken as the first ones"
    return None
