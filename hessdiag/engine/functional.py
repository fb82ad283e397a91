"""The model as a pure function of the parameters that count; the model itself is never touched.

Parameters and buffers are copied once, in the dtype and on the device of the measurement, and swapped in
for the duration of a call (``torch.func.functional_call``). So gradients, BatchNorm statistics and weights
of the user's model stay as they are; `measuring` puts back the rest: modes, random states, global flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessdiag.errors import MeasurementError, NonFiniteError, UsageError
from hessdiag.operator import full_precision
from hessdiag.problem import Problem
from hessdiag.samples import map_tensors


class _Call(nn.Module):
    """A function of (model, batch) as a module, so that ``functional_call`` can swap the model's tensors."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, batch: Any) -> Any:
        return self._function(self.model, batch)


class Functional:
    """Loss and outputs of a problem as functions of θ, the parameters that count.

    Attributes:
        theta: the parameters, leaf tensors of ``dtype`` on ``device``.
        names: their names, in the model's order.
        layout: (name, number of elements) of each.
        size: P, their number of elements in all.
    """

    def __init__(
        self, problem: Problem, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        model = problem.bare_model()
        if isinstance(model, torch.jit.ScriptModule):
            msg = "the model is TorchScript, whose parameters cannot be swapped: give the nn.Module it came from"
            raise UsageError(msg)
        self.problem = problem
        self.names = problem.parameter_names()
        named = dict(model.named_parameters())
        first = named[self.names[0]]
        self.device = torch.device(device) if device is not None else first.device
        self.dtype = dtype or _measuring_dtype([named[name] for name in self.names])
        self._model = model
        self._loss = _Call(model, problem.total)
        self._outputs = _Call(model, problem.outputs)
        self.theta = tuple(self._copy(named[name]).requires_grad_() for name in self.names)
        self.layout = tuple((name, tensor.numel()) for name, tensor in zip(self.names, self.theta, strict=True))
        self.size = sum(size for _, size in self.layout)
        chosen = set(self.names)
        self._fixed = {f"model.{n}": self._copy(p) for n, p in named.items() if n not in chosen}
        self._fixed |= {f"model.{n}": self._copy(b) for n, b in model.named_buffers()}
        self._refuse_non_finite()

    def total(self, theta: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The batch's loss times what its mean stands for, a scalar."""
        total: Tensor = self._call(self._loss, theta, batch)
        return total

    def outputs(self, theta: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The model's outputs.

        Raises:
            UsageError: they are not one tensor.
        """
        return one_tensor(self._call(self._outputs, theta, batch))

    def place(self, batch: Any) -> Any:
        """The batch on the measurement's device, floating-point entries in its dtype."""
        return map_tensors(batch, self._place)

    def split(self, row: Tensor) -> tuple[Tensor, ...]:
        """A vector (P,) as views shaped like the parameters."""
        pieces = torch.split(row, [size for _, size in self.layout])
        return tuple(piece.view_as(t) for piece, t in zip(pieces, self.theta, strict=True))

    def flat(self, pieces: tuple[Tensor, ...]) -> Tensor:
        """Tensors shaped like the parameters as one vector (P,)."""
        return torch.cat([piece.reshape(-1) for piece in pieces])

    def shifted(self, direction: Tensor, step: float) -> tuple[Tensor, ...]:
        """θ + step · direction, as new leaves."""
        moves = self.split(direction)
        return tuple(
            torch.add(t.detach(), m, alpha=step).requires_grad_() for t, m in zip(self.theta, moves, strict=True)
        )

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of everything in the model."""
        yield from self._model.named_modules()

    def operations(self, batch: Any) -> tuple[str, ...]:
        """Names of the autograd nodes of one loss, each once; "custom NAME" for user-written ones."""
        with self.measuring():
            total = self.total(self.theta, batch)
        names: dict[str, None] = {}
        for node in graph_nodes(total):
            custom = isinstance(node, torch.autograd.function.BackwardCFunction)
            names[f"custom {node.name().removesuffix('Backward')}" if custom else node.name()] = None
        return tuple(names)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Evaluation mode, MATH attention, no TF32, own random streams; all put back afterwards."""
        modes = [(module, module.training) for module in self._model.modules()]
        cuda = [self.device] if self.device.type == "cuda" else []
        has_rnn = any(isinstance(module, nn.RNNBase) for module, _ in modes)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            # no other attention kernel has second derivatives (pytorch#116350)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # cuDNN's recurrent kernels have no double backward (pytorch#5261)
            cudnn = torch.backends.cudnn.flags(enabled=not has_rnn, allow_tf32=False)
            stack.enter_context(cudnn)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(full_precision())
            try:
                for module, _ in modes:
                    module.training = False
                yield
            finally:
                for module, training in modes:
                    module.training = training

    def _call(self, shell: _Call, theta: tuple[Tensor, ...], batch: Any) -> Any:
        tensors = {f"model.{name}": tensor for name, tensor in zip(self.names, theta, strict=True)}
        return torch.func.functional_call(shell, self._fixed | tensors, (batch,))

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            msg = "the model's weights are on the meta device (offloaded): load them fully first"
            raise MeasurementError(msg)
        return self._place(tensor.detach()).clone()

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype) if tensor.is_floating_point() else tensor.to(self.device)

    def _refuse_non_finite(self) -> None:
        for name, tensor in zip(self.names, self.theta, strict=True):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                msg = (
                    f"{bad} of {tensor.numel()} weights of {name} are NaN or infinite: take an earlier checkpoint"
                )
                raise NonFiniteError(msg)


def one_tensor(outputs: Any) -> Tensor:
    """What a model returned, if G and R can be taken of it.

    Raises:
        UsageError: it is not one tensor.
    """
    if not isinstance(outputs, Tensor):
        msg = f"the model returns {type(outputs).__name__}: G and R need one tensor; give forward=..."
        raise UsageError(msg)
    return outputs


def graph_nodes(loss: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """The autograd nodes behind a tensor, each once."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]


def _measuring_dtype(tensors: list[Tensor]) -> torch.dtype:
    """float32 for half precision (whose products are about 1 % off), the widest dtype otherwise."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
