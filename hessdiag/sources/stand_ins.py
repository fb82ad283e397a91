"""Inert objects that stand for what a pickle names: no code of the named classes is ever imported or called."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

NUMBERS = re.compile(r"[<>=|]?[biufcSU?]\d{0,5}")


class Foreign:
    """Stands for a name that is not in the table, and for whatever the pickle makes with it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Name:
    """A name of the table; ``build`` makes the plain data of a call of it."""

    __slots__ = ("build", "name")

    def __init__(self, name: str, build: Callable[..., Any]) -> None:
        self.name = name
        self.build = build

    def __str__(self) -> str:
        return self.name


class Stateful:
    """Stands for an object whose pickle sets a state after it was made."""

    def set_state(self, state: Any) -> None:
        """Take the state, or leave it out."""


class Attributes(dict[str, Any], Stateful):
    """An object that is nothing but its attributes, as a dict of them."""

    def set_state(self, state: Any) -> None:
        """Take the attributes a pickle sets."""
        if isinstance(state, dict):
            self.update({name: value for name, value in state.items() if isinstance(name, str)})


class Dtype(Stateful):
    """A numpy dtype: its letters, and the order of bytes that the pickle sets afterwards."""

    def __init__(self, text: Any = "", *_: Any) -> None:
        self.text = text if isinstance(text, str) and NUMBERS.fullmatch(text) else ""

    def set_state(self, state: Any) -> None:
        """Take the order of bytes; fields and units make it a dtype without plain numbers."""
        if isinstance(state, tuple) and len(state) > 3 and state[1] in ("<", ">", "|", "="):
            self.text = state[1] + self.text.lstrip("<>=|") if self.text and state[3] is None else ""


class Array(Stateful):
    """A numpy array, without its numbers: weights are tensors."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
