"""Labels of data as the targets of a classifier: by the names in its config.json, or by index."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.criteria import IGNORE_INDEX
from hessdiag.errors import LoadError
from hessdiag.shown import listed

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
UNNAMED = re.compile(r"LABEL_\d+")  # what the library calls classes that were given no names
Index = Callable[[Any], int]


class Labels:
    """What the labels of one model may be.

    Attributes:
        count: outputs of the model.
        names: of its classes, by index.
        kind: "single_label_classification", "multi_label_classification" or "regression", as config.json says it
            or the first labels show; None until then.
        notes: what was done with them, for the user.
    """

    def __init__(self, config: Any) -> None:
        self.count = int(config.num_labels)
        self.names = {int(index): str(name) for index, name in config.id2label.items()}
        self.kind: str | None = config.problem_type or (REGRESSION if self.count == 1 else None)
        self.notes: dict[str, None] = {}
        self._index = {name: index for index, name in self.names.items()}
        self._named = not all(UNNAMED.fullmatch(name) for name in self.names.values())

    def targets(self, given: Sequence[Any], classes: tuple[str, ...], text: str) -> Tensor:
        """The targets of a split: (n,) int64, or (n,) or (n, count) float32.

        Args:
            given: one label per example: an index, a name, a number; a list of them where there are several.
            classes: names of the classes by index, where the data say them.
            text: the address, for messages.

        Raises:
            LoadError: a label is none of the model's.
        """
        index = self.lookup(classes, text)
        if self.kind is None:
            self.kind = MULTI if isinstance(given[0], list) else SINGLE
        if self.kind == SINGLE:
            return torch.tensor([index(label) for label in given])
        if self.kind == MULTI:
            return torch.tensor([self._several(label, index, text) for label in given], dtype=torch.float32)
        return torch.tensor([self._numbers(label, text) for label in given], dtype=torch.float32)

    def lookup(self, classes: tuple[str, ...], text: str) -> Index:
        """What turns a label of the data into an index of the model.

        Raises:
            LoadError: the data name classes that the model does not have.
        """
        places: Mapping[int, int] = {}
        if classes and self.kind != REGRESSION:
            places = self._places(classes, text)

        def index(label: Any) -> int:
            if isinstance(label, str):
                if label in self._index:
                    return self._index[label]
                known = listed(list(self._index))
                cure = "" if self._named else "; write your names into id2label and label2id of config.json"
                msg = f"{text}: label {label!r} is none of the model's: {known}{cure}"
                raise LoadError(msg)
            if isinstance(label, float) and label.is_integer():
                label = int(label)
            if not isinstance(label, int | np.integer):
                msg = f"{text}: label {label!r} is no class: give an index, 0 to {self.count - 1}, or a name"
                raise LoadError(msg)
            found = places.get(int(label), int(label))
            if not 0 <= found < self.count:
                msg = f"{text}: label {label} is out of range: the model has {self.count} classes, 0 to "
                raise LoadError(msg + f"{self.count - 1}")
            return found

        return index

    def _places(self, classes: tuple[str, ...], text: str) -> dict[int, int]:
        """Index of the data -> index of the model; by name where all names are the model's."""
        if all(name in self._index for name in classes):
            places = {place: self._index[name] for place, name in enumerate(classes)}
            if any(place != found for place, found in places.items()):
                self.notes[f"{text}: classes are matched to the model's by their names"] = None
            return places
        if len(classes) != self.count or (self._named and any(name in self._index for name in classes)):
            strange = next(name for name in classes if name not in self._index)
            msg = f"{text} has {len(classes)} classes, {listed(list(classes))}; the model {self.count}, "
            msg += f"{listed(list(self._index))}: {strange!r} is none of them"
            raise LoadError(msg)
        if self._named:
            pairs = f"{classes[0]} is taken for {self.names[0]}"
            self.notes[f"{text}: classes are matched to the model's by index, {pairs}"] = None
        return {}

    def _several(self, label: Any, index: Index, text: str) -> list[float]:
        given = list(label) if isinstance(label, list | tuple) else [label]
        if all(isinstance(one, str) for one in given):
            chosen = {index(one) for one in given}
            return [float(place in chosen) for place in range(self.count)]
        numbers = all(isinstance(one, int | float) and 0 <= one <= 1 for one in given)
        if len(given) != self.count or not numbers:
            msg = f"{text}: label {label!r} is not {self.count} numbers of 0 or 1, one of each class, nor names"
            raise LoadError(msg)
        return [float(one) for one in given]

    def _numbers(self, label: Any, text: str) -> float | list[float]:
        given = list(label) if isinstance(label, list | tuple) else [label]
        if len(given) != self.count or not all(_is_finite(one) for one in given):
            what = "a finite number" if self.count == 1 else f"{self.count} finite numbers"
            msg = f"{text}: label {label!r}: the model is a regression and needs {what}"
            raise LoadError(msg)
        values = [float(one) for one in given]
        return values[0] if self.count == 1 else values


def of_words(words: list[int | None], tags: list[int]) -> list[int]:
    """The targets of the tokens of one example: of each word its first token counts, of special tokens none."""
    before: int | None = None
    found = []
    for word in words:
        found.append(IGNORE_INDEX if word is None or word == before else tags[word])
        before = word
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
