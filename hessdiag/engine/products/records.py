"""What products show beside their images, kept for whoever asks for it beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Record:
    """One entry per product, in their order; copied from the operator's device when somebody looks."""

    def __init__(self, batches: Sequence[Tensor] = (), tensors: Sequence[Tensor] = ()) -> None:
        self._batches, self._tensors = [*batches], [*tensors]
        self._there: list[Tensor] = []  # (k, batches + tensors) of products that nobody has looked at

    @property
    def batches(self) -> list[Tensor]:
        """v·H_b v per batch, (batches,) float64: what error bars over data are made of.

        Their mean over batches, by the operator's ``weights``, is v·H v.
        """
        self._fetch()
        return self._batches

    @property
    def tensors(self) -> list[Tensor]:
        """v_t·(Hv)_t per parameter tensor t, (tensors,) float64."""
        self._fetch()
        return self._tensors

    def note(self, sums: Tensor, weights: Tensor, total: float) -> None:
        """Add products by the sums over batches and tensors of their forms, (k, batches + tensors)."""
        self._there.append(sums)
        self._weights, self._total = weights, total

    def _fetch(self) -> None:
        if self._there:
            sums, self._there = torch.cat(self._there).cpu(), []
            self._batches.extend(sums[:, : len(self._weights)] / self._weights.clamp(min=1e-300))
            self._tensors.extend(sums[:, len(self._weights) :] / self._total)

    def first(self, number: int) -> Record:
        """The first ``number`` products alone."""
        return Record(self.batches[:number], self.tensors[:number])

    def last(self, number: int) -> Record:
        """The last ``number`` products alone."""
        begin = len(self.batches) - number
        return Record(self.batches[begin:], self.tensors[begin:])


class Records:
    """The records that are open."""

    def __init__(self) -> None:
        self._open: list[Record] = []

    @property
    def wanted(self) -> bool:
        """Whether anybody asks."""
        return bool(self._open)

    @contextmanager
    def opened(self) -> Iterator[Record]:
        """A record of the products formed inside."""
        record = Record()
        self._open.append(record)
        try:
            yield record
        finally:
            self._open = [one for one in self._open if one is not record]

    def add(self, forms: Tensor, weights: Tensor, total: float) -> None:
        """Note products by their forms (k, batches, tensors) of the batches' summed losses."""
        if not self._open:
            return
        sums = torch.cat([forms.sum(2), forms.sum(1)], dim=1)
        for record in self._open:
            record.note(sums, weights, total)

    def again(self, batches: Iterable[Tensor], tensors: Iterable[Tensor]) -> None:
        """Note products that an earlier run formed."""
        for record in self._open:
            record.batches.extend(batches)
            record.tensors.extend(tensors)
