"""The trace out of probes on H, with its error over data and its parts per tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.analysis.population import batch_error
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.records import Record
from hessdiag.results import Estimate, Kind, Layer
from hessdiag.results.interval import mean_interval
from hessdiag.spectral import Forms, Krylov, trace_from

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Probed:
    """A run and the probes that it deflates, and where the operator recorded what they are per batch and tensor.

    Attributes:
        operator: H or G.
        krylov: the run; None for none.
        forms: of the probes.
        run: what the run's products showed.
        probes: what the products of the probes, and of none other, showed.
    """

    operator: Curvature
    krylov: Krylov | None
    forms: Forms
    run: Record
    probes: Record

    def without(self, number: int) -> Probed:
        """All but the first ``number`` probes, which have decided something."""
        forms = replace(self.forms, trace=self.forms.trace[number:], squares=self.forms.squares[number:])
        return replace(self, forms=forms, probes=self.probes.last(len(forms.trace)))

    def trace(self, confidence: float) -> Estimate:
        """Tr H with both errors."""
        estimate = trace_from(self.forms, confidence=confidence)
        parts = self._parts(self.run.batches, self.probes.batches)
        if parts is None:
            return estimate
        data = batch_error(self.operator, parts.mean(0), estimate.value, confidence)
        return replace(estimate, data=data)

    def layers(self, confidence: float) -> tuple[Layer, ...]:
        """Tr H per tensor."""
        parts = self._parts(self.run.tensors, self.probes.tensors)
        if parts is None:
            return ()
        exact = self.forms.exact
        rounding = self.forms.floor * math.sqrt(self.forms.squares.mean())
        kind: Kind = "exact" if exact else "probes"
        rows = []
        for (name, size), values in zip(self.operator.layout, parts.T, strict=True):
            value = float(values.mean())
            _, lo, hi = (0.0, value - rounding, value + rounding) if exact else mean_interval(values, confidence)
            rows.append(Layer(name=name, size=size, trace=value, lo=lo, hi=hi, kind=kind))
        return tuple(rows)

    def _parts(self, of_run: Sequence[Tensor], of_probes: Sequence[Tensor]) -> Array | None:
        """Unbiased values of tr H in parts, per probe (n, parts), out of what products showed of themselves.

        The run's basis vectors give Σ q·(…q), the probes (d − k) w·(…w); None after a restart, when the vectors
        that were multiplied are no longer the basis.
        """
        known = self.krylov
        if known is None or known.restarted:
            return None
        run = torch.stack(list(of_run)).sum(0)
        if known.exhausted:
            whole: Array = run[None].numpy()
            return whole
        parts: Array = (run + (self.operator.size - known.size) * torch.stack(list(of_probes))).numpy()
        return parts
