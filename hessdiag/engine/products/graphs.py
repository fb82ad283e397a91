"""Gradients kept with their graphs: between the products of a sweep only one backward pass is left to pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hessdiag.engine.products.devices import empty_cache
from hessdiag.engine.products.folding import Folded
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import Kind, each_gradient, gradients, scalar_of
from hessdiag.engine.products.memory import free_bytes
from hessdiag.engine.products.stacking import Stack, filled, vmapped
from hessdiag.engine.products.windows import joined
from hessdiag.samples import leaves

KEPT_SHARE = 4  # of the memory that is free without them, graphs take at most this part


class _Along(Function):
    """A number whose derivative by the gradient's pieces is the vector that was put into ``along`` just before.

    What ``grad_outputs`` is for; but that makes torch 2.13 import sympy, a quarter of a CPU second.
    """

    @staticmethod
    def forward(ctx: Any, along: list[Tensor], *heads: Tensor) -> Tensor:
        ctx.along = along
        return heads[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.along


class GradientGraph:
    """A batch's gradient with its graph: a product is one more backward pass, 1 to 1.5 gradients.

    Attributes:
        held: bytes that the graph keeps alive, parameters and data aside.
    """

    def __init__(self, function: Functional, kind: Kind, batch: Any) -> None:
        """Of the Hessian or, with kind "residual", of R; costs 1.2 gradients."""
        self._build(
            function, function.theta, leaves(batch), lambda: scalar_of(function, kind, batch)(*self._theta)
        )

    def _build(
        self,
        function: Functional,
        theta: tuple[Tensor, ...],
        data: Sequence[Tensor],
        scalar: Callable[[], Tensor],
    ) -> None:
        self.function, self._theta = function, theta
        known = {tensor.untyped_storage().data_ptr() for tensor in (*theta, *data)}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            try:
                storage = tensor.untyped_storage()
            except NotImplementedError:  # many derivatives at once inside of the loss
                return tensor
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # as it is, an operation's own output would hold its graph for ever

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with Folded():
                total = scalar()
            gradient = gradients(total, theta, create_graph=True)
        self.held = sum(sizes.values())
        self._live = [index for index, piece in enumerate(gradient) if piece.requires_grad]
        self._along: list[Tensor] = []
        if self._live:
            self._top = _Along.apply(self._along, *(gradient[index] for index in self._live))  # type: ignore[no-untyped-call]

    def products(self, rows: Tensor, *, keep: bool = True) -> Tensor:
        """Products (k, P) of the batch's summed loss; without ``keep`` the graph is gone afterwards."""
        if not self._live:
            return self._flat([torch.zeros_like(t) for t in self._theta]).expand(len(rows), *self._shape)
        products = []
        for number, row in enumerate(rows, start=1):
            pieces = self._pieces(row)
            self._along[:] = [pieces[index] for index in self._live]
            retain = keep or number < len(rows)
            product = [*torch.autograd.grad(self._top, self._theta, retain_graph=retain, materialize_grads=True)]
            self._along.clear()
            products.append(self._flat(product))
        return torch.stack(products) if len(products) > 1 else products[0][None]  # no copy of a long vector

    def each_product(self, row: Tensor, look: Callable[[int, Tensor], None], *, keep: bool = False) -> None:
        """``look(index, piece)`` of a product (P,), a tensor at a time; as for `products`."""
        pieces = self._pieces(row)
        self._along[:] = [pieces[index] for index in self._live]
        each_gradient(self._top if self._live else row.new_zeros(()), self._theta, look, keep=keep)
        self._along.clear()

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.function.size,)

    def _pieces(self, row: Tensor) -> tuple[Tensor, ...]:
        return self.function.split(row)

    def _flat(self, product: list[Tensor]) -> Tensor:
        return joined(product)


class StackGraph(GradientGraph):
    """The gradients of b batches of one shape in one graph, each with a copy of θ; its products are (k, b, P).

    For networks so small that calls cost more than arithmetic: on the digits MLP (3,466 parameters, 8 batches of
    128) a third of the time. Holds b copies of θ and of every product.
    """

    def __init__(self, function: Functional, kind: Kind, stack: Stack) -> None:
        """Of the Hessian or, with kind "residual", of R."""
        self._number = len(stack.indices)
        theta = tuple(t.detach().expand(self._number, *t.shape).requires_grad_() for t in function.theta)
        self._build(function, theta, stack.tensors, lambda: _stacked_scalar(function, kind, stack, theta))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self._number, self.function.size)

    def _pieces(self, row: Tensor) -> tuple[Tensor, ...]:
        return tuple(piece.expand(self._number, *piece.shape) for piece in self.function.split(row))

    def _flat(self, product: list[Tensor]) -> Tensor:
        return torch.cat([piece.reshape(self._number, -1) for piece in product], dim=1)


def _stacked_scalar(function: Functional, kind: Kind, stack: Stack, theta: tuple[Tensor, ...]) -> Tensor:
    """The sum over batches of what `scalar_of` gives for each, every batch at its own copy of θ."""
    if kind == "hessian":
        totals: Tensor = vmapped(lambda t, x: function.total(t, filled(stack.first, x)), theta, stack.tensors)
        return totals.sum()
    outputs: Tensor = vmapped(lambda t, x: function.outputs(t, filled(stack.first, x)), theta, stack.tensors)
    leaf, problem = outputs.detach().requires_grad_(), function.problem
    losses = vmapped(lambda o, x: problem.loss_sum(o, filled(stack.first, x)), leaf, stack.tensors)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return (outputs * grad).sum()


class Graphs:
    """The gradient graphs of some batches, kept as far as they fit.

    Amortised gradients per product, one CPU thread, without and with: MLP 2.2 and 1.2, GPT 3.2 and 2.0, ResNet 2.6
    and 1.6.
    """

    def __init__(self, function: Functional, kind: Kind) -> None:
        """Nothing is kept yet; ``largest`` is the most bytes of one graph, ``building`` seconds of those kept."""
        self.largest, self.building = 0, 0.0
        self._function, self._kind = function, kind
        self._kept: dict[int, tuple[Any, GradientGraph]] = {}
        self._open = True

    @property
    def held(self) -> int:
        """Bytes in use."""
        return sum(graph.held for _, graph in self._kept.values())

    @property
    def kept(self) -> int:
        """How many there are."""
        return len(self._kept)

    def products(self, batch: Any, rows: Tensor) -> Tensor:
        """Products (k, P) of a batch's summed loss, or (k, b, P) of a `Stack`'s, from its graph if it is there."""
        graph, keep = self._graph(batch)
        return graph.products(rows, keep=keep)

    def each_product(self, batch: Any, row: Tensor, look: Callable[[int, Tensor], None]) -> None:
        """``look(index, piece)`` of one product (P,) of a batch's summed loss, a tensor at a time."""
        graph, keep = self._graph(batch)
        graph.each_product(row, look, keep=keep)

    def _graph(self, batch: Any) -> tuple[GradientGraph, bool]:
        """Of a batch or stack, and whether it is kept."""
        known = self._kept.get(id(batch))
        if known is not None and known[0] is batch:
            return known[1], True
        make = StackGraph if isinstance(batch, Stack) else GradientGraph
        begun = time.perf_counter()
        graph = make(self._function, self._kind, batch)
        self.largest = max(self.largest, graph.held)
        keep = self._open and self.held + graph.held <= self.room
        if keep:
            self.building += time.perf_counter() - begun
            self._kept[id(batch)] = (batch, graph)
        return graph, keep

    def release(self, *, for_good: bool = False) -> bool:
        """Free them; ``for_good`` keeps none from here on. Whether there were any."""
        found = bool(self._kept)
        self._kept.clear()
        self._open = self._open and not for_good
        empty_cache(self._function.device)
        return found

    @property
    def room(self) -> int:
        """Bytes that graphs may take in all."""
        return (self.held + free_bytes(self._function.device)) // KEPT_SHARE
