"""H, G or R of a data set's mean loss as an operator: exact weighting, float64 sums, out-of-memory retreat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.blocks import has_blocks
from hessdiag.engine.products.composition import require_outputs
from hessdiag.engine.products.failures import is_out_of_memory, is_unsupported, unsupported
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import Kind, gradient
from hessdiag.engine.products.graphs import Graphs
from hessdiag.engine.products.methods import METHODS, retained_graph
from hessdiag.engine.products.records import Record, Records
from hessdiag.engine.products.stacking import STACKED_COPIES, Stack, stacks, worth_stacking
from hessdiag.errors import MeasurementError, ProblemError, UsageError, one_line
from hessdiag.operator import SymmetricOperator
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet, divide, row_count

TRIAL_EXAMPLES = 16
KINDS = ("hessian", "ggn", "residual")


class Curvature(SymmetricOperator):
    """The curvature of the mean loss over a frozen sample set, at the checkpoint.

    Each batch counts with its own denominator (examples, unmasked tokens), so any division of the same
    samples into batches gives the same product to rounding.

    Attributes:
        method: name of the method that forms products.
        block: vectors per graph; halved when memory runs out.
        weights: what each batch's mean stands for, (batches,) float64.
        divisible: whether a batch's loss is the sum over its parts, so that it may be cut when memory runs out.
        notes: what was done differently than asked, one line each.
        graphs: gradients kept with their graphs between products, up to a limit; ``graphs.release()`` frees them.
        seconds: time spent in products and gradients.

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
        self.function = function or Functional(problem, dtype=dtype, device=device)
        super().__init__(
            self.function.size, dtype=self.function.dtype, device=self.function.device, layout=self.function.layout
        )
        self.problem, self.samples, self.kind, self.method, self.block = problem, samples, kind, method, block
        self.batches = [self.function.place(batch) for batch in samples.batches]
        self.weights = torch.tensor([problem.count(batch) for batch in samples.batches], dtype=torch.float64)
        self.total_weight = float(self.weights.sum())
        if self.total_weight <= 0:
            msg = "nothing in the sample set counts (every target is ignored): take other samples"
            raise ProblemError(msg)
        self.micro_batch: int | None = None
        self.divisible = True
        self.graphs = Graphs(self.function, kind)
        self.records = Records()
        self.notes: list[str] = []
        self.seconds = 0.0

    def __repr__(self) -> str:
        """What it is the matrix of."""
        of = f"{self.problem.loss_name} over {self.samples.examples:,} examples of {self.samples.split}"
        return f"<Curvature {self.kind}, {self.size:,} x {self.size:,}, of {of}, {self.dtype} on {self.device}>"

    @cached_property
    def batch_losses(self) -> tuple[float, ...]:
        """The mean loss of each batch; -inf where nothing counts. One forward pass of the sample set."""
        with self._engine(), torch.no_grad():
            return tuple(self._mean(batch) for batch in self.batches)

    @cached_property
    def trial(self) -> Any:
        """16 neighbours with a large loss: of the batch with the largest the worst quarter, and so on.

        Confident examples have next to no curvature: in single precision 1 − p is rounding there, and two exact
        methods differed by 5e-4 on a ResNet's first 16 images, by 1e-6 on the whole set.
        """
        worst = max(range(len(self.batches)), key=lambda index: self.batch_losses[index])
        piece = self.samples.batches[worst]
        with self._engine(), torch.no_grad():
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
        total = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        with self._engine():
            for batch in self.batches:
                grad = self._fitting(batch, torch.empty(1), lambda piece, _: gradient(self.function, piece)[None])
                total += grad[0].double()
        return total / self.total_weight

    @property
    def stackable(self) -> bool:
        """Whether several batches have one shape and are small, and copies of θ and of the data for each too."""
        return worth_stacking(self.batches, self.size)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The batches, those of one shape together as far as their copies of θ stay small."""
        return stacks(self.batches, max(1, STACKED_COPIES // self.size))

    def _apply(self, rows: Tensor) -> Tensor:
        shape, wide = (len(rows), len(self.batches), len(self.layout)), torch.float64
        forms = torch.zeros(shape if self.records.wanted else 0, dtype=wide, device=self.device)
        whole = len(self.batches) == 1  # no sum of its own: 9 of 66 MiB of a streamed 12-layer GPT
        total = torch.zeros(() if whole else rows.shape, dtype=wide, device=self.device)
        sizes = [size for _, size in self.layout]
        with self._engine():
            for indices, products in self.by_batch(rows):
                if self.records.wanted:
                    # a tensor at a time: what is multiplied for the forms never takes another vector's memory
                    pairs = zip(torch.split(products, sizes, 2), torch.split(rows[:, None], sizes, 2), strict=True)
                    forms[:, indices] = torch.stack([(hv * v).sum(2, dtype=wide) for hv, v in pairs], dim=2)
                part = products.sum(1, dtype=wide) if products.shape[1] > 1 else products[:, 0]
                total = part if whole else total.add_(part)
        self.records.add(forms, self.weights, self.total_weight)
        return total.div_(self.total_weight).to(self.dtype)

    def by_batch(self, rows: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Products (k, b, P) of b batches' summed losses, with their indices: stacks of batches, or one by one."""
        if self.method == "stacked_graph" and self.kind != "ggn" and (found := self._stacked(rows)) is not None:
            yield from found
            return
        for index, batch in enumerate(self.batches):
            yield [index], self._fitting(batch, rows, self._form)[:, None]

    def _form(self, piece: Any, rows: Tensor) -> Tensor:
        method = METHODS[self.method]
        if method is retained_graph and self.kind != "ggn" and not self.micro_batch:
            return self.graphs.products(piece, rows)
        return method(self.function, self.kind, piece, rows)

    def _stacked(self, rows: Tensor) -> list[tuple[list[int], Tensor]] | None:
        try:
            return [(list(stack.indices), self.graphs.products(stack, rows)) for stack in self.stacks]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self.graphs.release(for_good=True)
        self.method = "retained_graph"
        self.notes.append("out of memory: batches go one by one from here on; the numbers do not change")
        return None

    def _fitting(self, batch: Any, rows: Tensor, form: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """``form(piece, rows)`` summed over a batch's pieces, in blocks of rows and micro-batches that fit."""
        if len(rows) > self.block:
            return torch.cat([self._fitting(batch, chunk, form) for chunk in torch.split(rows, self.block)])
        pieces = list(divide(batch, self.micro_batch)) if self.micro_batch else [batch]
        try:
            parts = [form(piece, rows) for piece in pieces]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = one_line(error, 120)
        # outside of the handler, whose traceback holds on to the failed graph
        self._retreat(batch, len(rows), failure)
        return self._fitting(batch, rows, form)

    def _retreat(self, batch: Any, vectors: int, failure: str) -> None:
        if self.graphs.release(for_good=True):
            return
        size = self.micro_batch or row_count(batch) or 1
        if vectors > 1:
            self.block = vectors // 2
            note = f"out of memory: {self.block} vectors travel together from here on"
        elif size > 1 and self.divisible:
            self.micro_batch = size // 2
            note = f"out of memory: batches are cut into {self.micro_batch} examples from here on"
        elif self.method != "layer_streamed" and has_blocks(self.function):
            self.method = "layer_streamed"
            note = "out of memory: products go block by block (layer_streamed) from here on"
        elif size > 1:
            msg = f"out of memory with one vector ({failure}), and this loss depends on how a batch is cut: "
            raise MeasurementError(msg + "a smaller `batch_size`, or `params`")
        else:
            msg = f"out of memory with one vector and one example ({failure}): choose `params`"
            raise MeasurementError(msg)
        self.notes.append(f"{note}; the numbers do not change")

    def recorded(self) -> AbstractContextManager[Record]:
        """Keep what the products formed inside show beside their images."""
        return self.records.opened()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measuring, with the time spent inside added to ``seconds``."""
        begun = time.perf_counter()
        try:
            with self.function.measuring():
                yield
        finally:
            self.seconds += time.perf_counter() - begun

    @contextmanager
    def _engine(self) -> Iterator[None]:
        """Timed, and what autograd cannot do becomes a refusal that names it."""
        try:
            with self.timed():
                yield
        except RuntimeError as error:
            if is_out_of_memory(error) or not is_unsupported(error):
                raise
            raise MeasurementError(unsupported(error)) from error
