"""Groups of m examples, whatever the batches: what m-sharpness is defined on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.landscape.landscape import Landscape
from hessdiag.engine.products.curvature import Curvature
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.samples import divide, map_tensors, row_count

GROUP = 128  # m of Andriushchenko et al. 2023, of 1,024 examples


@dataclass(frozen=True)
class Groups:
    """The sample set in groups of consecutive examples, each made of whole pieces of batches.

    Attributes:
        landscape: whose batches are the pieces.
        of: the group of each piece, ascending.
        note: what a group is.
    """

    landscape: Landscape
    of: Tensor
    note: str

    @property
    def number(self) -> int:
        """How many groups there are."""
        return int(self.of[-1]) + 1

    @property
    def shares(self) -> Tensor:
        """The weight of each piece as a share of its group's, (pieces,) float64."""
        weights = self.landscape.weights
        return weights / self._sums(weights)[self.of].clamp(min=1e-300)

    def chunks(self, most: int) -> Iterator[tuple[range, range]]:
        """Groups together with their pieces, of which there are at most ``most`` where a group has no more."""
        ends = torch.searchsorted(self.of, torch.arange(self.number), right=True).tolist()
        group = piece = 0
        while group < self.number:
            after = group + 1
            while after < self.number and ends[after] - piece <= most:
                after += 1
            yield range(group, after), range(piece, ends[after - 1])
            group, piece = after, ends[after - 1]

    def mean(self, rises: Tensor) -> float:
        """The sample set's mean of numbers per group, (groups,)."""
        weights = self._sums(self.landscape.weights)
        counted = weights > 0
        return float((rises[counted] * weights[counted]).sum() / weights.sum())

    def losses(self) -> Tensor:
        """Mean loss of every group at the checkpoint, (groups,); one forward pass."""
        return self._sums(self.landscape.losses().nan_to_num(0.0) * self.shares)

    def _sums(self, pieces: Tensor) -> Tensor:
        return torch.zeros(self.number, dtype=torch.float64).index_add_(0, self.of, pieces.double())


def groups(checkpoint: Checkpoint, *, normalize: bool = False) -> Groups:
    """The checkpoint's examples in groups of `GROUP`, the last one smaller.

    A batch that cannot be cut (its loss is no sum over examples, or its tensors share no first dimension) is a
    group by itself.

    Args:
        checkpoint: its samples in their order.
        normalize: as of `Landscape`.
    """
    op = checkpoint.operator
    rows = [row_count(batch) for batch in checkpoint.samples.batches]
    if not op.divisible or None in rows:
        own = checkpoint.normalized if normalize else checkpoint.landscape
        note = f"{len(op.batches)} batches that cannot be cut, each with a worst point of its own"
        return Groups(own, torch.arange(len(op.batches)), note)
    pieces, of = _cut(checkpoint.samples.batches)
    number = of[-1] + 1
    size = f"{GROUP} examples" if number > 1 else f"all {checkpoint.examples} examples"
    note = f"m = min(128, N): {number} group{'s' * (number > 1)} of {size}, each with a worst point of its own"
    if len(pieces) == len(op.batches):
        own = checkpoint.normalized if normalize else checkpoint.landscape
        return Groups(own, torch.tensor(of), note)
    samples = replace(checkpoint.samples, batches=tuple(pieces))
    cut = Curvature(op.problem, samples, dtype=op.dtype, device=op.device, function=op.function)
    return Groups(Landscape(cut, normalize=normalize), torch.tensor(of), note)


def _cut(batches: tuple[Any, ...]) -> tuple[list[Any], list[int]]:
    """Pieces of the batches that end where groups do, and the group of each."""
    pieces: list[Any] = []
    of: list[int] = []
    taken = 0
    for batch in batches:
        left = row_count(batch) or 0
        first = min(left, GROUP - taken % GROUP)
        # the first piece fills the group that was begun; the rest begins at a group's edge
        parts = [*_head(batch, first), *_tail(batch, first)]
        for part in parts:
            pieces.append(part)
            of.append(taken // GROUP)
            taken += row_count(part) or 0
    return pieces, of


def _head(batch: Any, rows: int) -> list[Any]:
    return [next(divide(batch, rows))] if rows else []


def _tail(batch: Any, rows: int) -> list[Any]:
    rest = map_tensors(batch, lambda leaf: leaf[rows:])
    return list(divide(rest, GROUP)) if row_count(rest) else []
