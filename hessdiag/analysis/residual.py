"""tr(R) of H = G + R: quadratic forms with signs inside the tensors in which the outputs are curved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.records import Record
from hessdiag.results.interval import PILOT
from hessdiag.resume import once
from hessdiag.settings import Settings
from hessdiag.spectral import rademacher
from hessdiag.spectral.deflation import FEWEST

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ResidualForms:
    """z·Rz for signs z inside the curved tensors, (n, tensors) and (n, batches); one exact row of all."""

    tensors: Array
    batches: Array


class Residual:
    """Products with R, as they are asked for.

    Args:
        operator: H.
        curved: names of the tensors in which the outputs are curved.
        settings: of the measurement.
    """

    def __init__(self, operator: Curvature, curved: tuple[str, ...], settings: Settings) -> None:
        self.operator, self.settings = operator, settings
        self.R = operator.with_kind("residual")
        self.R.kept = operator.kept
        inside = [torch.full((size,), name in curved) for name, size in operator.layout]
        self.mask = torch.cat(inside).to(operator.device)

    @property
    def few(self) -> bool:
        """Whether the curved tensors have no more entries than there would be probes."""
        return int(self.mask.sum()) <= min(self.settings.most_probes, self.operator.left)

    @property
    def products(self) -> int:
        """Spent so far."""
        return self.R.products

    @cached_property
    def pilot(self) -> Array:
        """(8,) forms of a stream of their own, which no estimate may use again."""
        pilot: Array = self._drawn("residual pilot", PILOT).tensors.sum(1)
        return pilot

    def drawn(self, number: int) -> ResidualForms:
        """``number`` forms."""
        return self._drawn("residual", number)

    def diagonal(self) -> ResidualForms:
        """Every entry of the curved tensors multiplied: exact."""
        entries = self.mask.nonzero()[:, 0]
        with self.R.recorded() as record:
            for part in torch.split(entries, self.operator.block):
                rows = torch.nn.functional.one_hot(part, len(self.mask))[:, self.operator.part]
                self._multiply(rows.to(self.R.dtype))
        every = _forms(record)
        return ResidualForms(every.tensors.sum(0, keepdims=True), every.batches.sum(0, keepdims=True))

    def _drawn(self, stream: str, number: int) -> ResidualForms:
        with self.R.recorded() as record:
            for begin in range(0, number, self.operator.block):
                wanted = min(self.operator.block, number - begin)
                granted = self.operator.granted(wanted, max(FEWEST - begin, 0))
                if not granted:
                    break
                indices = range(begin, begin + granted)
                rows = torch.stack([rademacher(self.operator, self.settings.seed, stream, i) for i in indices])
                self._multiply(torch.where(self.mask[self.operator.part], rows, torch.zeros_like(rows)))
                if granted < wanted:
                    break
        return _forms(record)

    def _multiply(self, rows: torch.Tensor) -> None:
        before = self.R.seconds
        once(self.R, f"{len(rows)} of R", partial(self._product, rows))
        self.operator.seconds += self.R.seconds - before
        self.operator.beside += len(rows)
        if self.operator.watch is not None:
            self.operator.watch(self.operator.products)

    def _product(self, rows: torch.Tensor) -> None:
        self.R.rows(rows)  # what it shows is recorded


def _forms(record: Record) -> ResidualForms:
    return ResidualForms(torch.stack(record.tensors).numpy(), torch.stack(record.batches).numpy())
