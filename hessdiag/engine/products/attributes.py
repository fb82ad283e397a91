"""What a model's modules hold beside parameters, buffers and children; and all of it put back as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_OF_TORCH = frozenset(vars(nn.Module()))  # hooks and stores that every module has
_KEPT = ("_parameters", "_buffers", "_modules", "training")


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """The instance attributes that the module's own class has set."""
    return {name: value for name, value in vars(module).items() if name not in _OF_TORCH}


_OPEN: dict[int, list[Callable[[], None]]] = {}
"""Of every model inside `left_as_found`, what puts it back, outermost first: functions may share a model."""


def put_back(model: nn.Module) -> None:
    """Put back all but the modes, within `left_as_found`: what one pass has kept is not for the next to find."""
    for innermost in _OPEN.get(id(model), [])[-1:]:
        innermost()


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """A context at whose end every module has the attributes it had, and lists, dicts and sets their content.

    Forward passes leave traces: pruning and old-style weight normalization set ``weight`` anew, recurrent layers
    gather their weights in a list, models keep attention maps and caches. Tensors are not copied: what is written
    into a tensor in place stays, which is why the engine gives the model copies.
    """
    put_back(model)  # what a pass has kept, of whichever function, is not to be found as the model's own
    found = [(module, _state(module)) for module in model.modules()]

    def restore() -> None:
        for module, (attributes, contents) in found:
            now = vars(module)
            for name in [name for name in now if name not in attributes and name not in _OF_TORCH]:
                del now[name]
            for name, value in attributes.items():
                if name != "training" and now.get(name, now) is not value:
                    now[name] = value
            for container, content in contents:
                _refill(container, content)

    contexts = _OPEN.setdefault(id(model), [])
    contexts.append(restore)
    try:
        yield
    finally:
        restore()
        contexts.remove(restore)
        if not contexts:
            del _OPEN[id(model)]
        for module, (attributes, _) in found:
            if "training" in attributes:
                vars(module)["training"] = attributes["training"]


def _state(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """The attributes, and copies of those that are containers."""
    attributes = own_attributes(module) | {n: vars(module)[n] for n in _KEPT if n in vars(module)}
    contents = [(v, v.copy()) for v in attributes.values() if type(v) in (list, dict, OrderedDict, set)]
    return attributes, contents


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container[:] = content
    elif isinstance(container, dict):
        same = len(container) == len(content) and all(container.get(k, content) is v for k, v in content.items())
        if not same:
            container.clear()
            container.update(content)
    elif container != content:
        container.clear()
        container.update(content)
