"""Several processes as one: each forms the products of some batches, and the sums are the same on every rank.

Every rank runs the same program on the same vectors; only sums over batches are divided. Whatever ranks exchange
begins with a row of numbers from each: whether it failed, what it wants to exchange, which vectors it multiplies.
So a failure on one rank is the same error on all, and ranks that have parted get an error, not a wrong sum or a
wait without end. What the clock or free memory decides, rank 0 decides for all.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hessdiag.engine.products.common_errors import GoneError, agreed, gone, rank_of, received, sent
from hessdiag.engine.products.shares import dealt, width
from hessdiag.errors import MeasurementError, UsageError

Result = TypeVar("Result")
EXCHANGES = ("sum", "first", "number", "facts", "gather", "end")
FAILED, AGREED, SAID = 0, slice(1, 5), 5  # columns: failed; exchange, turn, shape and vectors; a number


class Group:
    """The ranks that measure together; by default this process alone, which exchanges nothing.

    Attributes:
        rank: of this process.
        size: how many there are.
        shares: whether each holds a part of every vector, and not the whole.
    """

    def __init__(self, processes: dist.ProcessGroup | None = None, *, shard_vectors: bool = False) -> None:
        """Those of a process group of ``torch.distributed``, which this process is in.

        Raises:
            UsageError: it is not, or that is no process group.
        """
        self.rank, self.size, self._processes, self._turn, self._gone = 0, 1, processes, 0, False
        self.shares = shard_vectors
        if processes is None:
            if shard_vectors:
                msg = "`shard_vectors` shares vectors between ranks: start several with torchrun, or give `group`"
                raise UsageError(msg)
            return
        if not isinstance(processes, dist.ProcessGroup):
            msg = f"`group`: {type(processes).__name__}: allowed: a process group, torch.distributed.group.WORLD"
            raise UsageError(msg)
        self.rank, self.size = dist.get_rank(processes), dist.get_world_size(processes)
        if self.rank < 0:
            msg = "`group`: this process is not in it: call hessdiag on the ranks of the group only"
            raise UsageError(msg)
        self._backends = str(dist.get_backend_config(processes))  # "cpu:gloo,cuda:nccl"
        self._device = torch.device("cpu" if "cpu:" in self._backends else "cuda")  # of rows of numbers

    def deal(self, sizes: Sequence[float]) -> tuple[int, ...]:
        """Which of some batches are this rank's: the longest first, each to the rank that has least by then."""
        return dealt(sizes, self.size)[self.rank]

    def total(self, work: Callable[[], tuple[Tensor, ...]], vectors: Tensor | None = None) -> tuple[Tensor, ...]:
        """The sums over ranks of what ``work`` gives of this rank's batches.

        Args:
            work: gives tensors of the same shapes on every rank; zeros where a rank has no batch.
            vectors: what is multiplied, which must be the same to the bit.

        Raises:
            HessdiagError: the ranks have parted, or one is gone.
            Exception: ``work`` failed on some rank; of the same kind and words on every rank.
        """
        if self.size == 1:
            return work()
        parts: tuple[Tensor, ...] = ()
        failure: Exception | None = None
        try:
            parts = work()
        except Exception as error:  # the user's code can raise anything
            failure = error
        shape = sum(place * part.numel() for place, part in enumerate(parts, start=1))
        self._meet("sum", failure, (shape, 0 if vectors is None else _bits(vectors)))
        return tuple(self._sum(part) if part.numel() else part for part in parts)

    def part(self, size: int) -> slice:
        """Which entries of a vector this rank holds.

        Raises:
            UsageError: it is too short to be shared.
        """
        if not self.shares:
            return slice(0, size)
        each = width(size, self.size)
        return slice(min(self.rank * each, size), min((self.rank + 1) * each, size))

    def whole(self, rows: Tensor, size: int) -> Tensor:
        """The whole vectors (k, size) of which each rank has its `part` of the entries; a copy."""
        if not self.shares:
            return rows
        each = width(size, self.size)
        mine = self._there(torch.nn.functional.pad(rows, (0, each - rows.shape[1])))
        self._meet("gather", alike=(len(rows), each))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._exchange(dist.all_gather, parts, mine)
        return torch.cat(parts, dim=1)[:, :size].contiguous().to(rows.device)

    def add(self, total: Tensor) -> Tensor:
        """The sum over ranks of a few numbers."""
        self._meet("sum", alike=(total.numel(), 0))
        return self._sum(total)

    def first(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives on rank 0, where alone it runs; its failure is one on every rank."""
        if self.size == 1:
            return work()
        found: list[Any] = [None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                found = [work()]
                pickle.dumps(found)  # fails here rather than while the others wait for it
            except Exception as error:
                failure = error
        self._meet("first", failure)
        self._exchange(dist.broadcast_object_list, found, group_src=0)
        result: Result = found[0]
        return result

    def number(self, value: float) -> float:
        """Rank 0's number, on every rank."""
        return value if self.size == 1 else self._meet("number", said=value)[0]

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' numbers."""
        return value if self.size == 1 else int(min(self._meet("number", said=value)))

    def require_alike(self, facts: Mapping[str, str]) -> None:
        """Refuse to measure together what is not the same.

        Args:
            facts: names what is compared, and has its hash.

        Raises:
            MeasurementError: a rank has another.
        """
        if self.size == 1:
            return
        found = self._gathered(dict(facts))
        for name, value in found[0].items():
            others = [rank for rank, one in enumerate(found) if one.get(name) != value]
            if others:
                msg = f"rank {others[0]} has other {name} than rank 0: all must read the same files and draw the "
                raise agreed(MeasurementError(msg + "same numbers (torch.manual_seed, no random augmentation)"))

    def all_of(self, lines: Sequence[str]) -> list[str]:
        """The lines of every rank."""
        return list(lines) if self.size == 1 else [line for one in self._gathered(list(lines)) for line in one]

    def _gathered(self, thing: Any) -> list[Any]:
        self._meet("facts")
        found: list[Any] = [None] * self.size
        self._exchange(dist.all_gather_object, found, thing)
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank fails on all, with an error of the same kind and words."""
        try:
            yield
        except Exception as error:
            common = self.common(error)
            if common is error:
                raise
            raise common from error

    def common(self, error: BaseException) -> BaseException:
        """The error that every rank has, after this one met ``error`` and the others may wait for it."""
        if self.size == 1 or rank_of(error) is not None:
            return error
        try:
            self._meet("end", error if isinstance(error, Exception) else RuntimeError(error))
        except GoneError:
            return error  # nobody is left to share it
        except Exception as common:
            return common
        return error

    def end(self) -> None:
        """Wait until every rank is done."""
        if self.size > 1:
            self._meet("end")

    def _meet(
        self, exchange: str, failure: Exception | None = None, alike: Sequence[int] = (0, 0), said: float = 0.0
    ) -> list[float]:
        """A row of numbers from each rank; the number each of them said."""
        self._turn += 1
        bits = torch.tensor([said], dtype=torch.float64).view(torch.int64).item()
        row = [failure is not None, EXCHANGES.index(exchange), self._turn, *alike, bits]
        mine = torch.tensor(row, dtype=torch.int64, device=self._device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        self._exchange(dist.all_gather, rows, mine)
        table = torch.stack(rows).cpu()
        if bool(table[:, FAILED].any()):
            self._raise(failure, named=exchange != "first")
        others = (table[:, AGREED] != table[:1, AGREED]).any(1).nonzero()[:, 0].tolist()
        if others:
            msg = f"rank {others[0]} does not compute what rank 0 does: take one kind of processor or GPU, the "
            raise agreed(MeasurementError(msg + "same versions and the same arguments on every rank"))
        return list(table[:, SAID].contiguous().view(torch.float64).tolist())

    def _raise(self, mine: Exception | None, *, named: bool) -> None:
        """The error of the first rank that failed, on every rank; ``named`` where the others had the same task."""
        found: list[Any] = [None] * self.size
        self._exchange(dist.all_gather_object, found, None if mine is None else sent(mine))
        rank = next(rank for rank, one in enumerate(found) if one is not None)
        error = mine if mine is not None and rank == self.rank else received(*found[rank])
        raise agreed(error, rank if named and any(one is None for one in found) else -1)

    def _there(self, part: Tensor) -> Tensor:
        """Where the group can exchange it: NCCL takes nothing of a CPU, gloo not all of a GPU."""
        kind = part.device.type
        direct = f"{kind}:" in self._backends and (kind == "cpu" or f"{kind}:gloo" not in self._backends)
        return part.contiguous() if direct else part.to(self._device)

    def _sum(self, part: Tensor) -> Tensor:
        summed = self._there(part)
        self._exchange(dist.all_reduce, summed)
        return summed.to(part.device)

    def _exchange(self, operation: Callable[..., Any], *tensors: Any, **options: Any) -> None:
        if self._gone:
            raise gone()
        try:
            operation(*tensors, group=self._processes, **options)
        except RuntimeError as error:  # gloo and NCCL say many things: closed, reset, timed out
            self._gone = True
            raise gone() from error


def _bits(vectors: Tensor) -> int:
    """A checksum in which a changed bit shows, whatever the order of its sum."""
    wide = torch.int64 if vectors.dtype == torch.float64 else torch.int32
    return int(vectors.contiguous().view(wide).sum(dtype=torch.int64))


ALONE = Group()
