"""What a model is fed during a pass, and the loss's gradient by its outputs: enough to tell which loss it is."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class Seen:
    """A context that watches the calls of a model, without a change to what they compute.

    Attributes:
        calls: (inputs, outputs, gradient) of each call with one tensor in and one out, detached; the gradient, of
            the loss by the outputs, is zero until one has been taken, and where the outputs do not matter.
        regular: every call was of that kind.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.regular = True
        self._model = model

    def __enter__(self) -> Seen:
        self._handle = self._model.register_forward_hook(self._look)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._handle.remove()

    def _look(self, _: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
        x = inputs[0] if len(inputs) == 1 else None
        if not isinstance(x, Tensor) or not isinstance(outputs, Tensor) or not outputs.requires_grad:
            self.regular = False
            return
        grad = torch.zeros_like(outputs, requires_grad=False)
        self.calls.append((x.detach(), outputs.detach(), grad))

        def keep(gradient: Tensor) -> None:
            grad.add_(gradient.detach())

        outputs.register_hook(keep)  # type: ignore[no-untyped-call]
