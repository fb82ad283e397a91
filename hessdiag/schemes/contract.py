"""What a scheme gives: rows of data as they lie there, and a model that knows how it takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from hessdiag.errors import UsageError
from hessdiag.schemes.pictures import as_tensors
from hessdiag.sources.weights import Weights

RowKind = Literal["tensors", "images", "text", "records", "ready"]


class Resolved(NamedTuple):
    """One fact that was found out, for `print_config`."""

    what: str  # "model", "loss", "image size"
    value: str
    source: str  # "config.json", "args of the checkpoint", "as asked", "default"


@dataclass(frozen=True)
class Rows:
    """One split of data, before a model's own preparation.

    Attributes:
        kind: "tensors", rows are (input, target) tensors; "images", (PIL image, class or target); "text", one text
            after the other; "records", mappings with "text" and "label"; "ready", anything a `Problem` takes.
        rows: map-style: ``len`` and ``[index]``. Of "ready" the data itself.
        text: the address it came from, for messages.
        options: of the address, those that say how rows become a model's inputs: block, size, mean, std ...
        classes: names of the classes by index, where the data say them.
    """

    kind: RowKind
    rows: Any
    text: str
    options: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def plainly(rows: Rows) -> Any:
    """Rows for a model that has no preparation of its own: tensors as they are, images as float32 in [0, 1].

    Raises:
        UsageError: rows of text, which need a tokenizer.
    """
    if rows.kind in ("tensors", "ready"):
        return rows.rows
    if rows.kind == "images":
        return as_tensors(rows.rows, rows.options, rows.text)
    msg = f"{rows.text}: this model has no tokenizer; text is for `model='hf:DIR'`"
    raise UsageError(msg)


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model by name, and what its library knows of it.

    Attributes:
        model: built; with its weights if ``loaded``, else as it was initialised.
        loaded: whether the scheme put the weights in.
        weights: read by the scheme, and put in strictly unless ``loaded``; None leaves the checkpoint to be read.
        criterion: as `Problem.criterion`; None where ``loss`` is given or the user must say it.
        loss: as `Problem.loss`.
        forward: as `Problem.forward`.
        weight: as `Problem.weight`.
        metric: as `Problem.metric`.
        prepare: rows of a split -> what `Problem.data` takes.
        data: the model's own data by split, used where none is named.
        notes: one-line facts for the user.
        resolved: what was found out, and where.
        meta: facts of the run.
        settle: called with the prepared data by split, before the loss is chosen; gives the model with what only
            data tell: its loss, and more notes.
    """

    model: nn.Module
    loaded: bool = False
    weights: Weights | None = None
    criterion: Any = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    weight: Callable[[Any], float] | None = None
    metric: Callable[[Any, Any], Tensor] | None = None
    prepare: Callable[[Rows], Any] = plainly
    data: Mapping[str, Any] | None = None
    params: Sequence[str] = ("*",)
    notes: tuple[str, ...] = ()
    resolved: tuple[Resolved, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    settle: Callable[[Mapping[str, Any]], NamedModel] | None = None
