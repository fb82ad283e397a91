"""How a loss of one's own is called: with the outputs, and with the targets or the whole batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import OutOfMemoryError, Tensor, nn

from hessdiag.criteria.layout import TARGET_KEYS
from hessdiag.errors import ProblemError

Called = Literal["f(outputs, batch)", "f(outputs, targets)", "f(model, batch)"]
MODELS = ("model", "m", "net", "network", "module")
BATCHES = ("batch", "b", "data", "sample", "samples")
TARGETS = ("target", "label", "truth", "y_true")
FAILURES = (TypeError, AttributeError, IndexError, KeyError, ValueError, RuntimeError)


def how_called(function: Any) -> Called | None:
    """What the names of a loss's two arguments say; None where they say nothing.

    Raises:
        ProblemError: it cannot be called with two arguments.
    """
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # code without a signature
        return None
    try:
        signature.bind(None, None)
    except TypeError as error:
        msg = f"the loss {name_of(function)}{signature} cannot be called with two arguments: give "
        raise ProblemError(msg + "f(outputs, targets), f(outputs, batch) or, as loss=, f(model, batch)") from error
    names = [name.lower().lstrip("_") for name in signature.parameters]
    if names and names[0] in MODELS:
        return "f(model, batch)"
    second = names[1] if len(names) > 1 else ""
    if second in BATCHES or "batch" in second:
        return "f(outputs, batch)"
    if any(part in second for part in TARGETS):
        return "f(outputs, targets)"
    return None


def call(
    function: Callable[..., Any], outputs: Any, batch: Any, likely: Called | None, *, sure: bool = False
) -> tuple[Any, Called]:
    """The loss of a batch, and how it was called.

    Args:
        function: the loss.
        outputs: of the model.
        batch: as it comes.
        likely: what is tried first; by default ``f(outputs, batch)``. The other is tried where that fails.
        sure: whether no other way is tried.

    Raises:
        Exception: what the loss raises, called the first way.
    """
    given: dict[Called, Any] = {"f(outputs, batch)": batch, "f(outputs, targets)": _targets(batch)}
    ways = sorted((way for way in given if given[way] is not None), key=lambda way: way != likely)
    ways = ways[:1] if sure else ways
    failure: Exception | None = None
    for way in ways:
        try:
            return function(outputs, given[way]), way
        except OutOfMemoryError:
            raise
        except FAILURES as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _targets(batch: Any) -> Any:
    """All of a batch but its inputs; None where that cannot be told."""
    if isinstance(batch, Mapping):
        found = [batch[key] for key in TARGET_KEYS if key in batch]
        return found[0] if len(found) == 1 else None
    if isinstance(batch, Tensor | str) or not isinstance(batch, Sequence) or len(batch) < 2:
        return None
    return batch[1] if len(batch) == 2 else tuple(batch[1:])


def name_of(function: Any) -> str:
    """The qualified name of a function, of what a partial calls, or of an object's class."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__name__))
