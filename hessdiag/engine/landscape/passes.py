"""Passes over batches at shifted parameters: many together by `torch.func.vmap`, or one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.landscape.scores import normalized, right
from hessdiag.engine.products.composition import beside_outputs
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.engine.products.stacking import Stack, filled, joined, stacks, vmapped
from hessdiag.errors import UsageError, one_line

TOGETHER = 100_000  # parameters: beyond, a copy per shift costs more than the calls it saves
STACKED = 16  # batches in one pass
SAME_SUM = 1e-4  # relative: rounding leaves 1e-6, batch statistics 1e-2
CHUNK_BYTES = 32 * 2**20  # of shifted weights and of per-example gradients, as for tr(G)


class Passes:
    """Losses, hits and gradients of batches as functions of a shift of the parameters that count.

    To be called while measuring (`Curvature.timed`).

    Attributes:
        together: whether passes are mapped; switched off for good by what cannot be.
        notes: why, one line.
    """

    def __init__(self, operator: Curvature, normalize: bool) -> None:
        self.function, self.batches, self.normalize = operator.function, operator.batches, normalize
        self.problem = operator.problem
        self.beside = beside_outputs(operator)
        self.together = operator.size <= TOGETHER
        self.notes: list[str] = []
        self._theta = tuple(tensor.detach() for tensor in self.function.theta)
        self._chunk = max(1, CHUNK_BYTES // (operator.size * self.function.theta[0].element_size()))

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """All batches, those of one shape together where passes are mapped."""
        return stacks(self.batches, STACKED if self.together else 1)

    def stacked(self, indices: tuple[int, ...]) -> tuple[Stack, ...]:
        """Some batches, stacked; a stack's indices are places in ``indices``."""
        if indices == tuple(range(len(self.batches))):
            return self.stacks
        return stacks([self.batches[index] for index in indices], STACKED if self.together else 1)

    def moved(self, shift: Tensor) -> tuple[Tensor, ...]:
        """θ + shift."""
        return tuple(t + move for t, move in zip(self._theta, self.function.split(shift), strict=True))

    def evaluate(self, shift: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Summed loss and number of hits of a batch at θ + shift."""
        theta = self.moved(shift)
        if self.beside:  # not by way of the outputs: they are no tensor, or not all that the loss is made of
            return self._whole(theta, batch)
        outputs = self.function.outputs(theta, batch)
        hits = right(self.problem, outputs, batch)
        if self.normalize:
            outputs = normalized(self.problem, outputs, batch)
        return self.problem.loss_sum(outputs, batch), hits.to(outputs.device)

    def _whole(self, theta: tuple[Tensor, ...], batch: Any) -> tuple[Tensor, Tensor]:
        total = self.function.total(theta, batch)
        if self.normalize:
            msg = f"logits cannot be normalised: {self.beside}"
            raise UsageError(msg)
        if not self.problem.has_outputs:
            return total, torch.zeros((), device=total.device)
        return total, right(self.problem, self.function.returned(theta, batch), batch).to(total.device)

    def values(self, stack: Stack, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Summed losses and hits, (k, b) each, of stacked batches at θ + each row of shifts (k, P)."""

        def one(row: Tensor) -> Any:
            return self.mapped(lambda *t: self.evaluate(row, filled(stack.first, t)), stack.tensors)

        parts = [self.mapped(one, (rows,)) for rows in torch.split(shifts, self._chunk)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def losses_and_gradients(self, stack: Stack, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (b, P) and summed losses (b,) of stacked batches, each at its row of (b, P)."""
        rows = shifts.detach().requires_grad_()
        totals, _ = self.mapped(lambda r, *t: self.evaluate(r, filled(stack.first, t)), (rows, *stack.tensors))
        if not totals.requires_grad:
            return torch.zeros_like(shifts), totals
        (gradients,) = torch.autograd.grad(totals.sum(), rows, materialize_grads=True)
        return gradients, totals.detach()

    @cached_property
    def parts(self) -> tuple[Any, ...]:
        """The batches, or all rows as one where passes are mapped and the loss is the same sum."""
        whole = joined(self.batches) if self.together and len(self.batches) > 1 else None
        if whole is None:
            return tuple(self.batches)
        here = torch.zeros(self.function.size, dtype=self.function.dtype, device=self.function.device)
        try:
            with torch.no_grad():
                apart = math.fsum(float(self.evaluate(here, batch)[0]) for batch in self.batches)
                off = abs(float(self.evaluate(here, whole)[0]) - apart)
        except (RuntimeError, ValueError, TypeError):
            return tuple(self.batches)
        return (whole,) if off <= SAME_SUM * abs(apart) else tuple(self.batches)

    def loss_and_gradient(self, shift: Tensor) -> tuple[Tensor, float, float]:
        """The gradient (P,) float64 of the whole summed loss at one shift, with that loss and the hits."""
        row = shift.detach().requires_grad_()
        gradient = torch.zeros(len(shift), dtype=torch.float64, device=shift.device)
        sums = []
        for part in self.parts:
            total, hit = self.evaluate(row, part)
            if total.requires_grad:
                (grad,) = torch.autograd.grad(total, row, materialize_grads=True)
                gradient += grad.double()
            sums.append(torch.stack([total.detach().double(), hit.double()]))
        loss = hits = 0.0
        for one, hit in torch.stack(sums).tolist():  # read at once; added one by one, as ever
            loss, hits = loss + one, hits + hit
        return gradient, loss, hits

    def mapped(self, function: Callable[..., Any], columns: Sequence[Tensor]) -> Any:
        """``function`` over the common first dimension of ``columns``, tensor results stacked."""
        number = len(columns[0])
        if self.together and number > 1:
            try:
                return vmapped(function, *columns)
            except (RuntimeError, ValueError, TypeError) as error:
                why = "out of memory" if is_out_of_memory(error) else one_line(error, 100)
            # what is wrong with the model itself shows again below
            self.together = False
            self.notes.append(f"passes go one by one here, slower but to the same numbers ({why})")
        found = [function(*(column[index] for column in columns)) for index in range(number)]
        leaves, shape = zip(*(torch.utils._pytree.tree_flatten(one) for one in found), strict=True)
        columns_out = [torch.stack(parts) for parts in zip(*leaves, strict=True)]
        return torch.utils._pytree.tree_unflatten(columns_out, shape[0])
