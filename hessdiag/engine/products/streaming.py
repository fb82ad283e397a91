"""Exact products for stacks of blocks with the memory of one block, by the R-operator (Pearlmutter 1994).

Forward, block by block and without a graph: what enters a block, x, and its change ẋ along each vector. Back: one
block's graph at a time gives λ, the loss's gradient by x, its change λ̇, and the block's part of the products.
Other exact methods hold the graph of all blocks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from hessdiag.engine.products.blocks import Around, Block, alike, find_blocks, refuse, same
from hessdiag.engine.products.failures import is_unsupported
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import Kind, loss_gradient
from hessdiag.engine.products.tangents import Tangents, pull, push, push_forward
from hessdiag.samples import leaves, map_tensors

_COMPARED: WeakSet[Functional] = WeakSet()


def layer_streamed(function: Functional, kind: Kind, batch: Any, rows: Tensor) -> Tensor:
    """Products block by block, see `blocks.find_blocks`: no graph is ever held of more than one.

    Args:
        function: the loss as a function of θ.
        kind: "hessian", "ggn" or "residual".
        batch: placed on the function's device.
        rows: vectors (k, P).

    Returns:
        Products (k, P), of the batch's summed loss: not yet divided by what the mean stands for.

    Raises:
        MeasurementError: there is no stack of blocks, or it is not one: each block called once, in order, on the
            output of the one before and nothing else that depends on the parameters.
    """
    return _Sweep(function, kind, rows).run(batch)


@dataclass
class _Stop:
    """What entered a block: the stream and its changes (None: it depends on no parameter), and everything else."""

    x: Tensor
    moves: list[Tensor] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Sweep:
    """One forward and one backward sweep for k vectors."""

    def __init__(self, function: Functional, kind: Kind, rows: Tensor) -> None:
        self.function, self.kind = function, kind
        self.blocks = find_blocks(function)
        self.outside: tuple[int, ...] = ()  # parameters the model has outside of its blocks
        self.vectors = [function.split(row) for row in rows]
        self.products = torch.zeros_like(rows)
        self._sums = [function.split(product) for product in self.products]
        self._stops: list[_Stop] = []
        self._source: Tensor | None = None  # what enters the first block, with its graph
        self._stream: Tensor | None = None  # what left the last block so far, and its changes
        self._moves: list[Tensor] | None = None
        self._unused: list[Tensor] = []  # what the loss may not depend on
        self._repeated: dict[str, Tensor] = {}  # whether a block gave the same twice

    def run(self, batch: Any) -> Tensor:
        """Products (k, P) of the batch's summed loss."""
        # not kept: it refers to this sweep, and memory must not wait for the garbage collector
        around = Around(self.function, self.blocks, self._enter)
        self.outside = around.indices
        top = around.total(batch) if self.kind == "hessian" else around.outputs(batch)
        self._compare(top, batch)
        grad, moves = self._head(top, batch)
        del top
        after = self._stream
        while self._stops and moves is not None:
            stop = self._stops.pop()
            grad, moves = self._back(self.blocks[len(self._stops)], stop, after, grad, moves)
            after = stop.x
        if moves is not None and self._source is not None:
            theta = self._theta(self.outside)
            _, found = pull(self._source, theta, grad, moves, self._along(self.outside))
            self._add(self.outside, found)
        self._require_repeated()
        return self.products

    def _require_repeated(self) -> None:
        """Refuse a block that gave another output the second time; all are read at once."""
        told = torch.stack([*self._repeated.values()]).tolist() if self._repeated else []
        for name, repeats in zip(self._repeated, told, strict=True):
            if not repeats:
                refuse(f"{name} gives another output the second time (a cache, random numbers)")
        self._repeated.clear()

    def _compare(self, top: Tensor, batch: Any) -> None:
        """Once per model: a loss that reads the blocks' weights by itself (a penalty) comes out another."""
        if len(self._stops) < len(self.blocks):
            refuse(f"{self.blocks[len(self._stops)].name} is not called")
        if self.function not in _COMPARED:
            whole = self.function.total if self.kind == "hessian" else self.function.outputs
            with torch.no_grad():
                equal = same(top, whole(self.function.theta, batch))
            if not equal:
                refuse("the loss uses the blocks' parameters otherwise than by calling them")
            _COMPARED.add(self.function)

    def _enter(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model gets where it calls a block: the output, cut off so that every use of it can be told."""
        block = self.blocks[number]
        x = self._check(number, args, kwargs)
        if not number and x.requires_grad and self.outside:
            self._source, self._moves = x, push(x, self._theta(self.outside), self._along(self.outside))
        x = x.detach()
        self._stops.append(_Stop(x, self._moves, args[1:], kwargs))
        if self._moves is None and block.indices:
            self._moves = [torch.zeros_like(x) for _ in self.vectors]
        output, self._moves = self._forward(block, self._stops[-1])
        output = map_tensors(output, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t)
        self._stream = block.stream(output)
        last = number == len(self.blocks) - 1
        self._unused += [t for t in leaves(output) if t.requires_grad and not (last and t is self._stream)]
        return output

    def _check(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What is streamed into a block, if the block is called as it must be."""
        name = self.blocks[number].name
        if number != len(self._stops):
            refuse(f"{name} is called twice or out of turn")
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            refuse(f"{name} gets no floating-point tensor as its first positional argument")
        if any(tensor.requires_grad for tensor in leaves([args[1:], kwargs])):
            refuse(f"{name} gets a further tensor that depends on the parameters")
        kinds = [type(value).__name__ for value in (*args[1:], *kwargs.values())]
        if caches := [kind for kind in kinds if "cache" in kind.lower()]:
            refuse(f"{name} gets a {caches[0]} to write into, and would twice (use_cache=False in a forward=...)")
        if self._stream is not None and not same(args[0], self._stream):
            refuse(f"{name} does not get what {self.blocks[number - 1].name} gives")
        return args[0]

    def _forward(self, block: Block, stop: _Stop) -> tuple[Any, list[Tensor] | None]:
        """A block's output, and its stream's change along each vector."""
        if self._moves is None:
            with torch.no_grad():
                return block(self._theta(block.indices), stop.x, stop.args, stop.kwargs), None
        along = self._along(block.indices, self._moves)
        primals = [*self._theta(block.indices), stop.x]

        def call(*inputs: Tensor) -> tuple[Any, Tensor]:
            output = block(inputs[:-1], inputs[-1], stop.args, stop.kwargs)
            return output, block.stream(output)

        try:
            return push_forward(call, primals, along)
        except RuntimeError as error:
            if not is_unsupported(error):
                raise
        primals[-1] = stop.x.detach().requires_grad_()
        output, stream = call(*primals)
        return output, push(stream, primals, along)

    def _head(self, top: Tensor, batch: Any) -> tuple[Tensor | None, list[Tensor] | None]:
        """What follows the blocks: its part of the products, the loss's gradient by the stream, and its changes.

        Of the Gauss-Newton matrix, which has no second derivatives of the model, the changes alone.
        """
        if not top.requires_grad:
            return None, None
        if self._unused:
            used = torch.autograd.grad(top.sum(), self._unused, retain_graph=True, allow_unused=True)
            if any(grad is not None for grad in used):
                refuse("the loss uses what a block before the last gives, or more of it than its stream")
        self._unused.clear()
        inputs, along = self._theta(self.outside), self._along(self.outside, self._moves)
        if self._moves is not None and self._stream is not None:
            inputs.append(self._stream)
        grad, moves = self._weights(top, batch, inputs, along)
        first, found = pull(top, inputs, grad, moves, along, last=False)
        self._add(self.outside, found)
        return first, None if self._moves is None else [pieces[-1] for pieces in found]

    def _weights(
        self, top: Tensor, batch: Any, inputs: list[Tensor], along: Tangents
    ) -> tuple[Tensor | None, list[Tensor] | None]:
        """What the top is weighted with, and how that changes: 1, or the loss's gradient by the outputs."""
        if self.kind == "hessian":
            return torch.ones_like(top), None
        leaf, grad = loss_gradient(self.function, top, batch)
        if self.kind == "residual":
            return grad.detach(), None
        pushed = push(top, inputs, along)
        return None, [pull(grad, [leaf], None, [move], [()], last=False)[1][0][0] for move in pushed]

    def _back(
        self, block: Block, stop: _Stop, after: Tensor | None, grad: Tensor | None, moves: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor] | None]:
        """One block's graph: its part of the products, and gradient and changes one block further down."""
        x = stop.x.detach().requires_grad_(stop.moves is not None)
        inputs = self._theta(block.indices)
        y = block.stream(block(inputs, x, stop.args, stop.kwargs))
        if after is not None:
            self._repeated[block.name] = alike(y, after).to(after.device)
        if stop.moves is not None:
            inputs.append(x)
        along = self._along(block.indices, stop.moves)
        first, found = pull(y, inputs, grad, moves, along)
        self._add(block.indices, found)
        return first, None if stop.moves is None else [pieces[-1] for pieces in found]

    def _theta(self, indices: Sequence[int]) -> list[Tensor]:
        return [self.function.theta[index] for index in indices]

    def _along(self, indices: Sequence[int], moves: list[Tensor] | None = None) -> Tangents:
        """Per vector its part for some parameters, and the stream's change."""
        streams = [()] * len(self.vectors) if moves is None else [(move,) for move in moves]
        pairs = zip(self.vectors, streams, strict=True)
        return [(*(vector[index] for index in indices), *stream) for vector, stream in pairs]

    def _add(self, indices: Sequence[int], found: Tangents) -> None:
        for sums, pieces in zip(self._sums, found, strict=True):
            for index, piece in zip(indices, pieces, strict=False):  # the stream's comes last
                sums[index].add_(piece)
