"""‖J_nᵀ c‖² per example and tensor: from captured layers where that is proven right here, else by `torch.func`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.devices import is_accelerator
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.stacking import quiet_vmap, vmapped
from hessdiag.engine.squares.captured import Call, Captured, Role, capture, roles_of
from hessdiag.engine.squares.layer_squares import Use, squares
from hessdiag.errors import one_line
from hessdiag.samples import divide, map_tensors, row_count

CHUNK_BYTES = 32 * 2**20  # for per-example gradients: on an MLP twice as fast as 256 MiB, on a ResNet alike
CAPTURE_BYTES, CAPTURE_BYTES_THERE = 2**28, 2**30  # for what the layers of one piece saw; on an accelerator
GRADIENTS_BYTES = 2**23  # for what comes back to them, as long as more than one column does
CHECKED_EXAMPLES = 4
CHECKED_COLUMNS = 2
DISAGREE = 1e-4  # relative, of a tensor's square: rounding in single precision leaves 1e-6
NEGLIGIBLE = 1e-9  # of all tensors' squares, where a tensor's own are rounding alone: (1e-5)² and more


@dataclass
class Pullbacks:
    """Computes squared per-example gradient norms of one operator.

    Attributes:
        function: whose outputs are pulled back.
        roles: of the layers that may be captured; none if it does not work here.
        slow: indices of the tensors that go by per-example gradients.
        reasons: why tensors that were captured go by per-example gradients nevertheless, one line each.
        fixed: bytes one captured example takes.
        moving: bytes it takes more per column.
        batched: whether all columns pass backward through the graph together.
    """

    function: Functional
    roles: dict[str, Role] = field(default_factory=dict)
    slow: frozenset[int] = frozenset()
    reasons: list[str] = field(default_factory=list)
    fixed: int = 0
    moving: int = 0
    batched: bool = True

    @property
    def all_slow(self) -> bool:
        """Whether nothing is captured."""
        return len(self.slow) == len(self.function.names)

    def rows(self) -> int:
        """Examples to take at a time."""
        if self.all_slow:
            return _rows_at_a_time(self.function, range(len(self.function.names)))
        limit = CAPTURE_BYTES_THERE if is_accelerator(self.function.device) else CAPTURE_BYTES
        return max(1, limit // max(1, self.fixed + self.moving))

    def give_up(self, error: Exception) -> None:
        """Take every tensor by per-example gradients from here on."""
        self.slow = frozenset(range(len(self.function.names)))
        self.reasons.append(f"layers cannot be captured ({one_line(error, 100)})")

    def forward(self, piece: Any) -> Captured:
        """One forward pass; its outputs carry a graph."""
        if self.all_slow:
            with torch.no_grad():
                return Captured(self.function.outputs(self.function.theta, piece), {})
        return capture(self.function, piece, self.roles)

    def squares(self, captured: Captured, piece: Any, columns: Tensor) -> Tensor:
        """‖J_nᵀ c‖² for columns (examples, columns, outputs): (examples, columns, tensors) float64.

        Costs one backward pass per column, without that of the parameters where layers are captured.
        """
        missing = [i for i in range(len(self.function.names)) if i not in captured.uses or i in self.slow]
        shape = (*columns.shape[:2], len(self.function.names))
        found = torch.zeros(shape, dtype=torch.float64, device=columns.device)
        if len(missing) < found.shape[2]:
            self._fill(found, captured, columns)
        if missing:
            each = by_gradients(self.function, piece, columns, missing).unbind(2)
            for index, squares_of in zip(missing, each, strict=True):  # a list of indices is copied to the device
                found[:, :, index] = squares_of
        return found.cpu()

    def _fill(self, found: Tensor, captured: Captured, columns: Tensor) -> None:
        n = len(columns)
        quick = {i: some for i, some in captured.uses.items() if i not in self.slow}
        calls = Captured(captured.outputs, quick).calls
        uses = {i: [(Use(call, name, n), calls.index(call)) for name, call in some] for i, some in quick.items()}
        step = max(1, GRADIENTS_BYTES // max(1, n * self.moving))
        for begin in range(0, columns.shape[1], step):
            some = columns[:, begin : begin + step]
            grads = _gradients(captured.outputs, calls, some.transpose(0, 1), self.batched)
            for index, pairs in uses.items():
                live = [(use, grad) for use, place in pairs if (grad := grads[place]) is not None]
                if live:
                    found[:, begin : begin + step, index] = squares(live)


def pullbacks(operator: Curvature) -> Pullbacks:
    """Find out, on a few examples, what can be captured; within the operator's ``timed``."""
    function = operator.function
    found = Pullbacks(function)
    piece = next(divide(function.place(operator.trial), CHECKED_EXAMPLES))
    rows = row_count(piece) or 1
    if rows < 2 or operator.samples.examples < 2 * CHECKED_EXAMPLES:
        found.slow = frozenset(range(len(function.names)))
        return found
    try:
        many, few = capture(function, piece), capture(function, next(divide(piece, rows - 1)))
        found.roles = roles_of(many, few)
        _size_up(found, many, rows)
        _check(found, piece)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        found.give_up(error)
    return found


def _size_up(found: Pullbacks, captured: Captured, rows: int) -> None:
    size = torch.finfo(found.function.dtype).bits // 8
    outputs = sum(call.shape.numel() for call in captured.calls) // rows
    inputs = sum(call.input.numel() * _spread(call.module) for call in captured.calls) // rows
    found.fixed, found.moving = size * (2 * outputs + inputs), size * outputs


def _spread(module: nn.Module) -> int:
    """How many patches of a convolution an input is part of, at most."""
    return 1 + math.prod(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d) else 1


def _check(found: Pullbacks, piece: Any) -> None:
    """Compare with gradients of one example after the other; tensors that disagree go by per-example gradients."""
    function = found.function
    captured = found.forward(piece)
    everything = range(len(function.names))
    found.slow = frozenset(i for i in everything if i not in captured.uses)
    if found.all_slow:
        return
    generator = torch.Generator().manual_seed(11)
    shape = (len(captured.outputs), CHECKED_COLUMNS, *captured.outputs.shape[1:])
    columns = torch.randn(shape, generator=generator).to(captured.outputs)
    true = _one_by_one(function, piece, columns)
    off = (_tried(found, captured, piece, columns) - true).abs()
    wrong = (off > DISAGREE * true + NEGLIGIBLE * true.sum(2, keepdim=True)).flatten(0, 1).any(0)
    wrong |= ~torch.isfinite(off).flatten(0, 1).all(0)
    names = [function.names[i] for i in everything if wrong[i]]
    if names:
        found.slow |= {i for i in everything if wrong[i]}
        found.reasons.append(
            f"{', '.join(names)}: not what their layers' type says, taken by per-example gradients"
        )


def _one_by_one(function: Functional, piece: Any, columns: Tensor) -> Tensor:
    """‖J_nᵀ c‖² by plain backward passes, shaped as `by_gradients` does: the truth for a few examples."""
    found = torch.zeros(*columns.shape[:2], len(function.names), dtype=torch.float64)
    for n, row in enumerate(divide(piece, 1)):
        outputs = function.outputs(function.theta, row)[0]
        for c, column in enumerate(columns[n]):
            pulled = torch.autograd.grad(
                outputs, function.theta, column, retain_graph=True, materialize_grads=True
            )
            found[n, c] = torch.stack([grad.square().sum(dtype=torch.float64) for grad in pulled]).cpu()
    return found


def _tried(found: Pullbacks, captured: Captured, piece: Any, columns: Tensor) -> Tensor:
    try:
        return found.squares(captured, piece, columns)
    except RuntimeError:  # an operation whose backward cannot be batched
        found.batched = False
        return found.squares(captured, piece, columns)


def _gradients(outputs: Tensor, calls: Sequence[Call], columns: Tensor, batched: bool) -> list[Tensor | None]:
    """Gradients by the layers' outputs, (examples, columns, ...), of columns (columns, examples, outputs)."""
    edges = [call.edge for call in calls]
    pull = partial(torch.autograd.grad, outputs, edges, retain_graph=True, allow_unused=True)
    if len(columns) == 1:
        return [None if grad is None else grad[:, None] for grad in pull(columns[0])]
    if batched:
        with quiet_vmap():
            found = pull(columns, is_grads_batched=True)
        return [None if grad is None else grad.transpose(0, 1) for grad in found]
    rows = list(zip(*(pull(column) for column in columns), strict=True))
    return [None if any(grad is None for grad in row) else torch.stack(row, dim=1) for row in rows]


def by_gradients(function: Functional, piece: Any, columns: Tensor, indices: Sequence[int]) -> Tensor:
    """The same for some tensors from per-example gradients, (examples, columns, indices) float64."""
    whole = [tensor.detach() for tensor in function.theta]

    def outputs(row: Any, *some: Tensor) -> Tensor:
        theta = list(whole)
        for index, tensor in zip(indices, some, strict=True):
            theta[index] = tensor
        return function.outputs(tuple(theta), row)[0]

    def one(example: Any, cotangents: Tensor) -> Tensor:
        row = map_tensors(example, lambda leaf: leaf[None])
        pullback = torch.func.vjp(lambda *some: outputs(row, *some), *(whole[i] for i in indices))[1]
        grads = [pullback(cotangent) for cotangent in cotangents]
        return torch.stack([torch.stack([grad.square().sum().double() for grad in s]) for s in grads])

    step = _rows_at_a_time(function, indices)
    pieces = zip(divide(piece, step), torch.split(columns, step), strict=True)
    return torch.cat([vmapped(one, some, cotangents) for some, cotangents in pieces])


def _rows_at_a_time(function: Functional, indices: Sequence[int]) -> int:
    size = sum(function.theta[index].numel() for index in indices)
    return max(1, int(CHUNK_BYTES / (size * torch.finfo(function.dtype).bits / 8)))
