"""What products show beside their images, kept for whoever asks for it beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Record:
    """One entry per product, in their order.

    Attributes:
        batches: v·H_b v per batch, (batches,) float64: what error bars over data are made of. Their mean over
            batches, by the operator's ``weights``, is v·H v.
        tensors: v_t·(Hv)_t per parameter tensor t, (tensors,) float64.
    """

    batches: list[Tensor] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

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
        forms = forms.cpu()
        for record in self._open:
            record.batches.extend(forms.sum(2) / weights.clamp(min=1e-300))
            record.tensors.extend(forms.sum(1) / total)
