"""An operator whose products are sums over batches: as many at once as memory holds, and the time they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.blocks import has_blocks
from hessdiag.engine.products.failures import is_out_of_memory, is_unsupported, unsupported
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.graphs import Graphs
from hessdiag.engine.products.group import ALONE
from hessdiag.engine.products.stacking import STACKED_COPIES, Stack, stacks, worth_stacking
from hessdiag.errors import MeasurementError, one_line
from hessdiag.operator import SymmetricOperator
from hessdiag.samples import divide, row_count


class Batched(SymmetricOperator):
    """Batches on the device, and what is done differently when memory runs out; the numbers do not change.

    Attributes:
        function: the loss of a batch as a function of the parameters.
        batches: on its device, all of them.
        group: the ranks that measure together.
        mine: which batches this one's products are of.
        method: name of the method that forms products.
        block: vectors per graph; halved when memory runs out.
        micro_batch: examples per piece of a batch; None where batches are whole.
        divisible: whether a batch's loss is the sum over its parts, so that it may be cut when memory runs out.
        notes: what was done differently than asked, one line each.
        graphs: gradients kept with their graphs between products, up to a limit; ``graphs.release()`` frees them.
        seconds: time spent in products and gradients.
    """

    def __init__(
        self, function: Functional, batches: Sequence[Any], graphs: Graphs, *, method: str, block: int
    ) -> None:
        options: dict[str, Any] = {name: getattr(function, name) for name in ("dtype", "device", "layout")}
        super().__init__(function.size, shapes=[tuple(tensor.shape) for tensor in function.theta], **options)
        self.function, self.graphs, self.method, self.block = function, graphs, method, block
        self.batches = [function.place(batch) for batch in batches]
        self.group, self.mine = ALONE, tuple(range(len(self.batches)))
        self.micro_batch: int | None = None
        self.divisible = True
        self.notes: list[str] = []
        self.seconds = 0.0

    @property
    def stackable(self) -> bool:
        """Whether several batches have one shape and are small, and copies of θ and of the data for each too."""
        return worth_stacking(self.batches, self.size)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The batches, those of one shape together as far as their copies of θ stay small."""
        found = stacks([self.batches[index] for index in self.mine], max(1, STACKED_COPIES // self.size))
        return tuple(replace(one, indices=tuple(self.mine[place] for place in one.indices)) for one in found)

    def fitting(self, batch: Any, rows: Tensor, form: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """``form(piece, rows)`` summed over a batch's pieces, in blocks of rows and micro-batches that fit."""
        if len(rows) > self.block:
            return torch.cat([self.fitting(batch, chunk, form) for chunk in torch.split(rows, self.block)])
        pieces = list(divide(batch, self.micro_batch)) if self.micro_batch else [batch]
        try:
            parts = [form(piece, rows) for piece in pieces]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = one_line(error, 120)
        # outside of the handler, whose traceback holds on to the failed graph
        self.retreat(batch, len(rows), failure)
        return self.fitting(batch, rows, form)

    def retreat(self, batch: Any, vectors: int, failure: str) -> None:
        """Give up what takes memory, one thing a call: kept graphs, vectors together, whole batches, the method.

        Raises:
            MeasurementError: nothing is left to give up.
        """
        if self.give_way(vectors):
            return
        size = self.micro_batch or row_count(batch) or 1
        if size > 1 and self.divisible:
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

    def give_way(self, vectors: int) -> bool:
        """Give up kept graphs, then vectors together; whether there was anything of the kind."""
        if self.graphs.release(for_good=True):
            return True
        if vectors > 1:
            self.block = vectors // 2
            note = f"out of memory: {self.block} vectors travel together from here on"
            self.notes.append(f"{note}; the numbers do not change")
        return vectors > 1

    def summed(self, form: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """``form(rows)``, in blocks that fit: for sums over all batches, which memory must hold beside a batch.

        Raises:
            MeasurementError: they do not fit with one vector.
        """
        try:
            return form(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = one_line(error, 120)
        if not self.give_way(len(rows)):
            msg = f"out of memory with one vector beside those of the measurement ({failure}): choose `params`"
            raise MeasurementError(msg)
        if len(rows) <= self.block:
            return self.summed(form, rows)
        return torch.cat([self.summed(form, part) for part in torch.split(rows, self.block)])

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
    def engine(self) -> Iterator[None]:
        """Timed, and what autograd cannot do becomes a refusal that names it."""
        try:
            with self.timed():
                yield
        except RuntimeError as error:
            if is_out_of_memory(error) or not is_unsupported(error):
                raise
            raise MeasurementError(unsupported(error)) from error
