"""The model as a pure function of the parameters that count; the model itself is never touched.

Parameters and buffers are copied once, in the dtype and on the device of the measurement, and swapped in
for the duration of a call. So gradients, BatchNorm statistics and weights of the user's model stay as they are;
`measuring` puts back the rest: modes, attributes, random states, global flags.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from hessdiag.engine.products.attributes import left_as_found, put_back
from hessdiag.engine.products.checkpointing import kept_activations
from hessdiag.engine.products.nodes import graph_nodes, written_by_hand
from hessdiag.engine.products.real_pairs import real
from hessdiag.engine.products.restoring import random_states
from hessdiag.engine.products.substitutes import twice_differentiable, uncompiled
from hessdiag.engine.products.swapping import swapped
from hessdiag.engine.products.unfit import require_plain
from hessdiag.errors import MeasurementError, NonFiniteError, UsageError
from hessdiag.operator import full_precision
from hessdiag.problem import Problem
from hessdiag.samples import map_tensors


class Functional:
    """Loss and outputs of a problem as functions of θ, the parameters that count.

    A complex parameter counts as its real and imaginary parts, two numbers an entry.

    Attributes:
        theta: the parameters, leaf tensors of ``dtype`` on ``device``; complex ones as `torch.view_as_real`.
        names: their names, in the model's order.
        layout: (name, number of elements) of each.
        size: P, their number of elements in all.
    """

    def __init__(
        self, problem: Problem, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        model = problem.bare_model()
        require_plain(model)
        self.problem = problem
        self.names = problem.parameter_names()
        named = dict(model.named_parameters())
        first = named[self.names[0]]
        self.device = torch.device(device) if device is not None else first.device
        self.dtype = dtype or _measuring_dtype([named[name] for name in self.names])
        self._model = model
        self._complex = tuple(named[name].is_complex() for name in self.names)
        self.theta = tuple(self._leaf(named[name]) for name in self.names)
        self.layout = tuple((name, tensor.numel()) for name, tensor in zip(self.names, self.theta, strict=True))
        self.size = sum(size for _, size in self.layout)
        chosen = set(self.names)
        self.fixed = {n: self._copy(p) for n, p in named.items() if n not in chosen}
        self.fixed |= {n: self._copy(b) for n, b in model.named_buffers()}
        self._measuring = 0  # how many `measuring` contexts are open
        self._differentiates = False  # whether the loss takes derivatives itself: of inputs, of inner steps
        self._everywhere = False  # whether anything reaches parameters past the module
        self._looked_at: set[str] = set()  # of what that is known: the loss may reach what outputs do not
        self._refuse_non_finite()

    def total(self, theta: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The batch's loss times what its mean stands for, a scalar."""
        total: Tensor = self._call(self.problem.total, theta, batch)
        return total

    def outputs(self, theta: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The model's outputs.

        Raises:
            UsageError: they are not one tensor.
        """
        return one_tensor(self.returned(theta, batch))

    def returned(self, theta: tuple[Tensor, ...], batch: Any) -> Any:
        """Whatever the model returns: one tensor, a tuple, a mapping."""
        return self._call(self.problem.outputs, theta, batch)

    def with_constant_outputs(self, theta: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The batch's summed loss with its outputs held constant: what is left of θ is the criterion's own."""
        total: Tensor = self._call(self._criterion, theta, batch)
        return total

    def _criterion(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            outputs = self.problem.outputs(model, batch)
        return self.problem.loss_sum(outputs, batch)

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

    def at(self, theta: tuple[Tensor, ...]) -> Functional:
        """The same function at other parameters."""
        other = copy.copy(self)
        other.theta = tuple(t.detach().to(self.device, self.dtype).requires_grad_() for t in theta)
        return other

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module of everything in the model."""
        yield from self._model.named_modules()

    def operations(self, batch: Any) -> tuple[str, ...]:
        """Names of the autograd nodes of one loss, each once; "custom NAME" for user-written ones."""
        with self.measuring():
            total = self.total(self.theta, batch)
        names: dict[str, None] = {}
        for node in graph_nodes(total):
            custom = written_by_hand(node)
            names[node.name() if custom is None else f"custom {custom}"] = None
        return tuple(names)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Evaluation mode, MATH attention, no TF32, own random streams; all put back afterwards."""
        modules = list(self._model.modules())
        has_rnn = any(isinstance(module, nn.RNNBase) for module in modules)
        with ExitStack() as stack:
            stack.enter_context(left_as_found(self._model))
            stack.enter_context(random_states(self.device))
            stack.enter_context(kept_activations())
            stack.enter_context(uncompiled())
            stack.enter_context(twice_differentiable())
            # no other attention kernel has second derivatives (pytorch#116350)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # cuDNN's recurrent kernels have no double backward (pytorch#5261)
            stack.enter_context(torch.backends.cudnn.flags(enabled=not has_rnn, allow_tf32=False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(full_precision())
            for module in modules:
                module.training = False
            self._measuring += 1
            try:
                yield
            finally:
                self._measuring -= 1

    def tensors(self, theta: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """What the model holds at ``theta``, by name: complex parameters as such, and all that does not count."""
        pieces = zip(self.names, theta, self._complex, strict=True)
        return self.fixed | {name: torch.complex(t[..., 0], t[..., 1]) if pair else t for name, t, pair in pieces}

    def _call(self, function: Callable[[nn.Module, Any], Any], theta: tuple[Tensor, ...], batch: Any) -> Any:
        if not self._measuring:  # a pass in training mode would draw from the user's random streams
            with self.measuring():
                return self._call(function, theta, batch)
        put_back(self._model)  # weights that the last pass has folded and kept belong to other parameters
        graph = torch.is_grad_enabled() or self._differentiates
        with swapped(self._model, self.tensors(theta), everywhere=self._everywhere), torch.set_grad_enabled(graph):
            try:
                result = function(self._model, batch)
            except RuntimeError as error:
                if graph or "does not require grad" not in str(error):
                    raise
                self._differentiates = True
                return self._call(function, theta, batch)
        if function.__name__ not in self._looked_at and _graphs(result):
            if not self._everywhere and self._reached_past(result):
                self._everywhere = True
                with torch.enable_grad():
                    result = self._call(function, theta, batch)
            if self._everywhere and (past := self._reached_past(result)):
                msg = f"the loss reaches {past[0]} past the model (a list, a closure, a cache, a custom function "
                raise MeasurementError(msg + "that holds it), so that it cannot be moved: read it from the module")
            self._looked_at.add(function.__name__)
        return result.detach() if isinstance(result, Tensor) and not torch.is_grad_enabled() else result

    def _reached_past(self, result: Any) -> tuple[str, ...]:
        """Names of the model's own parameters, not their copies, that the result was computed from."""
        own = {id(parameter): name for name, parameter in self._model.named_parameters()}
        nodes = itertools.chain.from_iterable(graph_nodes(tensor) for tensor in _graphs(result))
        reached = (getattr(node, "variable", None) for node in nodes)
        return tuple(own[id(leaf)] for leaf in reached if id(leaf) in own)

    def _leaf(self, tensor: Tensor) -> Tensor:
        return real(self._copy(tensor)).requires_grad_()

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            msg = "the model's weights are on the meta device (offloaded): load them fully first"
            raise MeasurementError(msg)
        return self._place(tensor.detach()).clone()

    def _place(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype.to_complex() if tensor.is_complex() else self.dtype
        placed = tensor.detach()  # an object of its own: a loss may say requires_grad_() to what it is given
        placed = placed.to(self.device, dtype if tensor.is_floating_point() or tensor.is_complex() else None)
        return placed.requires_grad_(tensor.requires_grad)

    def _refuse_non_finite(self) -> None:
        for name, tensor in zip(self.names, self.theta, strict=True):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                msg = f"{bad} of {tensor.numel()} weights of {name} are NaN or infinite"
                msg += ": take an earlier checkpoint"
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


def _graphs(result: Any) -> list[Tensor]:
    """The tensors in what a model or a loss returned that know where they come from."""
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _measuring_dtype(tensors: list[Tensor]) -> torch.dtype:
    """float32 for half precision (whose products are about 1 % off), the widest dtype otherwise."""
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    return torch.float64 if wide else torch.float32
