"""H, G or R of a data set's mean loss as an operator: exact weighting, float64 sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.composition import require_outputs
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import Kind, gradient
from hessdiag.engine.products.graphs import Graphs
from hessdiag.engine.products.group import ALONE, Group
from hessdiag.engine.products.losses import Losses
from hessdiag.engine.products.methods import METHODS, retained_graph
from hessdiag.engine.products.preconditioned import Preconditioned, preconditioner_for
from hessdiag.engine.products.records import Record, Records
from hessdiag.engine.products.semidefinite import is_convex
from hessdiag.engine.products.windows import add, narrowed, row_dots
from hessdiag.errors import ProblemError, UsageError
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet, leaves

LONG = 1 << 24  # parameters, from which on a product is summed up a tensor at a time
KINDS = ("hessian", "ggn", "residual")
Indices = slice | list[int]


class Curvature(Losses):
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
        group: Group = ALONE,
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
        self.problem, self.samples, self.kind, self.group = problem, samples, kind, group
        self.mine = group.deal([sum(leaf.numel() for leaf in leaves(batch)) for batch in self.batches])
        if group.shares:
            self.part, self.added = group.part(self.size), group.add
            self.width = self.part.stop - self.part.start
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

    def with_kind(self, kind: Kind) -> Curvature:
        """Another kind of curvature of the same loss on the same samples, sharing the parameters' copies."""
        require_outputs(self, kind)
        shared: dict[str, Any] = {name: getattr(self, name) for name in ("method", "block", "function", "group")}
        other = Curvature(self.problem, self.samples, kind=kind, **shared)
        other.micro_batch, other.divisible = self.micro_batch, self.divisible
        other.notes, other.floor = self.notes, self.floor
        return other

    def gradient(self) -> Tensor:
        """The gradient (P,) of the mean loss, float64; one gradient."""
        (total,) = self.group.total(lambda: (self.summed(self._sum_of_gradients, torch.empty(1)),))
        return total.div_(self.total_weight)

    def _sum_of_gradients(self, one: Tensor) -> Tensor:
        """Over this rank's batches."""
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        with self.engine():
            for index in self.mine:
                batch = self.batches[index]
                add(total, self.fitting(batch, one, lambda piece, _: gradient(self.function, piece)[None])[0])
        return total

    def multiply(self, rows: Tensor) -> Tensor:
        """Products over all batches, each batch by its weight; `records` takes their quadratic forms."""
        rows = rows.contiguous()  # some kernels take no strided tangents: grouped products of experts
        if self.group.size == 1:
            return self.summed(self._product, rows)
        rows = self.group.whole(rows, self.size)
        total, forms = self.group.total(lambda: self._own_products(rows), rows)
        self.block = self.group.smallest(self.block)  # by which callers divide their vectors
        self.records.add(forms, self.weights, self.total_weight)
        return total[:, self.part].div_(self.total_weight).to(self.dtype)

    def _own_products(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over this rank's batches, and the quadratic forms of each, 0 for others'."""
        forms: list[Tensor] = []

        def form(some: Tensor) -> Tensor:
            total, shown = self._sums(some)
            forms.append(shown)
            return total

        return self.summed(form, rows), torch.cat(forms)

    def _product(self, rows: Tensor) -> Tensor:
        total, forms = self._sums(rows)
        self.records.add(forms, self.weights, self.total_weight)
        mean = total.div_(self.total_weight)
        return narrowed(mean[0], self.dtype)[None] if self._is_long(rows) else mean.to(self.dtype)

    def _sums(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_long(rows):
            try:
                return self._long_product(rows[0])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.leanly = False  # the other way cuts batches where memory does not do
        shape, wide = (len(rows), len(self.batches), len(self.layout)), torch.float64
        forms = torch.zeros(shape if self.records.wanted else 0, dtype=wide, device=self.device)
        # no sum of its own: 9 of 66 MiB of a streamed 12-layer GPT
        whole = len(self.batches) == self.group.size == 1
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
        return total, forms

    def _is_long(self, rows: Tensor) -> bool:
        """Whether a product goes into the sum a tensor at a time, so that no batch's own is ever held."""
        plain = self.method == "retained_graph" and self.kind != "ggn" and not self.micro_batch
        return plain and len(rows) == 1 and self.size >= LONG and len(self.batches) > 1 and self.leanly

    def _long_product(self, row: Tensor) -> tuple[Tensor, Tensor]:
        forms = torch.zeros((1, len(self.batches), len(self.layout)), dtype=torch.float64, device=self.device)
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        sums, along = self.function.split(total), self.function.split(row)
        with self.engine():
            for number in self.mine:

                def look(index: int, piece: Tensor, number: int = number) -> None:
                    add(sums[index], piece)
                    if self.records.wanted:
                        forms[0, number, index] = row_dots(piece.reshape(-1), along[index].reshape(-1))

                self.graphs.each_product(self.batches[number], row, look)
        return total[None], forms

    def by_batch(self, rows: Tensor) -> Iterator[tuple[Indices, Tensor]]:
        """Products (k, b, P) of b batches' summed losses, with their indices: stacks of batches, or one by one."""
        if self.method == "stacked_graph" and self.kind != "ggn" and (found := self._stacked(rows)) is not None:
            yield from found
            return
        for index in self.mine:
            yield slice(index, index + 1), self.fitting(self.batches[index], rows, self._form)[:, None]

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
