"""tr(H) from the model: exactly through G where R's diagonal vanishes, with probes on R alone elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.analysis.population import batch_error, by_batch, data_error
from hessdiag.analysis.residual import Residual, ResidualForms
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.squares.curved import curved_tensors
from hessdiag.engine.squares.gauss_newton import OUTPUT_DRAWS, GaussNewtonTrace, gauss_newton_trace
from hessdiag.errors import Refused
from hessdiag.results import DataError, Estimate, Kind, Layer, Provenance
from hessdiag.results.interval import PILOT, enough, quantile, sum_half
from hessdiag.resume import once
from hessdiag.samples import row_count
from hessdiag.settings import Settings

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ModelTrace:
    """tr(H) by way of the model's outputs.

    Attributes:
        estimate: kind "exact" if no signs were drawn at the outputs and no tensor needed probes.
        layers: the same per tensor.
        note: how it was computed, for the reader.
    """

    estimate: Estimate
    layers: tuple[Layer, ...]
    note: str


def model_trace(
    operator: Curvature, settings: Settings, *, probed: bool = False, whole: bool = False
) -> ModelTrace | OpenTrace | Refused:
    """tr(H), or tr(G), through per-example gradients.

    Cost: C backward passes of per-example gradients for C outputs, or 16 with signs there; where some tensor is
    curved, ``settings.probes`` products with R, or what the trace's accuracy takes of them.

    Args:
        operator: H or G.
        settings: what is asked for.
        probed: whether there will be probes on H anyway. They know the trace better than signs at the outputs do
            (a 2-layer GPT: 1.2% from 32 deflated probes, 1.7% from 16 signs and 32 probes on R).
        whole: whether every direction will be multiplied: then nothing is drawn here.

    Returns:
        The trace; what it would take, where probes on H may know it better; or why it has to come from those.
    """
    if operator.method == "finite_difference":
        return Refused("second derivatives are not available here")
    # an escalated check must shrink the error of draws too
    draws = 0 if probed or whole else max(OUTPUT_DRAWS, (settings.probes or 0) // 2)
    form = partial(gauss_newton_trace, operator, seed=settings.seed, draws=draws)
    G = once(operator, "squares", form, into=GaussNewtonTrace)
    if isinstance(G, Refused):
        return G
    curved = curved_tensors(operator) if operator.kind == "hessian" else ()
    if curved and whole:
        return Refused("every direction is multiplied")
    if curved and probed and settings.probes is None:
        return Refused(f"the outputs are curved in {len(curved)} tensors, and probes on H are drawn anyway")
    if not curved:
        return _Parts(operator, G, curved, None, settings.confidence, 0).whole(settings)
    found = OpenTrace(operator, G, Residual(operator, curved, settings), settings, curved)
    rivals = probed and settings.most_probes > 2 * PILOT and not found.residual.few
    return found if rivals else found.settle()


@dataclass(frozen=True)
class OpenTrace:
    """tr(G) exactly, and what tr(R) would take, of which only pilots are paid for.

    Probes on H, where they are drawn anyway, may know the trace 300 times better. Both are judged by pilots that
    no estimate uses again: the choice moves no value and no interval.
    """

    operator: Curvature
    G: GaussNewtonTrace
    residual: Residual
    settings: Settings
    curved: tuple[str, ...]

    @property
    def stderr(self) -> float:
        """What the standard error of the trace would be."""
        return float(self.residual.pilot.std(ddof=1)) / math.sqrt(self._number())

    def settle(self) -> ModelTrace:
        """Draw the probes on R."""
        R = self.residual.diagonal() if self.residual.few else self.residual.drawn(self._number())
        spent = self.residual.products
        return _Parts(self.operator, self.G, self.curved, R, self.settings.confidence, spent).whole(self.settings)

    def _number(self) -> int:
        """As many probes as asked for; with a tolerance, as many as it takes beside tr(G)."""
        number = self.settings.most_probes
        if self.settings.probes is not None or number <= 2 * PILOT or self.operator.left < 2 * PILOT:
            return number
        rtol = self.settings.known_to.trace / quantile(self.settings.confidence)
        beside, error, _ = _sum([self.G.draws.numpy()], 0.95)
        allowed = rtol * abs(beside + float(self.residual.pilot.mean()))
        # where tr(G) is the worse known, products would be spent in vain
        return enough(self.residual.pilot, math.sqrt(max(allowed**2 - error**2, allowed**2 / 4)), number - PILOT)


@dataclass(frozen=True)
class _Parts:
    """tr(G) plus tr(R): two independent sources of error, of which either may be absent."""

    operator: Curvature
    G: GaussNewtonTrace
    curved: tuple[str, ...]
    R: ResidualForms | None
    confidence: float
    products: int

    def whole(self, settings: Settings) -> ModelTrace:
        return ModelTrace(self.estimate(settings), self.layers(), self.note())

    def estimate(self, settings: Settings) -> Estimate:
        draws = self.G.draws.numpy()
        probes = self.R.tensors.sum(1) if self.R is not None else None
        value, stderr, half = _sum([draws] + ([probes] if probes is not None else []), self.confidence)
        half += self._rounding(abs(float(draws.mean())))
        per_probe = draws.mean() + probes if probes is not None else draws
        exact = self.kind == "exact"
        settings_used: dict[str, int | float | str] = {"gradients": self.G.gradients, "seed": settings.seed}
        if self.R is not None:
            settings_used |= {"probes": len(self.R.tensors), "curved_tensors": len(self.curved)}
        estimate = Estimate(
            quantity="trace",
            value=value,
            lo=value - half,
            hi=value + half,
            kind=self.kind,
            confidence=1.0 if exact else self.confidence,
            stderr=stderr,
            per_probe=() if exact else tuple(per_probe.tolist()),
            per_draw=tuple(draws.tolist()) if probes is not None and not self.G.exact else (),
            provenance=Provenance(
                method=self.note(),
                settings=settings_used,
                products=self.products,
                dtype=str(self.operator.dtype).removeprefix("torch."),
            ),
        )
        return replace(estimate, data=self._data(value))

    @property
    def kind(self) -> Kind:
        known = self.R is None or len(self.R.tensors) == 1
        return "exact" if self.G.exact and known else "probes"

    def note(self) -> str:
        first = "tr(G) exactly" if self.G.exact else f"tr(G) from {self.G.gradients} draws of signs at the outputs"
        if self.operator.kind == "ggn":
            return first
        if self.R is None:
            return f"{first}, and tr(R) = 0: the outputs are piecewise linear in every tensor"
        if len(self.R.tensors) == 1:
            return f"{first}, tr(R) from every entry of its {len(self.curved)} curved tensors"
        return (
            f"{first}, tr(R) from probes inside {len(self.curved)} of {len(self.operator.layout)} curved tensors"
        )

    def layers(self) -> tuple[Layer, ...]:
        rows = []
        for index, (name, size) in enumerate(self.operator.layout):
            sources = [self.G.per_tensor[:, index].numpy()]
            if self.R is not None and name in self.curved:
                sources.append(self.R.tensors[:, index])
            value, _, half = _sum(sources, self.confidence)
            half += self._rounding(abs(value))
            kind: Kind = "exact" if all(len(source) == 1 for source in sources) else "probes"
            rows.append(Layer(name=name, size=size, trace=value, lo=value - half, hi=value + half, kind=kind))
        return tuple(rows)

    def _data(self, value: float) -> DataError | None:
        per_example, counts = self.G.per_example.mean(0), self.G.counts
        batches = (_by_batch(per_example, self.operator) / self.operator.weights.clamp(min=1e-300)).numpy()
        if self.R is not None:
            return batch_error(self.operator, batches + self.R.batches.mean(0), value, self.confidence)
        values = (per_example / counts.clamp(min=1e-300)).numpy()
        parts = by_batch(self.operator, batches)
        return data_error(values, counts.numpy(), value, self.confidence, what="examples", batches=parts)

    def _rounding(self, size: float) -> float:
        """Squares of single-precision gradients: each is off by twice a gradient's rounding."""
        return 2 * self.operator.floor * size


def _sum(sources: list[Array], confidence: float) -> tuple[float, float, float]:
    """Value, standard error and half interval of a sum of means; a single sample is exact.

    Degrees of freedom by Welch and Satterthwaite.
    """
    value = math.fsum(float(samples.mean()) for samples in sources)
    parts = [
        (float(samples.var(ddof=1)) / len(samples), len(samples) - 1) for samples in sources if len(samples) > 1
    ]
    return value, math.sqrt(math.fsum(part for part, _ in parts)), sum_half(parts, confidence)


def _by_batch(per_example: Tensor, operator: Curvature) -> Tensor:
    sizes = [row_count(batch) or 1 for batch in operator.batches]
    return torch.stack([part.sum() for part in torch.split(per_example, sizes)])
