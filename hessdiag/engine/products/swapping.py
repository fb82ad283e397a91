"""A model's tensors exchanged for others during a call, wherever the model holds them, and put back afterwards.

`torch.func.functional_call` is not used: it leaves a module that hangs under two names without its parameters
(pytorch#164759), and it does not reach a parameter that is also kept in a plain list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from hessdiag.engine.products.attributes import own_attributes


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor], *, everywhere: bool = False) -> Iterator[None]:
    """A context in which the model holds other tensors; the very same objects come back at its end.

    Args:
        model: its parameters and buffers, tied ones and those of modules under several names, are exchanged,
            and so are they in lists and dicts that are attributes of its modules.
        tensors: by the names of ``named_parameters()`` and ``named_buffers()``.
        everywhere: exchange them in every call of a torch function too, so that parameters in closures, partials
            and other objects are found; costs some microseconds per torch call.
    """
    stand = _stand_ins(model, tensors)
    places = [
        (container, key, tensor)
        for module in model.modules()
        for container in (module._parameters, module._buffers, *own_attributes(module).values())
        for key, tensor in _tensors_in(container)
        if id(tensor) in stand
    ]
    mode = _Everywhere(stand) if everywhere else None
    try:
        for container, key, tensor in places:
            container[key] = stand[id(tensor)]
        if mode is None:
            yield
        else:
            with mode:
                yield
    finally:
        for container, key, tensor in places:
            container[key] = tensor


def _stand_ins(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """What stands for each tensor of the model, by its id; a tied tensor is known by its first name."""
    stand: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                other = tensors.get(f"{prefix}.{name}" if prefix else name)
                if tensor is not None and other is not None:
                    stand.setdefault(id(tensor), other)
    return stand


def _tensors_in(container: Any) -> Iterator[tuple[Any, Tensor]]:
    if isinstance(container, MutableMapping):
        yield from ((key, value) for key, value in list(container.items()) if isinstance(value, Tensor))
    elif isinstance(container, MutableSequence):
        yield from ((index, value) for index, value in enumerate(container) if isinstance(value, Tensor))


class _Everywhere(TorchFunctionMode):
    """Gives every torch function the stand-ins in place of the model's own tensors."""

    def __init__(self, stand: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._stand = stand

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda t: self._stand.get(id(t), t), (args, kwargs or {}))
        return func(*args, **kwargs)
