"""``scheme:place?key=value&...``, what users type to name a model or data. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from hessdiag.errors import UsageError
from hessdiag.sources.spec import literal

FORM = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9_-]*):(?P<rest>.*)", re.DOTALL)
SPLIT = re.compile(r"(?P<split>[A-Za-z_]\w*)=(?P<rest>.*)", re.DOTALL)
OPTIONS = re.compile(r"(?P<place>.*)\?(?P<options>[A-Za-z_]\w*=.*)", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A model or data, by name.

    Attributes:
        scheme: who knows the place: "hf", "timm", "csv".
        place: a name, file or folder; may be empty where the checkpoint says it.
        options: behind the question mark; values as `literal` reads them.
        text: as it was typed.
    """

    scheme: str
    place: str
    options: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""

    def __str__(self) -> str:
        """As it was typed."""
        return self.text

    def take(self, allowed: Mapping[str, Any]) -> dict[str, Any]:
        """The options with defaults filled in.

        Args:
            allowed: default by name; a value that is given has the type of its default, or any where that is None.

        Raises:
            UsageError: an unknown option, or a value of another type.
        """
        for key, value in self.options.items():
            if key not in allowed:
                names = ", ".join(allowed) or "none"
                msg = f"{self.text}: {self.scheme} takes no option {key!r}; allowed: {names}"
                raise UsageError(msg)
            default = allowed[key]
            number = isinstance(default, int | float) and not isinstance(default, bool)
            wrong = isinstance(value, bool) or not isinstance(value, int | float)
            if (isinstance(default, bool) and not isinstance(value, bool)) or (number and wrong):
                kind = "true or false" if isinstance(default, bool) else "a number"
                msg = f"{self.text}: {key}={value} must be {kind}, {key}={str(default).lower()} for example"
                raise UsageError(msg)
            if isinstance(default, int) and number and (isinstance(value, float) or value < 1):
                msg = f"{self.text}: {key}={value} must be a whole number of at least 1"
                raise UsageError(msg)
        return {**allowed, **self.options}


def parse_address(text: str, what: str, known: Mapping[str, str]) -> Address:
    """The parts of an address.

    Args:
        text: as typed.
        what: the option it was given to, "model" or "data".
        known: the schemes there are, each with an example.

    Raises:
        UsageError: no scheme or an unknown one, or options that are not key=value.
    """
    match = FORM.fullmatch(text)
    if match is None and text in known:
        match = FORM.fullmatch(f"{text}:")
    if match is None or match["scheme"] not in known:
        examples = ", ".join(example for example in known.values())
        msg = f"`{what}={text!r}`: allowed: {examples}"
        raise UsageError(msg)
    place, options = match["rest"], dict[str, Any]()
    if (found := OPTIONS.fullmatch(place)) is not None:
        place = found["place"]
        options = _options(found["options"], text)
    return Address(match["scheme"], place, options, text)


def split_of(text: str) -> tuple[str | None, str]:
    """Take ``test=csv:...`` apart into the split and the address; None where no split is named."""
    match = SPLIT.fullmatch(text)
    return (None, text) if match is None else (match["split"], match["rest"])


def _options(text: str, whole: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in text.split("&"):
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            msg = f"{whole}: {pair!r} is no option; options are written ?name=value&name=value"
            raise UsageError(msg)
        if key in options:
            msg = f"{whole}: {key} is given twice; keep one"
            raise UsageError(msg)
        options[key] = literal(unquote(value))
    return options
