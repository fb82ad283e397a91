"""Models of a library by name: names in arguments of a checkpoint, names that are none, and constructors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from hessdiag.errors import UsageError, one_line
from hessdiag.schemes.address import Address


def name_in(address: Address, args: Mapping[str, Any], checkpoint: str | None) -> str:
    """The model's name: that of the address, else that of the arguments beside the weights.

    Args:
        address: ``timm:resnet18`` or ``timm:``.
        args: of the training script, from the checkpoint.
        checkpoint: for messages.

    Raises:
        UsageError: neither says it.
    """
    name = address.place.partition("@")[0] or str(args.get("model") or "")
    if not name:
        where = f"{checkpoint} holds no args with a model" if checkpoint else "no checkpoint is given"
        msg = f"{address.text}: {where}; name the model, {address.scheme}:resnet18"
        raise UsageError(msg)
    return name


def near(name: str, known: Iterable[str], otherwise: str) -> str:
    """The names of a library that are most like one that it has not, or another hint."""
    found = get_close_matches(name, list(known), 3)
    return f"did you mean {', '.join(found)}?" if found else otherwise


def created(what: str, options: Mapping[str, Any], make: Callable[[], nn.Module]) -> nn.Module:
    """A model from its library's constructor.

    Args:
        what: library and name, for messages.
        options: that were given, for messages.
        make: calls the constructor.

    Raises:
        UsageError: whatever the constructor raises.
    """
    try:
        return make()
    except Exception as error:  # a model's constructor raises what it likes
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
        msg = f"{what} with {given}: {type(error).__name__}: {one_line(error, 160)}"
        raise UsageError(msg) from error
