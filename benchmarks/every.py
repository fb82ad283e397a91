"""What `every=k` of a costly penalty keeps of its effect: λ_max at equal training loss, and CPU time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import pairwise
from time import process_time

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import default_collate

from benchmarks.tables import Row
from benchmarks.timing import one_thread
from hessdiag.regularizers import HSR, SpectralRadius
from hessdiag.regularizers.wrapper import Regularizer
from hessdiag.sources.datasets import digits

Wrap = Callable[[Optimizer, int], Regularizer | Optimizer]
STEPS, BATCH, LOOKS, SEEDS = 600, 100, 12, 10
EVERY = (1, 2, 4, 8, 16)
ARMS: dict[str, Wrap] = {
    "SpectralRadius, mu=0.03": lambda sgd, k: SpectralRadius(sgd, mu=0.03, every=k),
    "HSR, mu=0.03, 1 probe": lambda sgd, k: HSR(sgd, mu=0.03, probes=1, every=k),
}


def run(data: str | None, quick: bool = False) -> list[Row]:  # noqa: ARG001 - the digits are embedded
    """Per penalty and k: λ_max over that of plain SGD at equal training loss, in pairs of seeds, and CPU time."""
    one_thread()
    seeds, steps, every = (2, 60, (1, 4)) if quick else (SEEDS, STEPS, EVERY)
    arms: dict[tuple[str, int], Wrap] = {("plain", 1): lambda sgd, _: sgd}
    arms |= {(name, k): wrap for name, wrap in ARMS.items() for k in every}
    curves = {arm: [_trained(wrap, arm[1], seed, steps) for seed in range(seeds)] for arm, wrap in arms.items()}
    level = max(curve[-1][0] for found in curves.values() for curve, _, _ in found)
    rows = []
    for name, k in list(arms)[1:]:
        pairs = list(zip(curves[name, k], curves["plain", 1], strict=True))
        logs = [_at(level, own[0]) - _at(level, plain[0]) for own, plain in pairs]
        errors = [100 * (own[1] - plain[1]) for own, plain in pairs]
        times = [own[2] / plain[2] for own, plain in pairs]
        mean, half = _interval(logs)
        change, width = _interval(errors)
        said = f"95% [{math.exp(mean - half):.3f}, {math.exp(mean + half):.3f}], {seeds} pairs"
        rows.append(
            Row(f"digits MLP, every={k}", name, f"λ_max at loss {level:.2g} / plain's", math.exp(mean), None, said)
        )
        said = f"95% [{change - width:+.2f}, {change + width:+.2f}] points, at equal steps"
        rows.append(Row(f"digits MLP, every={k}", name, "test error − plain's [points]", change, None, said))
        spent = statistics.median(times)
        rows.append(Row(f"digits MLP, every={k}", name, "CPU time / plain's", spent, None, "median of the seeds"))
    return rows


def _trained(wrap: Wrap, k: int, seed: int, steps: int) -> tuple[list[tuple[float, float]], float, float]:
    """(training loss, λ_max) along the run, test error at its end, CPU seconds of the steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    (x, y), (tx, ty) = (default_collate(list(half)) for half in digits())
    optimizer = wrap(SGD(model.parameters(), lr=0.1, momentum=0.9), k)
    generator, curve, spent = torch.Generator().manual_seed(seed), [], 0.0
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (BATCH,), generator=generator)

        def closure(rows: Tensor = rows) -> Tensor:
            return F.cross_entropy(model(x[rows]), y[rows])

        start = process_time()
        if isinstance(optimizer, Regularizer):
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            torch.autograd.backward(closure())
            optimizer.step()
        spent += process_time() - start
        if step % (steps // LOOKS) == 0:
            curve.append(_sharpness(model, x, y))
    with torch.no_grad():
        return curve, float((model(tx).argmax(1) != ty).double().mean()), spent


def _sharpness(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Training loss and its largest eigenvalue, by ARPACK on products of torch."""
    params = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    pieces = torch.autograd.grad(loss, params, create_graph=True)
    flat = torch.cat([piece.reshape(-1) for piece in pieces])

    def product(v: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(v.reshape(-1)).to(flat)
        parts = torch.autograd.grad(flat, params, vector, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts]).double().numpy()

    op = LinearOperator((len(flat), len(flat)), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=len(flat))
    return float(loss.detach()), float(
        eigsh(op, k=1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)[0]
    )


def _at(level: float, curve: list[tuple[float, float]]) -> float:
    """log λ_max where the loss first falls to ``level``, between looks along log loss."""
    logs = [(math.log(loss), math.log(value)) for loss, value in curve]
    target = math.log(level)
    for (a, va), (b, vb) in pairwise(logs):
        if b <= target <= a:
            return va + (vb - va) * (a - target) / (a - b) if a > b else va
    return logs[0][1] if target >= logs[0][0] else logs[-1][1]


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% t interval."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread
