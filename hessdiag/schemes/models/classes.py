"""How many classes a checkpoint's last layer has, and what is said of classes that do not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hessdiag.errors import UsageError
from hessdiag.schemes.contract import Rows


def classes_of(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """The number of classes of a checkpoint, where it is the model but for its last layer; None where it is not.

    Args:
        state: name to tensor, of the checkpoint.
        model: built with its default number of classes.
    """
    own = model.state_dict()
    other = [name for name, tensor in state.items() if name in own and tensor.shape != own[name].shape]
    sizes = {int(state[name].shape[0]) for name in other if state[name].dim() > 0}
    only_first = all(state[name].shape[1:] == own[name].shape[1:] for name in other)
    return sizes.pop() if len(sizes) == 1 and only_first and {*state} >= {*own} - {*other} else None


def check_classes(rows: Rows, classes: int, model: str) -> str | None:
    """A note where data name other classes than the model has.

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
