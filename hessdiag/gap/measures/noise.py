"""Gradient noise: the covariance Σ of the examples' gradients, and what the curvature makes of it.

Σ = 1/(n−1) Σ_i (g_i − ḡ)(g_i − ḡ)ᵀ over the sample set, g_i the gradient of example i's part of the mean loss.
All of it follows from one pass over per-example gradients, made once per checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from hessdiag.errors import Refused, UsageError, one_line
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.weighted_trace import CONFIDENCE
from hessdiag.gap.registry import Reading, exact, measure
from hessdiag.results.interval import mean_interval
from hessdiag.spectral.probes import stream
from hessdiag.track.follow import positive

KEPT_BYTES = 256 * 2**20  # of per-example gradients in memory; beyond, every k-th example stands for all
KEPT_EXAMPLES = 2048  # whose inner products are taken
KNOWN = 10  # directions of Σ taken one by one: with ten classes they and 10 probes give tr(HΣ) to 0.1 %
PROBES = 10
ONE_PASS = "1 gradient per example, shared"
SMITH = "McCandlish et al. 2018, equation 2.9"


@dataclass(frozen=True)
class ExampleStatistics:
    """What one pass over the examples' gradients leaves.

    Attributes:
        squares: ‖g_i‖², (n,) float64.
        along: ⟨θ, g_i⟩, (n,) float64.
        mean: ḡ, (P,) float64.
        kept: g_i − ḡ of every ``stride``-th example, (k, P), in the measurement's dtype.
        stride: 1 where all are kept.
    """

    squares: Tensor
    along: Tensor
    mean: Tensor
    kept: Tensor
    stride: int

    @property
    def trace(self) -> float:
        """The trace of Σ, over all examples."""
        n = len(self.squares)
        return max(float(self.squares.mean() - self.mean.square().sum()), 0.0) * n / (n - 1)

    @property
    def note(self) -> str:
        """Which examples stand for Σ's directions, if not all."""
        return "" if self.stride == 1 else f"directions from {len(self.kept)} of {len(self.squares)} examples"


@dataclass(frozen=True)
class _Spectrum:
    """Of Σ over the kept examples: leading eigenvalues, ascending, the Gram matrix's eigenvectors, tr Σ, ‖Σ‖_F."""

    values: Tensor
    vectors: Tensor
    trace: float
    norm: float


def example_statistics(checkpoint: Checkpoint) -> ExampleStatistics | Refused:
    """One pass over the examples' gradients, made once per checkpoint; or why it cannot be had. One gradient."""
    return checkpoint.once("example statistics", lambda: _statistics(checkpoint))


@measure(
    "gradient_noise",
    title="Trace of the gradient covariance",
    family="noise",
    formula="tr Σ",
    source="Jiang et al. 2020, appendix C (gradient variance at the end of training)",
    invariant=("permutation",),
    cost=ONE_PASS,
)
def gradient_noise(checkpoint: Checkpoint) -> Reading | Refused:
    """Tr Σ on the sample set. No invariance but permutation. Cost: the pass over examples."""
    statistics = example_statistics(checkpoint)
    return statistics if isinstance(statistics, Refused) else exact(statistics.trace)


@measure(
    "gradient_noise_max",
    title="Largest eigenvalue of the gradient covariance",
    family="noise",
    formula="λ_max(Σ)",
    source="definition; compared with λ_max(H) in Jastrzębski et al. 2020",
    invariant=("permutation",),
    cost=ONE_PASS,
)
def gradient_noise_max(checkpoint: Checkpoint) -> Reading | Refused:
    """λ_max(Σ) by the examples' inner products. No invariance but permutation. Cost: the pass over examples.

    Where not all gradients fit into 256 MiB it is that of every k-th example, which the note says.
    """
    statistics = example_statistics(checkpoint)
    if isinstance(statistics, Refused):
        return statistics
    return exact(max(float(_spectrum(checkpoint, statistics).values[-1]), 0.0), statistics.note)


@measure(
    "noise_scale",
    title="Gradient noise scale",
    family="noise",
    formula="tr Σ / ‖g‖², ‖g‖² unbiased: ‖ḡ‖² − tr Σ / n",
    source=SMITH,
    invariant=("permutation",),
    cost=ONE_PASS,
)
def noise_scale(checkpoint: Checkpoint) -> Reading | Refused:
    """The batch size at which noise and gradient are equal, in examples. Cost: the pass over examples.

    ``more``: ``temperature`` η/B where ``Problem.meta`` has "lr" and "batch_size".
    """
    statistics = example_statistics(checkpoint)
    if isinstance(statistics, Refused):
        return statistics
    spread = statistics.trace / len(statistics.squares)
    square = float(statistics.mean.square().sum()) - spread
    if square <= 0:
        return Refused(
            "the mean gradient is smaller than its own noise over these examples: the ratio is not resolved"
        )
    value = statistics.trace / square
    rate, batch = (positive(checkpoint.meta.get(name)) for name in ("lr", "batch_size"))
    return exact(value) if rate is None or batch is None else exact(value, temperature=rate / batch)


@measure(
    "noise_alignment",
    title="Alignment of gradient noise with curvature",
    family="noise",
    formula="tr(HΣ)",
    source="Zhu et al. 2019, section 3; Thomas et al. 2020 (with tr(H⁻¹Σ))",
    invariant=("permutation",),
    cost=f"{KNOWN + PROBES} products, {ONE_PASS}",
)
def noise_alignment(checkpoint: Checkpoint) -> Reading | Refused:
    """Tr(HΣ): what one step of noise costs to second order, times 2/η². Cost: 20 products and the pass.

    The 10 leading directions of Σ one by one, probes on the rest. ``more``: ``cosine``, tr(HΣ)/(‖H‖_F ‖Σ‖_F) where
    the analysis has ‖H‖_F. No invariance but permutation.
    """
    statistics = example_statistics(checkpoint)
    if isinstance(statistics, Refused):
        return statistics
    spectrum = _spectrum(checkpoint, statistics)
    scale = statistics.trace / max(spectrum.trace, 1e-300)
    lead = spectrum.vectors
    ones = _forms(checkpoint, statistics, lead.T)
    samples = np.full(1, float(ones.sum()) * scale)
    if len(statistics.kept) > lead.shape[1]:
        signs = torch.stack([_signs(len(lead), checkpoint.seed, index) for index in range(PROBES)])
        rest = _forms(checkpoint, statistics, signs - (signs @ lead) @ lead.T)
        samples = (float(ones.sum()) + rest.numpy()) * scale
    value = float(samples.mean())
    more = {}
    square = checkpoint.analysis.metrics.get("frobenius_squared") if checkpoint.analysis else None
    length = spectrum.norm * scale
    if square is not None and square.value > 0 and length > 0:
        more["cosine"] = value / (math.sqrt(square.value) * length)
    if len(samples) < 2 or float(np.ptp(samples)) == 0:
        return Reading(value, value, value, "exact", statistics.note, more)
    _, lo, hi = mean_interval(samples, CONFIDENCE)
    return Reading(value, lo, hi, "draws", statistics.note, more)


def _statistics(checkpoint: Checkpoint) -> ExampleStatistics | Refused:
    try:
        return _pass(checkpoint)
    except (RuntimeError, TypeError, ValueError, UsageError) as error:
        return Refused(f"gradients of single examples cannot be had here: {one_line(error, 120)}")


def _pass(checkpoint: Checkpoint) -> ExampleStatistics:
    op = checkpoint.operator
    n = checkpoint.examples
    if n < 2:
        msg = "one example has no covariance"
        raise UsageError(msg)
    stride = max(1, math.ceil(n * op.size * op.dtype.itemsize / KEPT_BYTES), math.ceil(n / KEPT_EXAMPLES))
    theta = checkpoint.theta.double()
    squares, along, kept = [], [], []
    total, seen = torch.zeros_like(theta), 0
    for rows in checkpoint.landscape.example_gradients():
        squares.append(rows.square().sum(1).cpu())
        along.append((rows @ theta).cpu())
        total += rows.sum(0)
        kept.append(rows[(-seen) % stride :: stride].to(op.dtype))
        seen += len(rows)
    mean = total / seen
    return ExampleStatistics(
        torch.cat(squares), torch.cat(along), mean, torch.cat(kept) - mean.to(op.dtype), stride
    )


def _spectrum(checkpoint: Checkpoint, statistics: ExampleStatistics) -> _Spectrum:
    return checkpoint.once("gradient noise spectrum", lambda: _eigenvalues(statistics.kept, checkpoint.seed))


def _eigenvalues(kept: Tensor, seed: int) -> _Spectrum:
    gram = torch.zeros(len(kept), len(kept), dtype=torch.float64, device=kept.device)
    for part in torch.split(kept, 2**16, dim=1):
        gram += part @ part.T
    gram = gram.cpu() / max(len(kept) - 1, 1)
    if len(kept) <= 4 * KNOWN:
        values, vectors = np.linalg.eigh(gram.numpy())
    else:
        start = _signs(len(kept), seed, -1).numpy()
        values, vectors = eigsh(gram.numpy(), k=KNOWN, which="LA", v0=start)
        order = np.argsort(values)
        values, vectors = values[order], vectors[:, order]
    return _Spectrum(torch.from_numpy(values), torch.from_numpy(vectors), float(gram.trace()), float(gram.norm()))


def _forms(checkpoint: Checkpoint, statistics: ExampleStatistics, weights: Tensor) -> Tensor:
    """v·Hv for v = Σ_i w_i (g_i − ḡ)/√(k−1), a row of ``weights`` (m, k) each; (m,) float64, m products."""
    op, kept = checkpoint.operator, statistics.kept
    rows = (weights.to(kept) @ kept) / math.sqrt(max(len(kept) - 1, 1))
    found = [
        torch.einsum("kp,kp->k", part.double(), op.rows(part).double()) for part in torch.split(rows, op.block)
    ]
    return torch.cat(found).cpu()


def _signs(size: int, seed: int, index: int) -> Tensor:
    draw = torch.randint(2, (size,), generator=stream(seed, "noise alignment", index))
    return (draw * 2 - 1).double()
