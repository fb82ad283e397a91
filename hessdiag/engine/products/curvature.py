"""H, G or R of a data set's mean loss as an operator: exact weighting, float64 sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.batched import Batched
from hessdiag.engine.products.composition import require_outputs
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import Kind, gradient
from hessdiag.engine.products.graphs import Graphs
from hessdiag.engine.products.methods import METHODS, retained_graph
from hessdiag.engine.products.preconditioned import Preconditioned, preconditioner_for
from hessdiag.engine.products.records import Record, Records
from hessdiag.engine.products.semidefinite import is_convex
from hessdiag.engine.products.windows import add, narrowed, row_dots
from hessdiag.errors import ProblemError, UsageError
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet, divide, row_count

TRIAL_EXAMPLES = 16
LONG = 1 << 24  # parameters, from which on a product is summed up a tensor at a time
KINDS = ("hessian", "ggn", "residual")
Indices = slice | list[int]


class Curvature(Batched):
    """The curvature of the mean loss over a frozen sample set, at the checkpoint.

    Each batch counts with its own denominator (examples, unmasked tokens), so any division of the same
    samples into batches gives the same product to rounding.

    Attributes:
        weights: what each batch's mean stands for, (batches,) float64.
        leanly: whether products of long vectors are summed up a tensor at a time.

    Those of `Batched` too: method, block, divisible, notes, graphs, seconds.

    >>> import hessdiag, torch
    >>> hessdiag.hessian(torch.nn.Linear(5, 1), torch.nn.MSELoss(), (torch.ones(64, 5), torch.ones(64, 1))).shape
    (6, 6)
    """

    def __init__(
        self,
        problem: Problem,
        samples: SampleSet,
        *,
        kind: Kind = "hessian",
        method: str = "retained_graph",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block: int = 8,
        function: Functional | None = None,
    ) -> None:
        if kind not in KINDS:
            msg = f"`operator={kind!r}`: allowed: {', '.join(KINDS)}"
            raise UsageError(msg)
        if kind != "hessian" and not problem.has_outputs:
            msg = f"`operator={kind!r}` needs criterion(outputs, batch); this problem gives a loss: hessian"
            raise UsageError(msg)
        if method not in METHODS:
            msg = f"`method={method!r}`: allowed: auto, {', '.join(METHODS)}"
            raise UsageError(msg)
        problem = problem.on(samples.batches)
        function = function or Functional(problem, dtype=dtype, device=device)
        super().__init__(function, samples.batches, Graphs(function, kind), method=method, block=block)
        self.problem, self.samples, self.kind = problem, samples, kind
        self.weights = torch.tensor([problem.count(batch) for batch in samples.batches], dtype=torch.float64)
        self.total_weight = float(self.weights.sum())
        if self.total_weight <= 0:
            msg = "nothing in the sample set counts (every target is ignored): take other samples"
            raise ProblemError(msg)
        self.semidefinite = kind == "ggn" and is_convex(problem, self.batches, self.weights)
        self.records = Records()
        self.leanly = True

    def __repr__(self) -> str:
        """What it is the matrix of."""
        of = f"{self.problem.loss_name} over {self.samples.examples:,} examples of {self.samples.split}"
        return f"<Curvature {self.kind}, {self.size:,} x {self.size:,}, of {of}, {self.dtype} on {self.device}>"

    @cached_property
    def batch_losses(self) -> tuple[float, ...]:
        """The mean loss of each batch; -inf where nothing counts. One forward pass of the sample set."""
        with self.engine(), torch.no_grad():
            return tuple(self._mean(batch) for batch in self.batches)

    @cached_property
    def trial(self) -> Any:
        """16 neighbours with a large loss: of the batch with the largest the worst quarter, and so on.

        Confident examples have next to no curvature: in single precision 1 − p is rounding there, and two exact
        methods differed by 5e-4 on a ResNet's first 16 images, by 1e-6 on the whole set.
        """
        worst = max(range(len(self.batches)), key=lambda index: self.batch_losses[index])
        piece = self.samples.batches[worst]
        with self.engine(), torch.no_grad():
            while (rows := row_count(piece) or 0) > TRIAL_EXAMPLES:
                parts = list(divide(piece, max(TRIAL_EXAMPLES, -(-rows // 4))))
                losses = [self._mean(self.function.place(part)) for part in parts]
                piece = parts[losses.index(max(losses))]
        return piece

    def _mean(self, batch: Any) -> float:
        count = self.problem.count(batch)
        return float(self.function.total(self.function.theta, batch)) / count if count else -math.inf

    def with_kind(self, kind: Kind) -> Curvature:
        """Another kind of curvature of the same loss on the same samples, sharing the parameters' copies."""
        require_outputs(self, kind)
        other = Curvature(
            self.problem, self.samples, kind=kind, method=self.method, block=self.block, function=self.function
        )
        other.micro_batch, other.divisible = self.micro_batch, self.divisible
        other.notes, other.floor = self.notes, self.floor
        return other

    def loss(self) -> float:
        """The mean loss on the sample set."""
        means = zip(self.weights.tolist(), self.batch_losses, strict=True)
        return math.fsum(weight * mean for weight, mean in means if weight) / self.total_weight

    def gradient(self) -> Tensor:
        """The gradient (P,) of the mean loss, float64; one gradient."""
        return self.summed(self._sum_of_gradients, torch.empty(1)).div_(self.total_weight)

    def _sum_of_gradients(self, one: Tensor) -> Tensor:
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        with self.engine():
            for batch in self.batches:
                add(total, self.fitting(batch, one, lambda piece, _: gradient(self.function, piece)[None])[0])
        return total

    def multiply(self, rows: Tensor) -> Tensor:
        """Products over all batches, each batch by its weight; `records` takes their quadratic forms."""
        # some kernels take no strided tangents: grouped products of experts
        return self.summed(self._products, rows.contiguous())

    def _products(self, rows: Tensor) -> Tensor:
        if self._is_long(rows):
            try:
                return self._long_product(rows[0])[None]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.leanly = False  # the other way cuts batches where memory does not do
        shape, wide = (len(rows), len(self.batches), len(self.layout)), torch.float64
        forms = torch.zeros(shape if self.records.wanted else 0, dtype=wide, device=self.device)
        whole = len(self.batches) == 1  # no sum of its own: 9 of 66 MiB of a streamed 12-layer GPT
        total = torch.zeros(() if whole else rows.shape, dtype=wide, device=self.device)
        sizes = [size for _, size in self.layout]
        with self.engine():
            for indices, products in self.by_batch(rows):
                if self.records.wanted:
                    # a tensor at a time: what is multiplied for the forms never takes another vector's memory
                    pairs = zip(torch.split(products, sizes, 2), torch.split(rows[:, None], sizes, 2), strict=True)
                    forms[:, indices] = torch.stack([row_dots(hv, v) for hv, v in pairs], dim=2)
                part = products.sum(1, dtype=wide) if products.shape[1] > 1 else products[:, 0]
                if whole:
                    total = part
                else:
                    add(total, part)
                del products, part  # before those of the next batches come
        self.records.add(forms, self.weights, self.total_weight)
        return total.div_(self.total_weight).to(self.dtype)

    def _is_long(self, rows: Tensor) -> bool:
        """Whether a product goes into the sum a tensor at a time, so that no batch's own is ever held."""
        plain = self.method == "retained_graph" and self.kind != "ggn" and not self.micro_batch
        return plain and len(rows) == 1 and self.size >= LONG and len(self.batches) > 1 and self.leanly

    def _long_product(self, row: Tensor) -> Tensor:
        forms = torch.zeros((1, len(self.batches), len(self.layout)), dtype=torch.float64, device=self.device)
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        sums, along = self.function.split(total), self.function.split(row)
        with self.engine():
            for number, batch in enumerate(self.batches):

                def look(index: int, piece: Tensor, number: int = number) -> None:
                    add(sums[index], piece)
                    if self.records.wanted:
                        forms[0, number, index] = row_dots(piece.reshape(-1), along[index].reshape(-1))

                self.graphs.each_product(batch, row, look)
        self.records.add(forms, self.weights, self.total_weight)
        return narrowed(total.div_(self.total_weight), self.dtype)

    def by_batch(self, rows: Tensor) -> Iterator[tuple[Indices, Tensor]]:
        """Products (k, b, P) of b batches' summed losses, with their indices: stacks of batches, or one by one."""
        if self.method == "stacked_graph" and self.kind != "ggn" and (found := self._stacked(rows)) is not None:
            yield from found
            return
        for index, batch in enumerate(self.batches):
            yield slice(index, index + 1), self.fitting(batch, rows, self._form)[:, None]

    def _form(self, piece: Any, rows: Tensor) -> Tensor:
        method = METHODS[self.method]
        if method is retained_graph and self.kind != "ggn" and not self.micro_batch:
            return self.graphs.products(piece, rows)
        return method(self.function, self.kind, piece, rows)

    def _stacked(self, rows: Tensor) -> list[tuple[Indices, Tensor]] | None:
        try:
            return [(consecutive(stack.indices), self.graphs.products(stack, rows)) for stack in self.stacks]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self.graphs.release(for_good=True)
        self.method = "retained_graph"
        self.notes.append("out of memory: batches go one by one from here on; the numbers do not change")
        return None

    def preconditioned(self, optimizer: Any = None) -> Preconditioned:
        """P^-1/2 H P^-1/2 for the preconditioner P of an optimizer; each product costs one of H's.

        Args:
            optimizer: of torch, or its state dict; None for the problem's.

        Raises:
            ProblemError: none, or one that has no preconditioner for these parameters.

        >>> import hessdiag, torch
        >>> model, x, y = torch.nn.Linear(5, 1), torch.randn(64, 5), torch.randn(64, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> torch.nn.functional.mse_loss(model(x), y).backward()
        >>> optimizer.step()
        >>> H = hessdiag.hessian(model, torch.nn.MSELoss(), (x, y)).preconditioned(optimizer)
        >>> hessdiag.extremes(H).lambda_max.value < H.threshold
        True
        """
        return Preconditioned(self, preconditioner_for(self.problem, optimizer))

    def recorded(self) -> AbstractContextManager[Record]:
        """Keep what the products formed inside show beside their images."""
        return self.records.opened()


def consecutive(indices: Sequence[int]) -> Indices:
    """Indices as a slice if they follow one another: a list is copied to the device whenever it is used."""
    first, end = indices[0], indices[-1] + 1
    return slice(first, end) if list(indices) == list(range(first, end)) else list(indices)
