"""The loss around a checkpoint: values, gradients and scores at θ + shift, one by one or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hessdiag.criteria import IGNORE_INDEX
from hessdiag.engine.landscape.passes import CHUNK_BYTES, Passes
from hessdiag.engine.landscape.scores import Scores, classes, from_outputs, joined, with_classes
from hessdiag.engine.products.curvature import Curvature, consecutive
from hessdiag.engine.products.stacking import filled
from hessdiag.errors import UsageError
from hessdiag.samples import divide, leaves, row_count


class Draws(NamedTuple):
    """The sample set at several shifts."""

    losses: Tensor  # (k, batches) float64, mean loss of each batch
    accuracy: Tensor | None  # (k,) float64, share of the positions classified right; None without integer classes


class LossAndGradient(NamedTuple):
    """The sample set at one shift."""

    loss: float  # mean
    gradient: Tensor  # (P,) float64, of the mean loss
    accuracy: float | None


class Landscape:
    """The mean loss of a frozen sample set as a function of a shift (P,) of the parameters that count.

    Evaluation mode throughout, in the operator's dtype; time is added to ``operator.seconds``. Up to 100,000
    parameters, shifts and batches pass through the model together (`torch.func.vmap`).

    Attributes:
        operator: whose function, batches and weights are used.
        counts: passes over the sample set so far, "forwards" and "gradients"; a batch is its share of a pass.
    """

    def __init__(self, operator: Curvature, *, normalize: bool = False) -> None:
        """Around the operator's checkpoint.

        Args:
            operator: on its sample set.
            normalize: centre the logits and divide them by their length before the loss (integer classes only).
        """
        self.operator, self.function = operator, operator.function
        self.batches, self.weights = operator.batches, operator.weights
        self.counts = {"forwards": 0.0, "gradients": 0.0}
        self._passes = Passes(operator, normalize)
        self._divisors = self.weights.clamp(min=1e-300).to(operator.device)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done differently than meant, one line each."""
        return tuple(self._passes.notes)

    @cached_property
    def positions(self) -> int:
        """How many positions have an integer class that counts; 0 where not every batch has such classes."""
        count = 0
        for index, batch in enumerate(self.batches):
            outputs = self._returned(index, None)
            pair = None if outputs is None else classes(self.operator.problem, outputs, batch)
            if pair is None:
                return 0
            count += int((pair[1] != IGNORE_INDEX).sum())
        return count

    def loss(self, shift: Tensor | None = None) -> float:
        """Mean loss at θ + shift; one forward pass."""
        return float(self.mean(self.losses(shift)))

    def losses(self, shift: Tensor | None = None) -> Tensor:
        """Mean loss of every batch at θ + shift, (batches,) float64; one forward pass."""
        return self.draws(self._row(shift)[None]).losses[0]

    def mean(self, losses: Tensor) -> Tensor:
        """The sample set's mean of losses per batch, (..., batches) to (...)."""
        counted = self.weights > 0
        return (losses[..., counted] * self.weights[counted]).sum(-1) / self.operator.total_weight

    def draws(self, shifts: Tensor) -> Draws:
        """Losses and accuracy at θ + each row of ``shifts`` (k, P); k forward passes."""
        rows, positions = self._row(shifts), self.positions
        found = torch.zeros(len(rows), len(self.batches) + 1, dtype=torch.float64, device=rows.device)
        with self.operator.timed(), torch.no_grad():
            for stack in self._passes.stacks:
                chosen = consecutive(stack.indices)
                totals, hit = self._passes.values(stack, rows)
                found[:, chosen] = totals.double() / self._divisors[chosen]
                found[:, -1] += hit.double().sum(1)
        self._count("forwards", len(rows) * len(self.batches))
        found = found.cpu()  # the one copy
        return Draws(found[:, :-1].contiguous(), found[:, -1] / positions if positions else None)

    def loss_and_gradient(self, shift: Tensor | None = None) -> LossAndGradient:
        """Loss, gradient and accuracy at θ + shift; one gradient."""
        row, positions = self._row(shift), self.positions
        with self.operator.timed():
            gradient, total, hits = self._passes.loss_and_gradient(row)
        self._count("gradients", len(self.batches))
        weight = self.operator.total_weight
        return LossAndGradient(total / weight, gradient / weight, hits / positions if positions else None)

    def losses_and_gradients(self, shifts: Tensor, batches: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Batches at a shift of their own each: (b, P) to losses (b,) and gradients (b, P), both float64.

        They are on the operator's device. A batch in which nothing counts has loss and gradient 0.
        Cost: its share of a gradient.

        Args:
            shifts: one row per batch.
            batches: their indices; by default all.
        """
        indices = list(range(len(self.batches)) if batches is None else batches)
        rows = self._row(shifts)
        gradients = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
        losses = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        with self.operator.timed():
            for stack in self._passes.stacked(tuple(indices)):
                chosen = consecutive(stack.indices)
                grads, totals = self._passes.losses_and_gradients(stack, rows[chosen])
                weight = self._divisors[consecutive([indices[place] for place in stack.indices])]
                gradients[chosen] = grads.double() / weight[:, None]
                losses[chosen] = totals.double() / weight
        self._count("gradients", len(indices))
        return losses, gradients

    def gradient(self, shift: Tensor | None = None, batches: Sequence[int] | None = None) -> Tensor:
        """Gradient (P,) float64 of the mean loss, over some of the batches or all; its share of a gradient.

        Raises:
            UsageError: nothing in those batches counts.
        """
        if batches is None:
            return self.loss_and_gradient(shift).gradient
        row, weight = self._row(shift), float(self.weights[list(batches)].sum())
        if weight <= 0:
            msg = f"batches {list(batches)}: nothing in them counts, take others"
            raise UsageError(msg)
        with self.operator.timed():
            parts = [self._gradient_of(row, self.batches[index]).double() for index in batches]
        self._count("gradients", len(batches))
        return torch.stack(parts).sum(0) / weight

    def outputs(self, index: int, shift: Tensor | None = None) -> Tensor:
        """Outputs of batch ``index`` at θ + shift; its share of a forward pass."""
        self._count("forwards", 1)
        with self.operator.timed(), torch.no_grad():
            return self.function.outputs(self._passes.moved(self._row(shift)), self.batches[index])

    def _returned(self, index: int, shift: Tensor | None) -> Tensor | None:
        """The outputs of a batch; None where there are none, or not one tensor."""
        if not self.operator.problem.has_outputs:
            return None
        try:
            return self.outputs(index, shift)
        except UsageError:
            return None

    def examples(self, shift: Tensor | None = None) -> Scores:
        """Loss, hit, margin and confidence of every example at θ + shift.

        Cost: one forward pass; two where the loss is not a built-in one.
        """
        parts = []
        for index, batch in enumerate(self.batches):
            outputs = self._returned(index, shift)
            found = None if outputs is None else from_outputs(self.operator.problem, outputs, batch)
            parts.append(found or self._one_by_one(outputs, index, self._row(shift)))
        return joined(parts)

    def example_gradients(self) -> Iterator[Tensor]:
        """Gradients of the examples' losses at θ, (rows, P) float64 at a time; their mean is the gradient.

        An example counts by its part in the sample set's mean, so with tokens a longer text has a larger gradient.
        Cost: one gradient by per-example graphs, in chunks of 32 MiB.

        Raises:
            UsageError: examples cannot be taken out of their batches.
        """
        scale = sum(self._rows(batch) for batch in self.batches) / self.operator.total_weight
        row, most = self._row(None), max(1, CHUNK_BYTES // (8 * self.function.size))
        self._count("gradients", len(self.batches))
        for piece in (piece for batch in self.batches for piece in divide(batch, most)):
            with self.operator.timed():
                found = self._passes.mapped(
                    lambda *t, piece=piece: self._gradient_of(row, filled(piece, t)),
                    [leaf[:, None] for leaf in leaves(piece)],
                )
            yield found.double() * scale

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Names of the modules in the order in which they are first called; one example's forward pass."""
        called: dict[str, None] = {}
        handles = [
            module.register_forward_hook(lambda *_, name=name: called.setdefault(name) and None)
            for name, module in self.function.modules()
        ]
        try:
            with self.operator.timed(), torch.no_grad():
                self.function.total(self.function.theta, next(divide(self.batches[0], 1)))
        finally:
            for handle in handles:
                handle.remove()
        return tuple(called)

    def _one_by_one(self, outputs: Tensor | None, index: int, row: Tensor) -> Scores:
        """Scores under a loss that is known for whole batches only: every example becomes a batch."""
        batch, there = self.batches[index], self.operator.samples.batches[index]
        number = self._rows(batch)
        self._count("forwards", 1)
        with self.operator.timed(), torch.no_grad():
            totals, _ = self._passes.mapped(
                lambda *t: self._passes.evaluate(row, filled(batch, t)), [leaf[:, None] for leaf in leaves(batch)]
            )
        counts = torch.tensor([self.operator.problem.count(one) for one in divide(there, 1)], dtype=torch.float64)
        loss = totals.double().cpu() / counts.clamp(min=1e-300)
        found = None if outputs is None else classes(self.operator.problem, outputs, batch)
        if found is None or len(found[1]) != number or bool((found[1] == IGNORE_INDEX).any()):
            return Scores(loss)
        return with_classes(loss, found[0].double(), found[1])

    def _gradient_of(self, row: Tensor, batch: Any) -> Tensor:
        grad: Tensor = torch.func.grad(lambda shift: self._passes.evaluate(shift, batch)[0])(row)
        return grad

    def _row(self, shift: Tensor | None) -> Tensor:
        if shift is None:
            return torch.zeros(self.function.size, dtype=self.function.dtype, device=self.function.device)
        return shift.to(self.function.device, self.function.dtype)

    def _rows(self, batch: Any) -> int:
        number = row_count(batch)
        if number is None:
            msg = "the tensors of a batch share no first dimension: examples cannot be taken one by one"
            raise UsageError(msg)
        return number

    def _count(self, what: str, batches: int) -> None:
        self.counts[what] += batches / len(self.batches)
